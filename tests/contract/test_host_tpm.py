"""Quotes of a TPM 2.0."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from errno import EBUSY, EIO

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.host.tpm import make_quote, read_quote
from orchestrator.model.tpm import PCRS, TpmQuote
from tests.fakes.root import FakeRoot
from tests.harness.tpm import FakeTpm

NONCE = hashlib.sha256(b"evidence").digest()


def verify(quote: TpmQuote) -> None:
    key = load_der_public_key(base64.b64decode(quote.key))
    assert isinstance(key, EllipticCurvePublicKey)
    quoted = base64.b64decode(quote.quoted)
    key.verify(base64.b64decode(quote.signature), quoted, ECDSA(SHA256()))
    assert NONCE in quoted
    assert quoted.endswith(hashlib.sha256(b"".join(map(bytes.fromhex, quote.pcrs.values()))).digest())
    assert list(quote.pcrs) == [str(number) for number in PCRS]


def test_quote_is_signed_with_the_nonce_and_the_registers() -> None:
    quote = make_quote(FakeTpm(), NONCE)
    verify(quote)
    assert quote.pcrs["9"] == "09" * 32


def test_quote_of_this_hosts_tpm(real: HostRoot) -> None:
    if not real.exists("sys/class/tpmrm/tpmrm0"):
        pytest.skip("the host has no TPM 2.0")
    first, second = read_quote(real, NONCE), read_quote(real, NONCE)
    verify(first)
    assert first.key == second.key, "the key is the same until the TPM is cleared"


def test_registers_that_change_meanwhile_are_read_again() -> None:
    verify(make_quote(FakeTpm(extends=3), NONCE))


def test_registers_that_always_change_are_an_error() -> None:
    with pytest.raises(HostError, match="registers of the TPM changed during each of 5 quotes"):
        make_quote(FakeTpm(extends=99), NONCE)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (0x9A2, "endorsement hierarchy has a password"), (0x98E, "endorsement hierarchy has a password"),
        (0x185, "endorsement hierarchy is disabled"), (0x921, "locked after wrong passwords"), (0x100, "not started"),
        (0x101, "failed its self test"), (0x2C4, "error 0x2c4"),
    ],
)  # fmt: skip
def test_tpm_that_refuses_is_an_error_with_the_reason(code: int, message: str) -> None:
    with pytest.raises(HostError, match=f"the TPM refused command 0x131: .*{message}") as caught:
        make_quote(FakeTpm(refusals=[code]), NONCE)
    assert caught.value.hint


@pytest.mark.parametrize("code", [0x922, 0x908, 0x90A])
def test_busy_tpm_is_asked_again(code: int) -> None:
    tpm = FakeTpm(refusals=[code])
    verify(make_quote(tpm, NONCE))
    assert tpm.commands[:2] == [0x131, 0x131]


def test_tpm_that_stays_busy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(HostError, match=r"the TPM was busy for 10 s \(TPM_RC_RETRY\)"):
        make_quote(FakeTpm(refusals=[0x922] * 10_000), NONCE)


def test_tpm_without_sha256_registers_is_an_error() -> None:
    with pytest.raises(HostError, match="no SHA-256 registers"):
        make_quote(FakeTpm(banks=(0x0004,)), NONCE)


@pytest.mark.parametrize("length", [0, 9, 10, 40, 90])
def test_response_that_is_too_short_is_an_error(length: int) -> None:
    tpm = FakeTpm()
    with pytest.raises(HostError, match="cannot parse the response"):
        make_quote(lambda command: tpm(command)[:length], NONCE)


def test_host_without_a_tpm_is_an_error(fake: FakeRoot) -> None:
    with pytest.raises(HostError, match="no TPM 2.0") as caught:
        read_quote(fake, NONCE)
    assert caught.value.hint


def test_device_that_another_program_holds_is_an_error(fake: FakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("sys/class/tpmrm/tpmrm0/dev", "253:65536")

    def refuse(*_: object) -> int:
        raise HostError("cannot open /dev/tpmrm0", errno=EBUSY)

    monkeypatch.setattr(FakeRoot, "open_device", refuse)
    with pytest.raises(HostError, match="another program uses /dev/tpmrm0"):
        read_quote(fake, NONCE)


def test_device_that_fails_is_an_error(fake: FakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("sys/class/tpmrm/tpmrm0/dev", "253:65536")
    monkeypatch.setattr(FakeRoot, "open_device", lambda *_: os.open("/dev/null", os.O_RDONLY))
    with pytest.raises(HostError, match="the TPM does not respond") as caught:
        read_quote(fake, NONCE)
    assert caught.value.errno != EIO  # EBADF: the file is not writable
