"""Checks the quote of a TPM in evidence: its key, signature, nonce and registers. The author of a file need not be trusted."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from orchestrator.errors import RequestError
from orchestrator.evidence.document import EvidenceError, Rejected, bind_quote
from orchestrator.evidence.keys import read_public, try_load

_GENERATED = 0xFF54_4347
"""TPM_GENERATED_VALUE: a restricted key signs nothing else that begins with it, so only a TPM can have made the quote."""
_QUOTE = 0x8018
_SHA256 = 0x000B
_NUMBER, _VALUE = re.compile(r"0|[1-9][0-9]?", re.ASCII), re.compile(r"[0-9a-f]{64}", re.ASCII)
_REGISTERS = frozenset((*range(10), *range(11, 16)))
"""As ``model.tpm.PCRS``: a program on the host can ask the TPM for a quote of fewer, or of none."""
_AGAIN = "get the file again from its source"


@dataclass(frozen=True)
class _Quote:
    """As the host wrote it (``model.tpm.TpmQuote``)."""

    key: str
    quoted: str
    signature: str
    pcrs: dict[str, str]


@dataclass(frozen=True)
class CheckedQuote:
    """``resets``: how often the TPM was reset, by a boot. ``pcrs``: by number."""

    key: str  # SHA-256 of its DER form
    pcrs: Mapping[int, str]
    resets: int


def has_quote(evidence: Mapping[str, Any]) -> bool:
    return isinstance(evidence["host"].get("tpm"), dict)


def load_tpm_key(path: Path) -> EllipticCurvePublicKey:
    """Raises RequestError if the file cannot be read or has no public key on P-256."""
    key = read_public(path, "attestation key")
    if not _is_p256(key):
        hint = "give the file that `nohype audit tpm-key` wrote"
        raise RequestError(f"{path} is not a public key on the curve P-256 in PEM", hint)
    return key


def find_tpm_key(evidence: Mapping[str, Any]) -> bytes:
    """The attestation key that evidence names, in PEM: to be trusted only if the evidence comes from the host itself."""
    key = _load_key(_parse(evidence))
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def check_quote(evidence: Mapping[str, Any], key: EllipticCurvePublicKey, expected: Mapping[int, str]) -> CheckedQuote:
    """``expected``: SHA-256 of registers, in hexadecimal. Raises EvidenceError for the first fault."""
    quote = _parse(evidence)
    if _encode(_load_key(quote)) != _encode(key):
        message = f"the quote is of another TPM or key: {_identify(_load_key(quote))}, expected {_identify(key)}"
        raise EvidenceError(Rejected.SIGNATURE, message, "give the attestation key of the host with --tpm-key")
    quoted = _decode(quote.quoted, "what the TPM signed")
    try:
        key.verify(_decode(quote.signature, "the signature of the TPM"), quoted, ECDSA(SHA256()))
    except InvalidSignature:
        message = "the signature of the TPM does not match its quote: the quote was altered"
        raise EvidenceError(Rejected.SIGNATURE, message, _AGAIN) from None
    nonce, resets, chosen, digest = _parse_attest(quoted)
    if nonce != bind_quote(evidence):
        message = "the quote of the TPM was made for other evidence: its nonce is not the hash of this evidence"
        raise EvidenceError(Rejected.OTHER, message, "ask the host for new evidence")
    pcrs = _parse_pcrs(quote)
    if sorted(pcrs) != chosen or hashlib.sha256(b"".join(bytes.fromhex(pcrs[number]) for number in chosen)).digest() != digest:
        message = "the registers in the evidence are not those that the TPM has quoted"
        raise EvidenceError(Rejected.SIGNATURE, message, _AGAIN)
    if left_out := sorted(_REGISTERS.difference(chosen)):
        message = f"the quote of the TPM leaves out PCR {', '.join(map(str, left_out))}"
        raise EvidenceError(Rejected.OTHER, message, "ask the manager of the host for evidence, with `nohype audit --sign`")
    for number, wanted in sorted(expected.items()):
        if pcrs.get(number) != wanted:
            message = f"PCR {number} is {pcrs.get(number, 'not quoted')}, expected {wanted}"
            raise EvidenceError(Rejected.OTHER, message, "the host has booted other software: compare with `nohype audit diff`")
    return CheckedQuote(_identify(key), pcrs, resets)


def _parse(evidence: Mapping[str, Any]) -> _Quote:
    if not has_quote(evidence):
        gap = next((text for text in evidence.get("gaps", ()) if text.startswith("TPM: ")), "TPM: not measured")
        raise EvidenceError(Rejected.OTHER, f"the evidence has no quote of a TPM ({gap:.200})", "omit --tpm-key to accept that")
    fields, texts = evidence["host"]["tpm"], ("key", "quoted", "signature")
    pcrs = fields.get("pcrs")
    if fields.keys() != {*texts, "pcrs"} or not isinstance(pcrs, dict):
        raise EvidenceError(Rejected.FORMAT, f"the evidence has a quote that cannot be read: fields {sorted(fields)!s:.200}")
    if not all(isinstance(value, str) for value in (*(fields[name] for name in texts), *pcrs.values())):
        raise EvidenceError(Rejected.FORMAT, "the evidence has a quote that cannot be read: a value is not a text")
    return _Quote(fields["key"], fields["quoted"], fields["signature"], pcrs)


def _load_key(quote: _Quote) -> EllipticCurvePublicKey:
    data = _decode(quote.key, "its attestation key")
    key = try_load(lambda: load_der_public_key(data))
    if not _is_p256(key):
        raise EvidenceError(Rejected.FORMAT, "the quote has no attestation key on the curve P-256")
    return key


def _is_p256(key: object) -> TypeGuard[EllipticCurvePublicKey]:
    return isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)


def _parse_attest(data: bytes) -> tuple[bytes, int, list[int], bytes]:
    """TPMS_ATTEST of a quote (part 2, "Attestation Structures"): nonce, number of resets, registers, digest of the registers."""
    try:
        magic, kind = struct.unpack_from(">IH", data)
        signer, at = _take_sized(data, 6)
        nonce, at = _take_sized(data, at)
        _clock, resets, _restarts, _safe, _firmware, banks, bank, size = struct.unpack_from(">QIIBQIHB", data, at)
        at += struct.calcsize(">QIIBQIHB")
        bits = int.from_bytes(data[at : at + size], "little")
        digest, end = _take_sized(data, at + size)
    except struct.error:
        raise EvidenceError(Rejected.FORMAT, "the quote is too short") from None
    if (magic, kind, banks, bank, end) != (_GENERATED, _QUOTE, 1, _SHA256, len(data)) or not signer:
        raise EvidenceError(Rejected.FORMAT, "what the TPM signed is not a quote of one bank of SHA-256 registers")
    return nonce, resets, [number for number in range(8 * size) if bits >> number & 1], digest


def _take_sized(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from(">H", data, at)
    return data[at + 2 : at + 2 + size], at + 2 + size


def _parse_pcrs(quote: _Quote) -> dict[int, str]:
    """Only numbers and values in the one form that the host writes."""
    pcrs = {}
    for name, value in quote.pcrs.items():
        if not _NUMBER.fullmatch(name) or not _VALUE.fullmatch(value):
            raise EvidenceError(Rejected.FORMAT, f"the quote has a register that cannot be read: {name!r:.40}: {value!r:.80}")
        pcrs[int(name)] = value
    return pcrs


def _decode(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data or base64.b64encode(data).decode() != text:
        raise EvidenceError(Rejected.FORMAT, f"the quote cannot be read: {what} is not Base64")
    return data


def _encode(key: EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _identify(key: EllipticCurvePublicKey) -> str:
    return hashlib.sha256(_encode(key)).hexdigest()
