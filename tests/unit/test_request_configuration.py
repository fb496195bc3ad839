"""The configuration of a guest in its request: SSH keys, host name, and texts that are secret."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.model.request import GuestRequest, parse_guest_request, parse_stored_request
from orchestrator.model.secret import MAX_NETWORK_CONFIG, MAX_USER_DATA, Secret
from orchestrator.model.ssh_key import MAX_ALL_KEYS, MAX_KEYS, check_ssh_key

MARKER = "hunter2-correct-horse"
SECRET = f"#cloud-config\npassword: {MARKER}\n"


def request(**fields: object) -> GuestRequest:
    return parse_guest_request({"name": "web", "memory": "64M", "image": "debian", **fields})


def pack(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def key(kind: str, *parts: bytes, comment: str = "alice@example") -> str:
    return f"{kind} {base64.b64encode(pack(kind.encode(), *parts)).decode()} {comment}".strip()


def ed25519(number: int = 1, comment: str = "alice@example") -> str:
    return key("ssh-ed25519", number.to_bytes(32), comment=comment)


def rsa(bits: int, exponent: bytes = b"\1\0\1") -> str:
    return key("ssh-rsa", exponent, b"\0" + ((1 << bits - 1) + 1).to_bytes(bits // 8))


def ecdsa(curve: str, size: int, first: int = 4) -> str:
    return key(f"ecdsa-sha2-{curve}", curve.encode(), bytes([first]) + bytes(2 * size))


GOOD = {
    "ed25519": ed25519(),
    "without a comment": ed25519(comment=""),
    "rsa-2048": rsa(2048),
    "rsa-16384": rsa(16384),
    "p256": ecdsa("nistp256", 32),
    "p384": ecdsa("nistp384", 48),
    "p521": ecdsa("nistp521", 66),
    "security key": key("sk-ssh-ed25519@openssh.com", bytes(32), b"ssh:"),
    "security key p256": key("sk-ecdsa-sha2-nistp256@openssh.com", b"nistp256", b"\4" + bytes(64), b"ssh:"),
}


@pytest.mark.parametrize("name", GOOD)
def test_key_is_accepted(name: str) -> None:
    assert request(ssh_keys=[GOOD[name]]).ssh_keys == (GOOD[name],)


@pytest.mark.parametrize("kind", [("ed25519",), ("rsa", "-b", "2048"), ("ecdsa", "-b", "521")], ids=lambda kind: kind[0])
def test_key_of_ssh_keygen_is_accepted(tmp_path: Path, kind: tuple[str, ...]) -> None:
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-C", "a  comment", "-f", file, "-t", *kind], check=True, timeout=60)
    public = file.with_suffix(".pub").read_text().strip()
    assert request(ssh_keys=[public]).ssh_keys == (public.replace("  ", " "),)
    with pytest.raises(RequestError, match="ssh_keys.0: a private key is not accepted"):
        request(ssh_keys=[file.read_text()[:4000]])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "supported type"),
        ("ssh-ed25519", "damaged|not of the type"),
        (f'command="id" {ed25519()}', "options are not allowed"),
        (f"no-pty {ed25519()}", "options are not allowed"),
        (ed25519().replace("ssh-ed25519", "ssh-dss", 1), "supported type"),
        (ed25519().replace("ssh-ed25519", "ssh-ed25519-cert-v01@openssh.com", 1), "supported type"),
        (ed25519().replace("ssh-ed25519", "ssh-rsa", 1), "not of the type ssh-rsa"),
        (f"{ed25519()}\ncommand=x", "line breaks"),
        (f"{ed25519()}\x1b[2J", "control characters"),
        ("ssh-ed25519 AAAA*AAA", "not base64"),
        (ed25519()[:50], "base64|incomplete"),
        (key("ssh-ed25519", bytes(31)), "32 bytes"),
        (key("ssh-ed25519", bytes(32), b"more"), "32 bytes"),
        (key("ssh-ed25519"), "32 bytes"),
        (rsa(1024), "1024 bits, 2048 to 16384"),
        (rsa(2048, b"\1"), "not those of an RSA key"),
        (key("ssh-rsa", b"\1\0\1"), "exponent and a modulus"),
        (key("ssh-rsa", b"\1\0\1", b"\x80" + bytes(255) + b"\1"), "not those"),
        (ecdsa("nistp256", 48), "not of this curve"),
        (ecdsa("nistp256", 32, first=2), "not of this curve"),
        (key("ecdsa-sha2-nistp256", b"nistp384", b"\4" + bytes(96)), "names another curve"),
        (key("sk-ssh-ed25519@openssh.com", bytes(32)), "no application"),
        (f"ssh-ed25519 {base64.b64encode(pack(b'ssh-ed25519', bytes(32)) + b'xx').decode()}", "incomplete"),
    ],
)
def test_bad_key_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        check_ssh_key(text)
    body = text.partition(" ")[2][:24]
    assert not body or body not in str(caught.value)
    with pytest.raises(RequestError, match="ssh_keys"):
        request(ssh_keys=[text])


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ([ed25519(number) for number in range(MAX_KEYS + 1)], "32"),
        ([ed25519(), ed25519(comment="other comment")], "a key twice"),
        ([ed25519(number, "x" * 4000) for number in range(5)], f"at most {MAX_ALL_KEYS} "),
        (ed25519(), "ssh_keys"),
        ([ed25519(comment="x" * 5000)], "4096"),
        ([7], "ssh_keys.0"),
    ],
)
def test_bad_set_of_keys_is_refused(keys: object, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        request(ssh_keys=keys)


@pytest.mark.parametrize("name", ["web", "Web.Example.COM", "1a", "1", "a.b-c.d", "x" * 63])
def test_hostname_is_accepted_in_lower_case(name: str) -> None:
    if name.isdigit():
        with pytest.raises(RequestError, match="hostname"):
            request(hostname=name)
    else:
        assert request(hostname=name).hostname == name.lower()


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "a..b", "a.", ".a", "a_b", "a b", "a\n", "ä", "10.9.0.1", "a.7", "x" * 64, "a." * 32 + "b", "x" * 200],
)
def test_bad_hostname_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="hostname"):
        request(hostname=name)


@pytest.mark.parametrize("field", ["user_data", "network_config"])
def test_stored_request_has_only_the_hash_of_a_secret(field: str) -> None:
    sent = request(**{field: SECRET, "id": "order-1"})
    stored = sent.model_dump_json(exclude_unset=True)
    assert MARKER not in stored
    assert MARKER not in repr(sent) + str(sent) + str(sent.model_dump())
    assert json.loads(stored)[field] == {"sha256": Secret.of(SECRET).sha256, "bytes": len(SECRET)}
    read = parse_stored_request(stored)
    assert read == sent == sent.without_secret_texts()
    assert sent.secrets[field].text == SECRET
    assert sent.without_secret_texts().secrets[field].text is None
    assert read.secrets[field].text is None
    assert read != request(**{field: SECRET + "# another\n", "id": "order-1"})
    assert read.model_dump_json(exclude_unset=True) == stored


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"sha256": Secret.of(SECRET).sha256, "bytes": 3}, "not a text"),
        ("", "1 to"),
        (f"{MARKER}\0", "zero byte"),
        (MARKER + "x" * MAX_USER_DATA, f"1 to {MAX_USER_DATA} bytes"),
        (MARKER + "ä" * (MAX_USER_DATA // 2), f"1 to {MAX_USER_DATA} bytes"),
        (f"{MARKER}\ud800", "surrogate"),
        (7, "not a text"),
        ([MARKER], "not a text"),
    ],
)
def test_bad_secret_is_refused_without_being_repeated(value: object, why: str) -> None:
    with pytest.raises(RequestError, match=f"user_data: .*{why}") as caught:
        request(user_data=value)
    assert MARKER not in str(caught.value)


def test_network_config_has_its_own_limit() -> None:
    assert request(network_config="x" * MAX_NETWORK_CONFIG).network_config
    with pytest.raises(RequestError, match="network_config"):
        request(network_config="x" * (MAX_NETWORK_CONFIG + 1))


@pytest.mark.parametrize(
    "stored", [{}, {"sha256": "0" * 64}, {"sha256": "0" * 63, "bytes": 1}, {"sha256": "g" * 64, "bytes": 1},
               {"sha256": "0" * 64, "bytes": -1}, {"sha256": "0" * 64, "bytes": True}, {"sha256": "0" * 64, "bytes": 1, "x": 1}]
)  # fmt: skip
def test_damaged_stored_secret_is_refused(stored: dict[str, object]) -> None:
    fields = {"name": "web", "memory": "64M", "image": "debian", "user_data": stored}
    with pytest.raises(ValueError, match="user_data"):
        parse_stored_request(json.dumps(fields))
