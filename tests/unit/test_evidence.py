"""Signed evidence: what its reader accepts, and each way in which it is refused."""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
import string
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.canonical import canonicalize
from orchestrator.cli.main import nohype
from orchestrator.errors import HostError, OrchestratorError, RequestError
from orchestrator.evidence import keys
from orchestrator.evidence.check import Expected, check_expected, summarize
from orchestrator.evidence.document import MAX_SIZE, EvidenceError, parse_file
from tests.harness.evidence import KEY, make_evidence

NOW = datetime(2026, 11, 26, 12, 5, tzinfo=UTC)
SIGNED = keys.sign(make_evidence(), KEY)
PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def status(call: Callable[[], object]) -> int:
    """0 if accepted."""
    try:
        call()
    except EvidenceError as error:
        return error.status
    return 0


def accept(data: bytes) -> None:
    keys.check_signature(parse_file(data, "file"), KEY.public_key())


def test_signed_evidence_is_accepted() -> None:
    accept(SIGNED)


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_change_of_one_byte_is_refused(place: int, change: int) -> None:
    altered = bytearray(SIGNED)
    altered[place] ^= change
    assert status(lambda: accept(bytes(altered))) in (4, 5)


def test_change_of_each_byte_is_refused() -> None:
    for place in range(len(SIGNED)):
        assert status(lambda place=place: accept(SIGNED[:place] + bytes([SIGNED[place] ^ 1]) + SIGNED[place + 1 :]))  # type: ignore[misc]


@given(st.integers(0, len(SIGNED) - 1))
def test_truncated_file_is_refused(size: int) -> None:
    assert status(lambda: accept(SIGNED[:size])) == 4


@given(st.binary(max_size=300))
def test_any_other_file_is_refused(data: bytes) -> None:
    assert status(lambda: accept(data)) == 4
    assert status(lambda: accept(SIGNED + data + b"\n")) == 4


def respell(text: str) -> str:
    """Other Base64 of the same bytes: four bits of the last letter before the padding are not used."""
    letters = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    other = f"{text[:-3]}{letters[letters.index(text[-3]) ^ 1]}=="
    assert base64.b64decode(other, validate=True) == base64.b64decode(text)
    return other


def rewritten(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(SIGNED)
    change(document)
    return canonicalize(document) + b"\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["evidence"]["proofs"][0].update(verdict="fail"), 5),
        (lambda d: d["evidence"].update(extra=1), 5),
        (lambda d: d["evidence"]["proofs"].pop(), 5),
        (lambda d: d.update(signature=""), 5),
        (lambda d: d.update(signature="!"), 5),
        (lambda d: d.update(signature=base64.b64encode(bytes(64)).decode()), 5),
        (lambda d: d.update(signature=d["signature"] + "===="), 5),
        (lambda d: d.update(signature=respell(d["signature"])), 5),
        (lambda d: d.update(key="00" * 32), 5),
        (lambda d: d.update(more=1), 4),
        (lambda d: d.pop("signature"), 4),
        (lambda d: d.update(evidence=[]), 4),
        (lambda d: d["evidence"].update(format="nohype-evidence/2"), 4),
        (lambda d: d["evidence"].update(format=["x"] * 1000), 4),
        (lambda d: d["evidence"].pop("clock"), 4),
        (lambda d: d["evidence"].update(proofs=[1]), 4),
        (lambda d: d["evidence"]["proofs"][0].update(verdict="passed"), 4),
        (lambda d: d["evidence"]["proofs"][0].pop("subject"), 4),
        (lambda d: d["evidence"]["proofs"][0].pop("figure"), 4),
        (lambda d: d["evidence"]["proofs"][0].update(figure="9"), 4),
        (lambda d: d["evidence"]["proofs"][0].update(evidence=[1]), 4),
        (lambda d: d["evidence"].update(events={}), 4),
        (lambda d: d["evidence"]["events"].update(last="9"), 4),
        (lambda d: d["evidence"]["events"].update(last=True), 4),
        (lambda d: d["evidence"]["events"].update(last=-1), 4),
        (lambda d: d["evidence"]["events"].update(last=10**18), 4),
        (lambda d: d["evidence"]["events"].update(hash=None), 4),
        (lambda d: d["evidence"]["events"].update(faults="none"), 4),
        (lambda d: d["evidence"]["events"].update(faults=[1]), 4),
        (lambda d: d["evidence"].update(guests=[1]), 4),
        (lambda d: d["evidence"].update(gaps=7), 4),
        (lambda d: d["evidence"].update(gaps=[7]), 4),
    ],
)
def test_altered_document_is_refused(change: Callable[[dict[str, Any]], object], expected: int) -> None:
    assert status(lambda: accept(rewritten(change))) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 1_000_000 + b"\n",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
        SIGNED.replace(b'"created"', b'"created":"x","created"', 1),
        SIGNED.replace(b'"pid":7', b'"pid":NaN', 1),
        SIGNED.replace(b'"pid":7', b'"pid":1e999', 1),
        SIGNED.replace(b'"pid":7', b'"pid":7.0', 1),
        SIGNED.replace(b'"pid":7', b'"pid": 7', 1),
        SIGNED[:-1] + b" \n",
        SIGNED[:-1],
        b"\xef\xbb\xbf" + SIGNED,
        SIGNED.replace(b'"server-1"', b'"\xff"', 1),
    ],
)
def test_hostile_json_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(EvidenceError) as caught:
        accept(data)
    assert caught.value.status == 4
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_signature_of_another_format_is_refused() -> None:
    """The format precedes the signed bytes: a signature over the same JSON for another purpose is not valid."""
    evidence = make_evidence()
    document = json.loads(SIGNED)
    document["signature"] = base64.b64encode(KEY.sign(canonicalize(evidence))).decode()
    assert status(lambda: accept(canonicalize(document) + b"\n")) == 5


def test_other_key_is_named() -> None:
    other = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(EvidenceError, match=f"another key: {keys.identify(KEY.public_key())}, expected {keys.identify(other)}"):
        keys.check_signature(parse_file(SIGNED, "file"), other)


@pytest.mark.parametrize(
    ("expected", "fields", "result"),
    [
        (Expected(), {}, 0),
        (Expected(host="aa" * 16, boot="b-1", nonce="n-1", max_age=600), {}, 0),
        (Expected(host="bb" * 16), {}, 6),
        (Expected(boot="b-2"), {}, 6),
        (Expected(nonce="n-2"), {}, 6),
        (Expected(nonce=""), {}, 6),
        (Expected(host="aa"), {"host": {"id": None}}, 6),
        (Expected(max_age=299), {}, 7),
        (Expected(max_age=301), {}, 0),
        (Expected(max_age=1e9), {"created": (NOW + timedelta(minutes=2)).isoformat()}, 7),
        (Expected(max_age=1e9), {"created": (NOW + timedelta(seconds=30)).isoformat()}, 0),
        (Expected(max_age=1e9), {"created": "yesterday"}, 7),
        (Expected(max_age=1e9), {"created": "2026-11-26T12:00:00"}, 7),
        (Expected(max_age=1e9), {"created": "0001-01-01T00:00:00+23:59"}, 7),
        (Expected(), {"clock": {"synchronised": False}}, 7),
        (Expected(), {"clock": {"synchronised": None}}, 7),
        (Expected(), {"clock": {}}, 7),
        (Expected(), {"clock": {"synchronised": 1}}, 7),
        (Expected(any_clock=True), {"clock": {"synchronised": False}}, 0),
    ],
)
def test_evidence_that_is_not_the_expected_is_refused(expected: Expected, fields: dict[str, Any], result: int) -> None:
    evidence = make_evidence(**fields)
    assert status(lambda: check_expected(evidence, expected, NOW)) == result


@pytest.mark.parametrize(
    ("verdicts", "events", "result", "text"),
    [
        (("pass", "pass", "pass"), [], 0, "3 pass, 0 fail, 0 not measured"),
        (("pass", "pass", "not measured"), [], 8, "2 pass, 0 fail, 1 not measured"),
        (("fail", "pass", "not measured"), [], 1, "1 pass, 1 fail, 1 not measured"),
        (("pass", "pass", "pass"), ["event 4 does not match its hash"], 1, "3 pass, 0 fail, 0 not measured"),
        (("pass", "pass", "pass"), None, 1, "3 pass, 0 fail, 0 not measured"),
    ],
)
def test_summary_is_never_green_for_what_was_not_measured(
    verdicts: tuple[str, ...], events: list[str] | None, result: int, text: str
) -> None:
    evidence = make_evidence(verdicts=verdicts)
    evidence["events"]["faults"] = events
    assert (summarize(evidence).status, str(summarize(evidence))) == (result, text)


def test_evidence_without_proofs_is_not_green() -> None:
    assert summarize(make_evidence(proofs=[])).status == 8


# Keys in files


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_created_key_signs_and_its_public_half_verifies(tmp_path: Path) -> None:
    public, name = keys.create_key(tmp_path / "audit.key")
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    signed = keys.sign(make_evidence(), keys.load_private(tmp_path / "audit.key"))
    keys.check_signature(parse_file(signed, "file"), keys.load_public(public))
    assert json.loads(signed)["key"] == name


@pytest.mark.parametrize("existing", ["audit.key", "audit.key.pub"])
def test_existing_key_is_not_replaced(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(RequestError, match=f"cannot create .*{existing}: File exists"):
        keys.create_key(tmp_path / "audit.key")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(existing, "mine")]


def export(key: Any, *, passphrase: bytes | None = None) -> bytes:
    secret = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret)
    return data


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610, 0o644])
def test_key_that_others_can_access_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", export(KEY), mode)
    with pytest.raises(HostError, match=f"has mode {mode:04o}, expected 0600") as caught:
        keys.load_private(path)
    assert "chmod 600" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "key", export(KEY))
    os.chown(path, 65534, -1)
    with pytest.raises(HostError, match="belongs to user 65534, expected 0"):
        keys.load_private(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        export(generate_private_key(SECP256R1())),
        export(KEY, passphrase=b"secret"),
        PEM,
        os.urandom(100),
    ],
    ids=["empty", "damaged", "another algorithm", "with a passphrase", "a public key", "random"],
)
def test_file_without_an_ed25519_key_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(HostError, match="is not an Ed25519 private key in PEM without passphrase"):
        keys.load_private(write(tmp_path / "key", data))


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe"])
def test_key_that_is_not_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path, 0o600)
    with pytest.raises(HostError, match="cannot read the signing key|is not a regular file"):
        keys.load_private(path)


@pytest.mark.parametrize(
    "data",
    [b"", export(KEY), generate_private_key(SECP256R1()).public_key()],
    ids=["empty", "a private key", "another algorithm"],
)
def test_file_without_a_public_key_is_refused(tmp_path: Path, data: Any) -> None:
    text = data if isinstance(data, bytes) else data.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(RequestError, match="is not an Ed25519 public key"):
        keys.load_public(write(tmp_path / "key", text))


# The command


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(nohype, [str(word) for word in words], standalone_mode=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "evidence.json", SIGNED), write(tmp_path / "key.pub", PEM)


def test_verify_prints_the_summary(files: tuple[Path, Path]) -> None:
    result = run("audit", "verify", files[0], "--key", files[1])
    assert result.return_value == 0, result.exception
    assert result.output.splitlines()[-1] == "proofs: 3 pass, 0 fail, 0 not measured"
    shown = json.loads(run("audit", "verify", files[0], "--key", files[1], "--json").output)
    assert shown["proofs"] == {"pass": 3}


@pytest.mark.parametrize(
    ("words", "result"),
    [
        (["--nonce", "other"], 6),
        (["--boot", "other"], 6),
        (["--host", "other"], 6),
        (["--nonce", ""], 6),
        (["--boot", ""], 6),
        (["--host", ""], 6),
        (["--max-age", "1"], 7),
        (["--nonce", "n-1", "--boot", "b-1", "--host", "aa" * 16], None),
    ],
)
def test_verify_compares_with_what_is_expected(files: tuple[Path, Path], words: list[str], result: int | None) -> None:
    error = run("audit", "verify", files[0], "--key", files[1], *words).exception
    assert getattr(error, "status", None) == result


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "huge"])
def test_verify_refuses_what_is_not_a_file(files: tuple[Path, Path], kind: str) -> None:
    path = files[0]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(MAX_SIZE + 1)
    error = run("audit", "verify", path, "--key", files[1]).exception
    assert isinstance(error, EvidenceError)
    assert error.status == 4


def test_verify_names_what_was_not_measured(files: tuple[Path, Path]) -> None:
    files[0].write_bytes(keys.sign(make_evidence(verdicts=("pass", "pass", "not measured")), KEY))
    result = run("audit", "verify", files[0], "--key", files[1])
    assert result.return_value == 8
    assert "vepa   host     NOT MEASURED" in result.output
    assert result.output.splitlines()[-1] == "proofs: 2 pass, 0 fail, 1 not measured"


def test_keygen_creates_two_files(tmp_path: Path) -> None:
    assert run("audit", "keygen", tmp_path / "k").exception is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "k.pub"]
    assert isinstance(run("audit", "keygen", tmp_path / "k").exception, OrchestratorError)


@pytest.mark.parametrize("path", ["/", "", ".", "absent/k"])
def test_keygen_refuses_what_cannot_be_a_file(path: str) -> None:
    error = run("audit", "keygen", path).exception
    assert isinstance(error, RequestError)
    assert "cannot create" in error.message


def test_key_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        error = run("audit", "keygen", tmp_path / "k").exception
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "File too large" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--frames", "5"], ["--sign", "x"], ["--json"], ["--html", "x"]])
def test_options_of_a_measurement_are_refused_before_other_commands(files: tuple[Path, Path], words: list[str]) -> None:
    error = run("audit", *words, "verify", files[0], "--key", files[1]).exception
    assert f"{words[0]}: not allowed with `nohype audit verify`" in str(getattr(error, "message", error))


@pytest.mark.parametrize("command", ["verify", "keygen"])
def test_missing_package_is_one_error(monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path], command: str) -> None:
    for name in [
        name for name in sys.modules if name.startswith("orchestrator.evidence.keys") or name == "orchestrator.cli.evidence"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    error = run("audit", command, files[0]).exception
    assert isinstance(error, OrchestratorError)
    assert error.message == f"`nohype audit {command}` requires the Python package cryptography"
