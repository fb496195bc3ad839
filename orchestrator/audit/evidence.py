"""Evidence: the proofs of an audit with what identifies host, software and guests, as plain JSON types."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from orchestrator import __version__
from orchestrator.errors import OrchestratorError
from orchestrator.evidence.document import FORMAT, bind_quote
from orchestrator.host.machine_id import read_host_id
from orchestrator.host.measure import find_program, hash_file, hash_program, read_clock, read_host_name, read_kernel
from orchestrator.host.processes import read_boot_id
from orchestrator.host.root import HostRoot
from orchestrator.host.tpm import read_quote
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.hypervisor.guests import DomainText
from orchestrator.model.event import ChainReport, utc_now
from orchestrator.model.plain import to_plain
from orchestrator.model.proof import Proof
from orchestrator.model.tpm import TpmQuote

TPM = "not measured"
"""The value without a quote."""


class Domains(Protocol):
    """The part of libvirt that evidence needs."""

    def read_text(self, uuid: UUID) -> DomainText: ...
    def read_versions(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Subject:
    """What evidence is about. ``read_clock``: whether the clock is synchronised. ``read_quote``: with a nonce."""

    host: HostRoot
    domains: Domains
    read_clock: Callable[[], bool] = read_clock
    read_quote: Callable[[HostRoot, bytes], TpmQuote] = read_quote


def collect_evidence(
    subject: Subject, guests: Iterable[RunningGuest], proofs: Iterable[Proof], chain: ChainReport, nonce: str
) -> dict[str, Any]:
    """A fact that cannot be read is null, and `gaps` has the reason. Raises ValueError if a value has no canonical form."""
    gaps: list[str] = []

    def attempt(what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except OrchestratorError as error:
            gaps.append(f"{what}: {error.message}")
            return None

    host = subject.host
    programs: dict[str, str] = {}
    evidence = {
        "format": FORMAT,
        "created": utc_now(),
        "nonce": nonce,
        "host": {
            "id": attempt("host id", lambda: read_host_id(host)),
            "name": attempt("host name", lambda: read_host_name(host)),
            "boot": attempt("boot id", lambda: read_boot_id(host)),
        },
        "clock": {"synchronised": attempt("clock", subject.read_clock)},
        "software": {
            "nohype": __version__,
            "kernel": attempt("kernel", lambda: to_plain(read_kernel(host))),
            **(attempt("versions", subject.domains.read_versions) or {}),
        },
        "guests": [_describe(subject, guest, programs, attempt) for guest in guests],
        "proofs": [to_plain(proof) for proof in proofs],
        "events": {name: value for name, value in to_plain(chain).items() if name != "at"},
    }
    escaped: dict[str, Any] = _escape({**evidence, "gaps": gaps})
    # Last: the quote repeats a hash of all other evidence.
    quote = attempt("TPM", lambda: to_plain(subject.read_quote(host, bind_quote(escaped))))
    escaped["host"]["tpm"] = quote or TPM
    return {**escaped, "gaps": _escape(gaps)}


def _escape(value: Any) -> Any:
    """Shows bytes of file names that are not UTF-8 as `\\udcff`. Any process can open such a file, and no JSON can have them."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list | tuple) else value


def _describe(
    subject: Subject, guest: RunningGuest, programs: dict[str, str], attempt: Callable[[str, Callable[[], Any]], Any]
) -> dict[str, Any]:
    """``programs``: hashes by path; QEMU has 30 MB, and guests share it."""
    text: DomainText | None = attempt(f"domain of {guest.name}", lambda: subject.domains.read_text(guest.uuid))
    files = {
        role: {"path": path, "sha256": attempt(f"{role} of {guest.name}", partial(hash_file, subject.host, path[1:]))}
        for role, path in (text.files if text else ())
    }

    def hash_qemu() -> dict[str, str]:
        path = find_program(subject.host, guest.pid)
        # Two replaced files of one path may differ.
        if path not in programs or path.endswith(" (deleted)"):
            programs[path] = hash_program(subject.host, guest.pid)
        return {"path": path, "sha256": programs[path]}

    return {
        "name": guest.name,
        "uuid": str(guest.uuid),
        "pid": guest.pid,
        "qemu": attempt(f"QEMU of {guest.name}", hash_qemu),
        "xml_sha256": hashlib.sha256(text.xml.encode()).hexdigest() if text else None,
        "files": files,
    }
