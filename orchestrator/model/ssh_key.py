"""OpenSSH public keys (sshd(8), AUTHORIZED_KEYS FILE FORMAT; RFC 4253 6.6, RFC 5656 3.1, RFC 8709 4, PROTOCOL.u2f of OpenSSH).

A key is checked whole: sshd ignores a line that it cannot read, and its owner would be locked out.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

MAX_KEY = 4096
"""Characters of a key with its comment; an RSA key of 16384 bits, the longest that OpenSSH accepts, has 2,750."""
MAX_KEYS = 32
MAX_ALL_KEYS = 16 << 10
"""Characters of all keys of a guest. SMBIOS carries them: 30,000 bytes were tried, and a structure table of the 32-bit kind ends
at 64 KB."""

_SHORTEST_RSA, _LONGEST_RSA = 2048, 16384  # bits; `ssh-keygen` creates 3072
_CURVES = {"nistp256": 32, "nistp384": 48, "nistp521": 66}  # bytes of a coordinate
_UNCOMPRESSED = 4  # first byte of a point (SEC 1 2.3.3); OpenSSH reads no other form
_ED25519 = 32
_TYPES = (
    "ssh-ed25519", "ssh-rsa", *(f"ecdsa-sha2-{curve}" for curve in _CURVES),
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
)  # fmt: skip
_FORM = "use a line of a .pub file: TYPE BASE64 COMMENT"


def check_ssh_key(text: str) -> str:
    """Returns the key with single spaces. Raises ValueError; the message contains nothing of the key: it may be a private one."""
    if "PRIVATE KEY" in text:
        raise ValueError("a private key is not accepted: send the public key, the file with the suffix .pub")
    if not text.isprintable():
        raise ValueError(f"a key with control characters or line breaks; {_FORM}")
    kind, _, rest = text.strip().partition(" ")
    encoded, _, comment = rest.strip().partition(" ")
    if kind not in _TYPES:
        raise ValueError(f"the key does not begin with a supported type ({', '.join(_TYPES)}); options are not allowed; {_FORM}")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"the second word of the {kind} key is not base64; {_FORM}") from None
    _check_parts(kind, data)
    return " ".join(filter(None, (kind, encoded, " ".join(comment.split()))))


def check_ssh_keys(keys: tuple[str, ...]) -> None:
    """Raises ValueError if keys are given twice, or are too long together."""
    bodies = [key.split()[1] for key in keys]
    if len(set(bodies)) != len(bodies):
        raise ValueError("ssh_keys contain a key twice; give each key once")
    if (total := sum(map(len, keys))) > MAX_ALL_KEYS:
        raise ValueError(f"ssh_keys have {total} characters together, at most {MAX_ALL_KEYS} are allowed; give fewer keys")


def _check_parts(kind: str, data: bytes) -> None:
    parts = list(_split(data))
    if not parts or parts[0] != kind.encode():
        raise ValueError(f"the content of the key is not of the type {kind}, or damaged")
    values = parts[1:]
    if kind.startswith("sk-"):
        if len(values) < 2 or not values.pop():
            raise ValueError(f"the {kind} key is damaged: it has no application")
        kind = kind.removeprefix("sk-").removesuffix("@openssh.com")
    if kind == "ssh-rsa":
        _check_rsa(values)
    elif kind == "ssh-ed25519":
        if [len(value) for value in values] != [_ED25519]:
            raise ValueError(f"the {kind} key is damaged: it does not have {_ED25519} bytes")
    else:
        curve = kind.removeprefix("ecdsa-sha2-")
        if len(values) != 2 or values[0] != curve.encode():
            raise ValueError(f"the {kind} key is damaged: it names another curve")
        if len(values[1]) != 1 + 2 * _CURVES[curve] or values[1][0] != _UNCOMPRESSED:
            raise ValueError(f"the {kind} key is damaged: its point is not of this curve")


def _check_rsa(values: list[bytes]) -> None:
    if len(values) != 2 or not all(values):
        raise ValueError("the ssh-rsa key is damaged: it does not have an exponent and a modulus")
    exponent, modulus = (int.from_bytes(value, signed=True) for value in values)
    if exponent < 3 or modulus < 0 or not exponent & modulus & 1:
        raise ValueError("the ssh-rsa key is damaged: its numbers are not those of an RSA key")
    if not _SHORTEST_RSA <= modulus.bit_length() <= _LONGEST_RSA:
        what = f"the ssh-rsa key has {modulus.bit_length()} bits, {_SHORTEST_RSA} to {_LONGEST_RSA} are allowed"
        raise ValueError(f"{what}; create one with `ssh-keygen -t ed25519`")


def _split(data: bytes) -> Iterator[bytes]:
    """The strings of RFC 4251 5. Raises ValueError if the data ends within one."""
    while data:
        size = int.from_bytes(data[:4])
        if len(data) < 4 or size > len(data) - 4:
            raise ValueError("the key is damaged: it is incomplete")
        yield data[4 : 4 + size]
        data = data[4 + size :]
