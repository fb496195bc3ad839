"""Evidence as a host makes it, without a host."""

from __future__ import annotations

import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orchestrator.evidence.document import FORMAT

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

_PROOF = {
    "name": "core-smt", "subject": "web", "verdict": "pass", "figure": 0, "unit": "cores shared", "evidence": ["read 8 threads"],
    "readings": None, "values": {},
}  # fmt: skip
_EVIDENCE: dict[str, Any] = {
    "format": FORMAT,
    "created": "2026-11-26T12:00:00.000+00:00",
    "nonce": "n-1",
    "host": {"id": "aa" * 16, "name": "server-1", "boot": "b-1", "tpm": "not measured"},
    "clock": {"synchronised": True},
    "software": {"nohype": "1", "kernel": {"release": "6.12", "cmdline_sha256": "00"}, "qemu": "10.0.2"},
    "guests": [{"name": "web", "uuid": "u", "pid": 7, "qemu": {"path": "/usr/bin/q", "sha256": "11"}, "xml_sha256": "22"}],
    "proofs": [
        _PROOF,
        {**_PROOF, "name": "exits", "figure": 27.25, "values": {"rate": 27.25}},
        {**_PROOF, "name": "vepa", "subject": "host", "evidence": ["no frames were sent"]},
    ],
    "events": {"events": 9, "first": 1, "last": 9, "hash": "33", "removed": 0, "faults": []},
    "gaps": [],
}


def make_evidence(*, verdicts: tuple[str, ...] = ("pass", "pass", "pass"), **fields: Any) -> dict[str, Any]:
    """``verdicts``: of the three proofs."""
    evidence: dict[str, Any] = json.loads(json.dumps(_EVIDENCE)) | fields  # no two parts share a list

    for proof, verdict in zip(evidence["proofs"], verdicts, strict=False):
        proof["verdict"] = verdict
    return evidence
