"""The manager's signature: which key it uses, and what it says of its own event log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from orchestrator.audit.evidence import Subject
from orchestrator.daemon.evidence import CREDENTIAL, EvidenceSigner
from orchestrator.errors import HostError, LedgerError
from orchestrator.evidence import keys
from orchestrator.evidence.check import summarize
from orchestrator.evidence.document import SignedFile, parse_file
from orchestrator.guests.last_audit import AuditMemory
from orchestrator.hypervisor.guests import DomainText
from orchestrator.ledger import Ledger
from orchestrator.model.proof import Proof, Verdict
from tests.fakes.root import build_host

PROOF = Proof("core-smt", "host", Verdict.PASS, 0, "cores shared", ("read",))


class Domains:
    def read_text(self, uuid: UUID) -> DomainText:
        raise AssertionError(f"no guest runs, but {uuid} was read")

    def read_versions(self) -> dict[str, str]:
        return {}


@dataclass
class MeasuringAuditor:
    proofs: tuple[Proof, ...] = (PROOF,)
    measured: list[int] = field(default_factory=list)

    def measure(self, frames: int = 0, *, host_only: bool = False) -> tuple[tuple[()], tuple[Proof, ...]]:
        self.measured.append(frames)
        return (), self.proofs


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        opened.append_event("started", "web", "")
        yield opened


@pytest.fixture
def auditor() -> MeasuringAuditor:
    return MeasuringAuditor()


@pytest.fixture
def signer(tmp_path: Path, ledger: Ledger, auditor: MeasuringAuditor, monkeypatch: pytest.MonkeyPatch) -> EvidenceSigner:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    keys.create_key(tmp_path / "audit.key")
    (tmp_path / "credentials").mkdir()
    keys.create_key(tmp_path / "credentials" / CREDENTIAL)
    host = build_host(tmp_path / "host", "proc/sys/kernel/hostname = server-1")
    observed: Any = []
    return EvidenceSigner(
        auditor, Subject(host, Domains(), lambda: True), ledger, str(tmp_path / "audit.key"), observed.append,  # type: ignore[arg-type]
    )  # fmt: skip


def sign(signer: EvidenceSigner) -> SignedFile:
    return parse_file(signer.sign(7, "n-1"), "file")


def test_file_of_the_configuration_signs(signer: EvidenceSigner, auditor: MeasuringAuditor, tmp_path: Path) -> None:
    signed = sign(signer)
    keys.check_signature(signed, keys.load_public(tmp_path / "audit.key.pub"))
    assert (auditor.measured, signed.evidence["nonce"]) == ([7], "n-1")
    assert summarize(signed.evidence).status == 0


def test_signed_audit_is_remembered(signer: EvidenceSigner, ledger: Ledger) -> None:
    audits = AuditMemory(ledger)
    signed = sign(replace(signer, audits=audits))
    shown = audits.show()
    assert shown
    assert [proof.name for proof in shown.proofs] == [proof["name"] for proof in signed.evidence["proofs"]]


def test_credential_takes_precedence(signer: EvidenceSigner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    keys.check_signature(sign(signer), keys.load_public(tmp_path / "credentials" / f"{CREDENTIAL}.pub"))
    (tmp_path / "credentials" / CREDENTIAL).unlink()
    keys.check_signature(sign(signer), keys.load_public(tmp_path / "audit.key.pub"))


def test_key_is_checked_before_the_measurement(signer: EvidenceSigner, auditor: MeasuringAuditor, tmp_path: Path) -> None:
    (tmp_path / "audit.key").chmod(0o644)
    with pytest.raises(HostError, match="has mode 0644"):
        sign(signer)
    (tmp_path / "audit.key").unlink()
    with pytest.raises(HostError, match="cannot read the signing key .*audit.key: No such file"):
        sign(signer)
    assert auditor.measured == []


def test_newest_event_is_signed(signer: EvidenceSigner, ledger: Ledger) -> None:
    events = sign(signer).evidence["events"]
    head = ledger.event_head()
    assert (events["last"], events["hash"], events["faults"]) == (head.id, head.hash, [])


def test_broken_event_log_makes_the_evidence_fail(signer: EvidenceSigner, ledger: Ledger) -> None:
    with closing(sqlite3.connect(ledger.path)) as other, other:
        other.execute("DROP TRIGGER event_no_update")
        other.execute("UPDATE event SET who = 'forged'")
    assert summarize(sign(signer).evidence).status == 1


def test_value_without_a_canonical_form_is_one_error(signer: EvidenceSigner, auditor: MeasuringAuditor) -> None:
    auditor.proofs = (Proof("exits", "host", Verdict.PASS, float("nan"), "exits", ()),)
    with pytest.raises(LedgerError, match="cannot sign the evidence: it has the number nan"):
        sign(signer)
