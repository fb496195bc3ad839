"""A TPM 2.0 that answers the commands that a quote needs, as swtpm answered them; with a key of its own."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

_HANDLE = 0x8000_0000
_AUTH = struct.pack(">HBH", 0, 1, 0)
_CREATE_PRIMARY, _QUOTE, _PCR_READ = 0x131, 0x158, 0x17E


@dataclass
class FakeTpm:
    """``refusals``: response codes of the next commands. ``banks``: hash algorithms with registers."""

    key: EllipticCurvePrivateKey = field(default_factory=lambda: generate_private_key(SECP256R1()))
    pcrs: dict[int, bytes] = field(default_factory=lambda: {number: bytes([number]) * 32 for number in range(24)})
    refusals: list[int] = field(default_factory=list)
    banks: tuple[int, ...] = (0x000B,)
    commands: list[int] = field(default_factory=list)
    extends: int = 0  # a register is extended after this many quotes

    def __call__(self, command: bytes) -> bytes:
        tag, size, code = struct.unpack_from(">HII", command)
        assert size == len(command)
        self.commands.append(code)
        if self.refusals:
            return struct.pack(">HII", 0x8001, 10, self.refusals.pop(0))
        body = {_CREATE_PRIMARY: self._create, _QUOTE: self._quote, _PCR_READ: self._read}[code](command)
        return struct.pack(">HII", tag, 10 + len(body), 0) + body

    def _create(self, command: bytes) -> bytes:
        assert command[10:14] == bytes.fromhex("4000000b"), "the endorsement hierarchy"
        assert bytes.fromhex("0023000b00050072") in command, "a restricted signing key on a curve"
        numbers = self.key.public_key().public_numbers()
        template = struct.pack(">HHIHHHHHH", 0x0023, 0x000B, 0x0005_0072, 0, 0x0010, 0x0018, 0x000B, 0x0003, 0x0010)
        public = template + _size(numbers.x.to_bytes(32)) + _size(numbers.y.to_bytes(32))
        parameters = _size(public) + _size(b"") + _size(b"")
        return struct.pack(">II", _HANDLE, len(parameters)) + parameters + _AUTH

    def _quote(self, command: bytes) -> bytes:
        assert struct.unpack_from(">I", command, 10) == (_HANDLE,)
        at = 14 + 4 + 9
        (length,) = struct.unpack_from(">H", command, at)
        nonce, at = command[at + 2 : at + 2 + length], at + 2 + length + 2
        count, bank, size = struct.unpack_from(">IHB", command, at)
        assert (count, bank) == (1, 0x000B)
        bits = command[at + 7 : at + 7 + size]
        chosen = _list_bits(bits)
        digest = hashlib.sha256(b"".join(self.pcrs[number] for number in chosen)).digest()
        clock = struct.pack(">QIIBQ", 201, 7, 0, 1, 9)
        selection = struct.pack(">IHB", 1, 0x000B, size) + bits
        quoted = bytes.fromhex("ff5443478018") + _size(b"\0\x0b" + bytes(32)) + _size(nonce) + clock + selection + _size(digest)
        parts = decode_dss_signature(self.key.sign(quoted, ECDSA(SHA256())))
        signature = struct.pack(">HH", 0x0018, 0x000B) + b"".join(_size(part.to_bytes(32)) for part in parts)
        if self.extends:
            self.extends -= 1
            self.pcrs[9] = hashlib.sha256(self.pcrs[9]).digest()
        parameters = _size(quoted) + signature
        return struct.pack(">I", len(parameters)) + parameters + _AUTH

    def _read(self, command: bytes) -> bytes:
        """At most eight registers, as TPM2_PCR_Read does."""
        (size,) = struct.unpack_from(">B", command, 16)
        chosen = _list_bits(command[17 : 17 + size])[:8] if 0x000B in self.banks else []
        bits = sum(1 << number for number in chosen).to_bytes(3, "little")
        values = b"".join(_size(self.pcrs[number]) for number in chosen)
        return struct.pack(">IIHB", 3, 1, 0x000B, 3) + bits + struct.pack(">I", len(chosen)) + values


def _size(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _list_bits(bits: bytes) -> list[int]:
    number = int.from_bytes(bits, "little")
    return [index for index in range(8 * len(bits)) if number >> index & 1]
