"""A quote: what a TPM 2.0 has stated about the boot of its host, signed by a key that never leaves it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

PCRS = (*range(10), *range(11, 16))
"""The registers that are quoted: firmware, boot loader, kernel, command line (0-9), systemd, shim (11-15). Not 10: IMA extends it
with each file that is executed.
"""


@dataclass(frozen=True)
class TpmQuote:
    """Texts in hexadecimal, except as noted.

    Attributes:
        key: the public attestation key, DER (SubjectPublicKeyInfo) in Base64.
        quoted: what was signed (TPMS_ATTEST), in Base64.
        signature: ECDSA, DER in Base64.
        pcrs: SHA-256 registers by number, as a text.
    """

    key: str
    quoted: str
    signature: str
    pcrs: dict[str, str]
