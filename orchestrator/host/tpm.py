"""Quotes of the host's TPM 2.0, by three of its commands through the kernel's resource manager /dev/tpmrm0.

Trusted Platform Module Library 2.0, part 2 "Structures" and part 3 "Commands". The commands are written here: tpm2-tools are
programs with files of their own, inside the manager's sandbox, and tpm2-pytss is compiled against a C library.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from errno import EBUSY

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot, host_error
from orchestrator.model.tpm import PCRS, TpmQuote
from orchestrator.waiting import wait_until

Exchange = Callable[[bytes], bytes]
"""Sends one command, and returns the response."""

_DEVICE = "tpmrm0"
_NUMBER = "sys/class/tpmrm/tpmrm0/dev"
_MAX_RESPONSE = 4096
_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002
_CREATE_PRIMARY, _QUOTE, _PCR_READ = 0x131, 0x158, 0x17E
_ENDORSEMENT = 0x4000_000B
_EMPTY_PASSWORD = struct.pack(">IIHBH", 9, 0x4000_0009, 0, 0, 0)  # an authorization area with TPM_RS_PW
_SHA256, _NULL, _ECDSA = 0x000B, 0x0010, 0x0018
# A restricted signing key on NIST P-256 with ECDSA and SHA-256: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth,
# restricted, sign. The same template in the same hierarchy is the same key until the TPM is cleared (part 1, "Primary Objects").
_TEMPLATE = struct.pack(
    ">HHIHHHHHHHH", 0x0023, _SHA256, 0x0005_0072, 0, _NULL, _ECDSA, _SHA256, 0x0003, _NULL, 0, 0
)  # fmt: skip
# SubjectPublicKeyInfo of an uncompressed point on P-256 (RFC 5480).
_P256_PREFIX = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200") + b"\x04"
_ATTEMPTS = 5
_RETRY_SECONDS = 10.0
_RETRIED = {0x922: "TPM_RC_RETRY", 0x908: "TPM_RC_YIELDED", 0x90A: "TPM_RC_TESTING"}
# Without the bits that number a handle, parameter or session (part 2, "Response Code Formats").
_REFUSED = {
    0x921: ("it is locked after wrong passwords (TPM_RC_LOCKOUT)", "run `tpm2_dictionarylockout --clear-lockout`"),
    0x085: ("its endorsement hierarchy is disabled (TPM_RC_HIERARCHY)", "enable it in the firmware"),
    0x0A2: ("its endorsement hierarchy has a password (TPM_RC_BAD_AUTH)", "remove it with `tpm2_changeauth -c endorsement`"),
    0x08E: ("its endorsement hierarchy has a password (TPM_RC_AUTH_FAIL)", "remove it with `tpm2_changeauth -c endorsement`"),
    0x100: ("it was not started by the firmware (TPM_RC_INITIALIZE)", "update the firmware"),
    0x101: ("it failed its self test (TPM_RC_FAILURE)", "reboot the host; replace the TPM if it fails again"),
}


def read_quote(host: HostRoot, nonce: bytes) -> TpmQuote:
    """``nonce``: at most 32 bytes. Raises HostError without a TPM 2.0, or if it does not respond or refuses."""
    with _open(host) as exchange:
        return make_quote(exchange, nonce)


def make_quote(exchange: Exchange, nonce: bytes) -> TpmQuote:
    """As ``read_quote``. Repeated if a register changes in between."""
    handle, point = _create_key(exchange)
    for _ in range(_ATTEMPTS):
        quoted, signature = _quote(exchange, handle, nonce)
        pcrs = _read_pcrs(exchange)
        if quoted.endswith(hashlib.sha256(b"".join(pcrs.values())).digest()):
            key = base64.b64encode(_P256_PREFIX + point).decode()
            texts = {str(number): value.hex() for number, value in pcrs.items()}
            return TpmQuote(key, base64.b64encode(quoted).decode(), base64.b64encode(signature).decode(), texts)
    raise HostError(f"the registers of the TPM changed during each of {_ATTEMPTS} quotes", "repeat it when the host has booted")


@contextmanager
def _open(host: HostRoot) -> Iterator[Exchange]:
    """The kernel flushes all keys when the device is closed (Documentation/security/tpm/tpm_tis.rst; tpm2-space.c)."""
    if (number := host.find(_NUMBER)) is None:
        raise HostError("the host has no TPM 2.0, or no driver for it", "enable it in the firmware")
    try:
        descriptor = host.open_device(_DEVICE, number, os.O_RDWR)
    except HostError as error:
        if error.errno == EBUSY:
            raise HostError(f"another program uses /dev/{_DEVICE}", f"end it (fuser -v /dev/{_DEVICE})") from None
        raise

    def exchange(command: bytes) -> bytes:
        try:
            os.write(descriptor, command)
            return os.read(descriptor, _MAX_RESPONSE)
        except OSError as error:
            raise host_error("the TPM does not respond: cannot use", f"dev/{_DEVICE}", error) from None

    try:
        yield exchange
    finally:
        os.close(descriptor)


class _Reader:
    """Takes the parts of a response. Raises HostError if it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise HostError(f"cannot parse the response of the TPM: {len(self._data)} bytes, expected more")
        self._at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def sized(self) -> bytes:
        """A TPM2B: two bytes of size, and as many bytes."""
        return self.take(self.number(2))


def _call(exchange: Exchange, code: int, handles: bytes, body: bytes, *, password: bool) -> _Reader:
    """Sends a command, and returns what follows the header of its response."""
    middle = _EMPTY_PASSWORD if password else b""
    size = 10 + len(handles) + len(middle) + len(body)
    command = struct.pack(">HII", _SESSIONS if password else _NO_SESSIONS, size, code) + handles + middle + body

    def attempt() -> tuple[int, _Reader]:
        response = _Reader(exchange(command))
        response.take(6)
        return response.number(4), response

    status, response = wait_until(attempt, lambda result: result[0] not in _RETRIED, timeout=_RETRY_SECONDS, interval=0.1)
    if status in _RETRIED:
        raise HostError(f"the TPM was busy for {_RETRY_SECONDS:g} s ({_RETRIED[status]})", "repeat it later")
    if status:
        plain = status & 0xBF if status & 0x80 else status
        why, hint = _REFUSED.get(plain, (f"error {status:#x}", f"see what it means: tpm2_rc_decode {status:#x}"))
        raise HostError(f"the TPM refused command {code:#x}: {why}", hint)
    return response


def _create_key(exchange: Exchange) -> tuple[int, bytes]:
    """The handle of the attestation key, and its point: x and y of 32 bytes."""
    sensitive = struct.pack(">HHH", 4, 0, 0)
    body = sensitive + struct.pack(">H", len(_TEMPLATE)) + _TEMPLATE + struct.pack(">HI", 0, 0)
    response = _call(exchange, _CREATE_PRIMARY, struct.pack(">I", _ENDORSEMENT), body, password=True)
    handle = response.number(4)
    response.take(4)
    public = _Reader(response.sized())
    public.take(len(_TEMPLATE) - 4)
    return handle, public.sized().rjust(32, b"\0") + public.sized().rjust(32, b"\0")


def _quote(exchange: Exchange, handle: int, nonce: bytes) -> tuple[bytes, bytes]:
    """What was signed, and its signature in DER."""
    body = struct.pack(">H", len(nonce)) + nonce + struct.pack(">H", _NULL) + _select(PCRS)
    response = _call(exchange, _QUOTE, struct.pack(">I", handle), body, password=True)
    response.take(4)
    quoted = response.sized()
    if (kind := (response.number(2), response.number(2))) != (_ECDSA, _SHA256):
        raise HostError(f"the TPM signed with algorithm {kind[0]:#x} and hash {kind[1]:#x}, expected ECDSA and SHA-256")
    return quoted, _encode_der(response.sized(), response.sized())


def _read_pcrs(exchange: Exchange) -> dict[int, bytes]:
    """A TPM returns at most eight registers per call."""
    found: dict[int, bytes] = {}
    while missing := [number for number in PCRS if number not in found]:
        response = _call(exchange, _PCR_READ, b"", _select(missing), password=False)
        response.take(4)
        chosen: list[int] = []
        for _ in range(response.number(4)):
            bank, bits = response.number(2), int.from_bytes(response.take(response.number(1)), "little")
            chosen += [number for number in missing if bank == _SHA256 and bits >> number & 1]
        values = [response.sized() for _ in range(response.number(4))]
        if not chosen or len(values) != len(chosen):
            raise HostError("the TPM has no SHA-256 registers", "enable the SHA-256 bank of the TPM in the firmware")
        found |= dict(zip(chosen, values, strict=True))
    return {number: found[number] for number in PCRS}


def _select(numbers: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION of the SHA-256 bank."""
    return struct.pack(">IHB", 1, _SHA256, 3) + sum(1 << number for number in numbers).to_bytes(3, "little")


def _encode_der(*numbers: bytes) -> bytes:
    """Ecdsa-Sig-Value (RFC 3279): a sequence of two integers, each below 128 bytes."""
    parts = []
    for number in numbers:
        value = number.lstrip(b"\0") or b"\0"
        value = b"\0" + value if value[0] & 0x80 else value
        parts.append(bytes([2, len(value)]) + value)
    body = b"".join(parts)
    return bytes([0x30, len(body)]) + body
