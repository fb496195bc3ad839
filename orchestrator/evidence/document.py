"""The evidence file: canonical JSON with a signature. A file is read strictly, because its author need not be trusted.

{"evidence": {...}, "key": SHA-256 of the public key, "signature": Ed25519 in Base64} and a line feed
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from orchestrator.canonical import canonicalize, parse_canonical
from orchestrator.errors import OrchestratorError

FORMAT = "nohype-evidence/1"
MAX_SIZE = 16 << 20
"""Bytes of a file; a host with 100 guests needs 1 MB."""

_FIELDS: Mapping[str, type] = {"evidence": dict, "key": str, "signature": str}
_PARTS: Mapping[str, type] = {
    "format": str, "created": str, "nonce": str, "host": dict, "clock": dict, "software": dict, "guests": list, "proofs": list,
    "events": dict,
}  # fmt: skip
_PROOF: Mapping[str, type] = {"name": str, "subject": str, "verdict": str, "unit": str, "evidence": list, "values": dict}
_EVENTS: Mapping[str, type] = {"last": int, "hash": str, "faults": list}
_VERDICTS = ("pass", "fail", "not measured")


class Rejected(IntEnum):
    """Why a file was not accepted. The values are exit statuses of `nohype audit verify`."""

    FORMAT = 4
    SIGNATURE = 5
    OTHER = 6  # of another host, boot or request
    TIME = 7


class EvidenceError(OrchestratorError):
    code = "evidence"

    def __init__(self, why: Rejected, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = int(why)


@dataclass(frozen=True)
class SignedFile:
    evidence: dict[str, Any]
    key: str
    signature: str

    @property
    def message(self) -> bytes:
        return build_message(self.evidence)


def build_message(evidence: Mapping[str, Any]) -> bytes:
    """The bytes that are signed. The format precedes them, so that no signature of another format is valid for it."""
    return FORMAT.encode() + b"\n" + canonicalize(dict(evidence))


def bind_quote(evidence: Mapping[str, Any]) -> bytes:
    """What a TPM repeats in its quote: a hash of all evidence except the quote, so of the reader's nonce, too."""
    host = {name: value for name, value in evidence["host"].items() if name != "tpm"}
    return hashlib.sha256(f"{FORMAT} tpm\n".encode() + canonicalize({**evidence, "host": host})).digest()


def read_file(path: Path) -> SignedFile:
    """Raises EvidenceError if the file cannot be read or is not evidence. The signature is not verified."""
    return parse_file(_read_bytes(path), str(path))


def parse_file(data: bytes, name: str) -> SignedFile:
    """The file must be exactly what `nohype audit --sign` wrote, so a change of any byte is found."""
    hint = "use the file as `nohype audit --sign` wrote it"
    if not data.endswith(b"\n"):
        raise EvidenceError(Rejected.FORMAT, f"{name} is not evidence: it is truncated, its last line has no end", hint)
    try:
        value = parse_canonical(data[:-1])
        _check_fields(value, _FIELDS, "the file")
        evidence = value["evidence"]
        if evidence.get("format") != FORMAT:
            raise ValueError(f"its format is {evidence.get('format')!r:.80}, expected {FORMAT!r}")
        _check_fields(evidence, _PARTS, "evidence")
        _check_events(evidence["events"])
        if not all(isinstance(guest, dict) for guest in evidence["guests"]):
            raise ValueError("a guest is not an object")
        _check_texts(evidence.get("gaps", []), "gaps")
        for index, proof in enumerate(evidence["proofs"]):
            _check_fields(proof, _PROOF, f"proof {index}", exactly=False)
            _check_proof(proof, f"proof {index}")
    except ValueError as error:
        raise EvidenceError(Rejected.FORMAT, f"{name} is not evidence: {error}", hint) from None
    return SignedFile(evidence, value["key"], value["signature"])


def write_signed(evidence: Mapping[str, Any], key: str, signature: str) -> bytes:
    return canonicalize({"evidence": dict(evidence), "key": key, "signature": signature}) + b"\n"


def _check_fields(value: object, fields: Mapping[str, type], what: str, *, exactly: bool = True) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{what} has no field {name} of type {kind.__name__}")
    if exactly and fields is _FIELDS and (more := sorted(value.keys() - fields.keys())):
        raise ValueError(f"{what} has the unknown field {more[0]!r:.80}")


def _check_proof(proof: Mapping[str, Any], what: str) -> None:
    if proof["verdict"] not in _VERDICTS:
        raise ValueError(f"{what} has the verdict {proof['verdict']!r:.40}")
    if not isinstance(proof.get("figure", ""), int | float | None):
        raise ValueError(f"{what} has no figure that is a number or null")
    _check_texts(proof["evidence"], f"the evidence of {what}")


def _check_events(events: Mapping[str, Any]) -> None:
    """`nohype events --against` compares them with the log."""
    _check_fields(events, _EVENTS, "events", exactly=False)
    if isinstance(events["last"], bool) or events["last"] < 0:
        raise ValueError(f"events has the id {events['last']!r:.40}")
    _check_texts(events["faults"], "faults of events")


def _check_texts(value: object, what: str) -> None:
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise ValueError(f"{what} is not a list of texts")


def _read_bytes(path: Path) -> bytes:
    try:
        # Not blocking: a pipe could have no writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise EvidenceError(Rejected.FORMAT, f"{path} is not a regular file")
            if status.st_size > MAX_SIZE:
                message = f"{path} is not evidence: it has {status.st_size} bytes, limit {MAX_SIZE}"
                raise EvidenceError(Rejected.FORMAT, message)
            return file.read(MAX_SIZE)
    except OSError as error:
        raise EvidenceError(Rejected.FORMAT, f"cannot read {path}: {error.strerror}", "check the path") from None
