"""What evidence says of host, software and guests; what cannot be read is null, with the reason."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field, replace
from errno import EACCES
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from orchestrator.audit.evidence import Subject, collect_evidence
from orchestrator.canonical import canonicalize
from orchestrator.errors import CommandError, HypervisorError
from orchestrator.evidence import keys
from orchestrator.evidence.document import parse_file
from orchestrator.host.measure import read_clock, read_kernel
from orchestrator.host.run import Completed
from orchestrator.hypervisor.guests import DomainText
from orchestrator.model.event import ChainReport
from orchestrator.model.proof import Proof, Verdict
from tests.fakes.root import FakeRoot, build_host
from tests.harness.audit_data import GUEST1, GUEST2
from tests.harness.evidence import KEY

CHAIN = ChainReport(3, 1, 3, "ab", 0, ())
PROOF = Proof("core-smt", "guest1", Verdict.PASS, 0, "cores shared", ("all read",), None, {"threads": 8})
NOTES = struct.pack("<III", 6, 4, 257) + b"Linux\0\0\0" + bytes(4) + struct.pack("<III", 4, 20, 3) + b"GNU\0" + bytes(range(20))


@dataclass
class Domains:
    xml: str = "<domain/>"
    files: tuple[tuple[str, str], ...] = (("kernel", "/boot/guest-kernel"),)
    error: HypervisorError | None = None
    asked: list[UUID] = field(default_factory=list)

    def read_text(self, uuid: UUID) -> DomainText:
        self.asked.append(uuid)
        if self.error:
            raise self.error
        return DomainText(self.xml, self.files)

    def read_versions(self) -> dict[str, str]:
        if self.error:
            raise self.error
        return {"libvirt": "11.3.0", "qemu": "10.0.2"}


@pytest.fixture
def host(tmp_path: Path) -> FakeRoot:
    host = build_host(tmp_path, "proc/sys/kernel/osrelease = 6.12.1\nproc/version = Linux 6.12.1\nproc/cmdline = quiet secret=1")
    host.add("proc/sys/kernel/random/boot_id", "boot-1")
    host.add("proc/sys/kernel/hostname", "server-1")
    host.add("etc/machine-id", "0123456789abcdef0123456789abcdef")
    host.add("boot/vmlinuz-6.12.1", "kernel")
    host.add("boot/guest-kernel", "guest kernel")
    host.add("sys/kernel/notes", "")
    (host.path / "sys/kernel/notes").write_bytes(NOTES)
    host.add("usr/bin/qemu", "emulator")
    for guest in (GUEST1, GUEST2):
        host.add_link(f"proc/{guest.pid}/exe", str(host.path / "usr/bin/qemu"))
    return host


def collect(host: FakeRoot, domains: Domains | None = None, *, clock: Any = lambda: True) -> dict[str, Any]:
    return collect_evidence(Subject(host, domains or Domains(), clock), (GUEST1, GUEST2), (PROOF,), CHAIN, "n-1")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_everything_is_identified(host: FakeRoot) -> None:
    evidence = collect(host)
    assert evidence["gaps"] == ["TPM: the host has no TPM 2.0, or no driver for it"]
    assert evidence["host"] | {"id": ""} == {"id": "", "name": "server-1", "boot": "boot-1", "tpm": "not measured"}
    assert len(evidence["host"]["id"]) == 32
    assert evidence["host"]["id"] != "0123456789abcdef0123456789abcdef", "the machine id is confidential"
    kernel = evidence["software"]["kernel"]
    assert (kernel["build_id"], kernel["file_sha256"]) == (bytes(range(20)).hex(), digest("kernel\n"))
    assert kernel["cmdline_sha256"] == digest("quiet secret=1")
    assert b"secret=1" not in canonicalize(evidence)
    guest = evidence["guests"][0]
    assert (guest["xml_sha256"], guest["qemu"]["sha256"]) == (digest("<domain/>"), digest("emulator\n"))
    assert guest["files"] == {"kernel": {"path": "/boot/guest-kernel", "sha256": digest("guest kernel\n")}}
    assert evidence["proofs"][0]["values"] == {"threads": 8}
    assert evidence["events"] == {"events": 3, "first": 1, "last": 3, "hash": "ab", "removed": 0, "faults": []}


def test_evidence_can_be_signed_and_read(host: FakeRoot) -> None:
    evidence = collect(host)
    assert parse_file(keys.sign(evidence, KEY), "file").evidence == evidence


def test_name_of_a_file_that_is_not_utf8_does_not_prevent_the_signature(host: FakeRoot) -> None:
    """An attacker in QEMU can open such a file, and the finding is then in the proof."""
    name = os.fsdecode(b"/tmp/\xff")
    proof = replace(PROOF, evidence=(f"open file {name}",), values={"label": name})
    evidence = collect_evidence(Subject(host, Domains(), lambda: True), (GUEST1,), (proof,), CHAIN, "n-1")
    (signed,) = parse_file(keys.sign(evidence, KEY), "file").evidence["proofs"]
    assert (signed["evidence"], signed["values"]) == ([r"open file /tmp/\udcff"], {"label": r"/tmp/\udcff"})


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("proc/sys/kernel/osrelease", ("software", "kernel")),
        ("sys/kernel/notes", ("software", "kernel")),
        ("proc/sys/kernel/random/boot_id", ("host", "boot")),
        ("proc/sys/kernel/hostname", ("host", "name")),
    ],
)
def test_fact_that_cannot_be_read_is_null_with_the_reason(host: FakeRoot, name: str, place: tuple[str, str]) -> None:
    host.read_errors[name] = EACCES
    evidence = collect(host)
    assert evidence[place[0]][place[1]] is None
    assert [gap for gap in evidence["gaps"] if name in gap]
    parse_file(keys.sign(evidence, KEY), "file")


def test_files_that_are_gone_are_null_with_the_reason(host: FakeRoot) -> None:
    (host.path / "boot/guest-kernel").unlink()
    (host.path / f"proc/{GUEST2.pid}/exe").unlink()
    evidence = collect(host)
    assert evidence["guests"][0]["files"]["kernel"]["sha256"] is None
    assert evidence["guests"][1]["qemu"] is None
    assert any(gap.startswith("QEMU of guest2: ") for gap in evidence["gaps"])


def test_libvirt_that_fails_leaves_the_rest(host: FakeRoot) -> None:
    evidence = collect(host, Domains(error=HypervisorError("connection lost")))
    assert evidence["guests"][0] | {"qemu": 0} == {
        "name": "guest1", "uuid": str(GUEST1.uuid), "pid": GUEST1.pid, "qemu": 0, "xml_sha256": None, "files": {},
    }  # fmt: skip
    assert "versions: connection lost" in evidence["gaps"]
    assert "libvirt" not in evidence["software"]


def test_clock_that_cannot_be_read_is_not_synchronised(host: FakeRoot) -> None:
    def fail() -> bool:
        raise CommandError("cannot run `timedatectl`")

    evidence = collect(host, clock=fail)
    assert evidence["clock"] == {"synchronised": None}
    assert "clock: cannot run `timedatectl`" in evidence["gaps"]


@pytest.mark.parametrize(("output", "expected"), [("yes\n", True), ("no\n", False)])
def test_clock_as_systemd_reports_it(output: str, expected: bool) -> None:
    asked = []

    def execute(words: Any) -> Completed:
        asked.append(words[0])
        return Completed(0, output, "")

    assert read_clock(execute) is expected
    assert asked == ["timedatectl"]


@pytest.mark.parametrize("output", ["", "maybe", "yes no"])
def test_unknown_answer_about_the_clock_is_an_error(output: str) -> None:
    with pytest.raises(CommandError, match="cannot parse the output of timedatectl"):
        read_clock(lambda _: Completed(0, output, ""))


@pytest.mark.parametrize("notes", [b"", b"\0" * 7, NOTES[:30], struct.pack("<III", 4, 20, 3)])
def test_kernel_without_a_build_id(host: FakeRoot, notes: bytes) -> None:
    (host.path / "sys/kernel/notes").write_bytes(notes)
    assert read_kernel(host).build_id == ""


def test_kernel_without_a_boot_file(host: FakeRoot) -> None:
    (host.path / "boot/vmlinuz-6.12.1").unlink()
    assert read_kernel(host) == replace(read_kernel(host), file="", file_sha256="")
