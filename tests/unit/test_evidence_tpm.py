"""Quotes in evidence: authentic ones are accepted, and each fault has its own message and exit status."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from orchestrator.audit.evidence import Subject, collect_evidence
from orchestrator.cli.main import nohype
from orchestrator.errors import HostError, RequestError
from orchestrator.evidence.diff import compare
from orchestrator.evidence.document import EvidenceError, Rejected, bind_quote
from orchestrator.evidence.keys import sign
from orchestrator.evidence.tpm import check_quote, find_tpm_key, load_tpm_key
from orchestrator.host.root import HostRoot
from orchestrator.host.tpm import make_quote
from orchestrator.hypervisor.guests import DomainText
from orchestrator.model.event import ChainReport
from orchestrator.model.plain import to_plain
from orchestrator.model.tpm import PCRS, TpmQuote
from tests.fakes.root import build_host
from tests.harness.evidence import KEY, make_evidence
from tests.harness.tpm import FakeTpm

TPM = FakeTpm()
PUBLIC = TPM.key.public_key()


def quoted(**fields: Any) -> dict[str, Any]:
    """Evidence as a host with this TPM makes it."""
    evidence = make_evidence(**fields)
    evidence["host"]["tpm"] = to_plain(make_quote(TPM, bind_quote(evidence)))
    return evidence


def reject(evidence: dict[str, Any], why: Rejected, words: str, key: Any = PUBLIC, pcrs: dict[int, str] | None = None) -> None:
    with pytest.raises(EvidenceError, match=words) as caught:
        check_quote(evidence, key, pcrs or {})
    assert caught.value.status == why


def test_quote_of_the_evidence_is_accepted() -> None:
    checked = check_quote(quoted(), PUBLIC, {0: "00" * 32, 15: "0f" * 32})
    assert (len(checked.pcrs), checked.resets) == (15, 7)


def test_quote_of_other_evidence_is_rejected() -> None:
    """A replayed quote, in evidence that the signing key has signed anew: also for another nonce of the reader."""
    for change in ({"nonce": "n-2"}, {"created": "2026-11-27T12:00:00.000+00:00"}, {"gaps": ["x"]}):
        evidence = {**quoted(), **change}
        reject(evidence, Rejected.OTHER, "made for other evidence")


def test_evidence_of_a_failed_proof_with_the_quote_of_a_passed_one_is_rejected() -> None:
    evidence = quoted()
    evidence["proofs"][0]["verdict"] = "fail"
    reject(evidence, Rejected.OTHER, "made for other evidence")


def test_key_of_another_tpm_is_rejected() -> None:
    reject(quoted(), Rejected.SIGNATURE, "another TPM or key", FakeTpm().key.public_key())


def change(**fields: Callable[[Any], Any]) -> dict[str, Any]:
    evidence = quoted()
    for name, work in fields.items():
        evidence["host"]["tpm"][name] = work(evidence["host"]["tpm"][name])
    return evidence


def flip(at: int) -> Callable[[str], str]:
    def work(text: str) -> str:
        data = bytearray(base64.b64decode(text))
        data[at] ^= 1
        return base64.b64encode(bytes(data)).decode()

    return work


@pytest.mark.parametrize("at", [0, 5, 10, 45, 80, 100, -1])
def test_altered_quote_is_rejected(at: int) -> None:
    reject(change(quoted=flip(at)), Rejected.SIGNATURE, "the quote was altered")


@pytest.mark.parametrize("at", [0, 5, 40, -1])
def test_altered_signature_is_rejected(at: int) -> None:
    reject(change(signature=flip(at)), Rejected.SIGNATURE, "the quote was altered")


@pytest.mark.parametrize(
    "work",
    [lambda pcrs: {**pcrs, "7": "ff" * 32}, lambda pcrs: {**pcrs, "10": "00" * 32},
     lambda pcrs: {name: value for name, value in pcrs.items() if name != "3"}, lambda _: {}],
    ids=["another value", "one more", "one less", "none"],
)  # fmt: skip
def test_registers_that_were_not_quoted_are_rejected(work: Callable[[Any], Any]) -> None:
    reject(change(pcrs=work), Rejected.SIGNATURE, "not those that the TPM has quoted")


@pytest.mark.parametrize("name", ["00", "-1", "٣", "1e1", "100", ""])
def test_register_in_another_form_is_rejected(name: str) -> None:
    reject(change(pcrs=lambda pcrs: {**pcrs, name: "00" * 32}), Rejected.FORMAT, "register that cannot be read")


@pytest.mark.parametrize("value", ["", "00", "0F" * 32, "zz" * 32])
def test_value_in_another_form_is_rejected(value: str) -> None:
    reject(change(pcrs=lambda pcrs: {**pcrs, "15": value}), Rejected.FORMAT, "register that cannot be read")


@pytest.mark.parametrize("field", ["quoted", "signature", "key"])
@pytest.mark.parametrize("text", ["", "not base64!", "QQ", "QR==", 7, None])
def test_field_that_is_not_base64_is_rejected(field: str, text: Any) -> None:
    reject(change(**{field: lambda _: text}), Rejected.FORMAT, "quote")


def test_key_on_another_curve_is_rejected() -> None:
    other = generate_private_key(SECP384R1()).public_key()
    text = base64.b64encode(other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    reject(change(key=lambda _: text), Rejected.FORMAT, "curve P-256")


@pytest.mark.parametrize("size", [1, 6, 8, 50, 100, 120])
def test_signed_text_that_is_no_quote_is_rejected(size: int) -> None:
    """Signed by the right key: a key that signs other things, too."""
    evidence = quoted()
    tpm = evidence["host"]["tpm"]
    text = base64.b64decode(tpm["quoted"])[:size]
    tpm["quoted"], tpm["signature"] = (base64.b64encode(part).decode() for part in (text, TPM.key.sign(text, ECDSA(SHA256()))))
    reject(evidence, Rejected.FORMAT, "quote")


def test_another_register_than_expected_is_rejected() -> None:
    reject(quoted(), Rejected.OTHER, "PCR 4 is 0404.*, expected aaaa", pcrs={4: "aa" * 32})
    reject(quoted(), Rejected.OTHER, "PCR 10 is not quoted, expected", pcrs={10: "0a" * 32})


def test_evidence_without_a_quote_is_rejected_with_the_reason() -> None:
    reject(make_evidence(), Rejected.OTHER, "no quote of a TPM")
    reject(make_evidence(gaps=["TPM: the host has no TPM 2.0"]), Rejected.OTHER, "the host has no TPM 2.0")


class Domains:
    def read_text(self, uuid: UUID) -> DomainText:
        raise AssertionError(f"no guest runs, but {uuid} was read")

    def read_versions(self) -> dict[str, str]:
        return {}


def collect(folder: Path, read: Callable[[HostRoot, bytes], TpmQuote]) -> dict[str, Any]:
    subject = Subject(build_host(folder, "proc/version = x"), Domains(), lambda: True, read)
    return collect_evidence(subject, (), (), ChainReport(3, 1, 3, "ab", 0, ()), "n-1")


def test_host_collects_a_quote_of_all_other_evidence(tmp_path: Path) -> None:
    evidence = collect(tmp_path, lambda _, nonce: make_quote(TPM, nonce))
    check_quote(evidence, PUBLIC, {})
    assert not [gap for gap in evidence["gaps"] if gap.startswith("TPM")]


def test_host_whose_tpm_refuses_says_why(tmp_path: Path) -> None:
    def refuse(_host: HostRoot, _nonce: bytes) -> TpmQuote:
        raise HostError("the TPM was busy for 10 s")

    evidence = collect(tmp_path, refuse)
    assert evidence["host"]["tpm"] == "not measured"
    assert "TPM: the TPM was busy for 10 s" in evidence["gaps"]


def test_two_quotes_differ_only_in_registers() -> None:
    first, second = quoted(), quoted(nonce="n-2")
    assert compare(first, second) == ()
    second["host"]["tpm"]["pcrs"]["4"] = "ff" * 32
    assert compare(first, second) == (("host tpm pcrs 4", "04" * 32, "ff" * 32),)


# The commands.


def write(folder: Path, evidence: dict[str, Any]) -> tuple[str, ...]:
    """The words of `verify` for the file."""
    (folder / "evidence").write_bytes(sign(evidence, KEY))
    (folder / "key.pub").write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return "audit", "verify", str(folder / "evidence"), "--key", str(folder / "key.pub")


def run(*words: str) -> Result:
    return CliRunner().invoke(nohype, list(words), standalone_mode=False)


def status(result: Result) -> int:
    return int(getattr(result.exception, "status", result.return_value))


def test_key_of_own_evidence_verifies_later_evidence(tmp_path: Path) -> None:
    verify = write(tmp_path, quoted())
    assert run("audit", "tpm-key", str(tmp_path / "evidence"), str(tmp_path / "tpm.pub")).exception is None
    assert load_tpm_key(tmp_path / "tpm.pub").public_numbers() == PUBLIC.public_numbers()
    result = run(*verify, "--tpm-key", str(tmp_path / "tpm.pub"), "--pcr", f"4={'04' * 32}")
    assert (status(result), "TPM quote valid (key " in result.output) == (0, True)
    assert status(run(*verify, "--tpm-key", str(tmp_path / "tpm.pub"), "--pcr", f"4={'05' * 32}")) == 6
    assert isinstance(run("audit", "tpm-key", str(tmp_path / "evidence"), str(tmp_path / "tpm.pub")).exception, RequestError)


def test_quote_that_is_not_verified_is_never_green(tmp_path: Path) -> None:
    verify = write(tmp_path, quoted())
    result = run(*verify)
    assert (status(result), "TPM quote not verified: give --tpm-key" in result.output) == (8, True)
    assert json.loads(run(*verify, "--json").output)["tpm"] == "quote not verified: give --tpm-key"
    assert status(run(*write(tmp_path, quoted(verdicts=("pass", "fail", "pass"))))) == 1


def test_evidence_of_a_host_without_a_tpm_is_still_accepted(tmp_path: Path) -> None:
    result = run(*write(tmp_path, make_evidence()))
    assert (status(result), "TPM not measured" in result.output) == (0, True)


def test_missing_quote_is_rejected_if_a_key_is_given(tmp_path: Path) -> None:
    (tmp_path / "tpm.pub").write_bytes(find_tpm_key(quoted()))
    assert status(run(*write(tmp_path, make_evidence()), "--tpm-key", str(tmp_path / "tpm.pub"))) == 6


@pytest.mark.parametrize(
    "data", [b"", b"-----BEGIN PUBLIC KEY-----\n", KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)]
)
def test_file_that_is_no_attestation_key_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tpm.pub").write_bytes(data)
    with pytest.raises(RequestError, match="not a public key on the curve P-256"):
        load_tpm_key(tmp_path / "tpm.pub")
    with pytest.raises(RequestError, match="cannot read the attestation key"):
        load_tpm_key(tmp_path / "missing")


@pytest.mark.parametrize("text", ["4", "4=", "4=zz", f"=%s{'00' * 32}", f"-1={'00' * 32}", f"4={'00' * 31}"])
def test_register_on_the_command_line_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tpm.pub").write_bytes(find_tpm_key(quoted()))
    result = run(*write(tmp_path, quoted()), "--tpm-key", str(tmp_path / "tpm.pub"), "--pcr", text)
    assert "is not NUMBER=HEX" in str(result.exception)


def test_register_without_a_key_is_refused(tmp_path: Path) -> None:
    assert "--pcr requires --tpm-key" in str(run(*write(tmp_path, quoted()), "--pcr", f"4={'04' * 32}").exception)


@pytest.mark.parametrize("kept", [(), (0,), (*range(10),), (16, 23), tuple(number for number in PCRS if number != 14)])
def test_quote_that_leaves_out_a_register_is_rejected(kept: tuple[int, ...]) -> None:
    """Made by the TPM itself: any program on the host with its rights can ask for it."""
    evidence = make_evidence()
    evidence["host"]["tpm"] = to_plain(quote_registers(kept, bind_quote(evidence)))
    reject(evidence, Rejected.OTHER, "leaves out PCR .*14")


def quote_registers(numbers: tuple[int, ...], nonce: bytes) -> TpmQuote:
    """As `make_quote`, of these registers only."""
    whole = make_quote(TPM, nonce)
    data = base64.b64decode(whole.quoted)
    digest = hashlib.sha256(b"".join(TPM.pcrs[number] for number in numbers)).digest()
    bits = sum(1 << number for number in numbers).to_bytes(3, "little")
    data = data[:-37] + bits + data[-34:-32] + digest
    signature = TPM.key.sign(data, ECDSA(SHA256()))
    pcrs = {str(number): TPM.pcrs[number].hex() for number in numbers}
    return TpmQuote(whole.key, base64.b64encode(data).decode(), base64.b64encode(signature).decode(), pcrs)


@pytest.mark.parametrize("value", ["quote valid (key 77ab), 15 registers, 12 resets", ["quote valid"], None, True, 7])
def test_evidence_cannot_claim_that_its_quote_is_valid(tmp_path: Path, value: Any) -> None:
    evidence = make_evidence()
    evidence["host"]["tpm"] = value
    result = run(*write(tmp_path, evidence))
    assert "TPM not measured\n" in result.output
    assert "quote valid" not in result.output


@pytest.mark.parametrize("field", ["id", "name", "boot"])
def test_text_of_the_evidence_begins_no_line(tmp_path: Path, field: str) -> None:
    evidence = make_evidence(created="x\nproofs: 9 pass", events={"last": 3, "hash": "33", "faults": ["y\nproofs: 9 pass"]})
    evidence["host"][field] = "x\nTPM quote valid"
    output = run(*write(tmp_path, evidence)).output
    assert [line.partition(" ")[0] for line in output.splitlines()] == ["signature", "host", "TPM", "event", "proofs:"]


def test_two_values_of_one_register_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tpm.pub").write_bytes(find_tpm_key(quoted()))
    verify = (*write(tmp_path, quoted()), "--tpm-key", str(tmp_path / "tpm.pub"), "--pcr", f"4={'04' * 32}")
    assert "register 4 has two values" in str(run(*verify, "--pcr", f"4={'05' * 32}").exception)
    assert status(run(*verify, "--pcr", f"4={'04' * 32}")) == 0
