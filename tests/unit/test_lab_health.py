"""Detection of guests that hang in the emulator, and of the emulator's exit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from orchestrator.errors import LabError, LabLost
from orchestrator.lab import demo, health
from orchestrator.lab.emulator import describe_end
from orchestrator.lab.health import Reading, find_hung, parse_registers
from orchestrator.lab.lab import Lab
from orchestrator.lab.paths import LabDir, take_lock
from orchestrator.lab.progress import Timeline
from orchestrator.ssh import Completed

SPINNING = "ffffffff810c1b52 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0"
HALTED = "ffffffff81e2a51b RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1"


def dump(*vcpus: str) -> str:
    """The output of `info registers -a` in QEMU 10, without unused registers."""
    lines = [
        f"\nCPU#{index}\nRAX=0000000000000000 RBX=0000000000000003\nRIP={vcpu}\nES =0000" for index, vcpu in enumerate(vcpus)
    ]
    return "\n".join(lines)


def samples(*rounds: tuple[str, ...]) -> str:
    return "\n".join(f"sample {number} guest web\n{dump(*vcpus)}" for number, vcpus in enumerate(rounds, 1))


def test_vcpu_that_spins_with_interrupts_off_is_named() -> None:
    readings = parse_registers(samples(*[(HALTED, SPINNING)] * 5))
    assert readings["web", 0][0] == Reading(0xFFFFFFFF81E2A51B, 0x246, halted=True)
    assert find_hung(readings) == [
        "guest web, vCPU 1: spins at RIP 0xffffffff810c1b52 with interrupts off (5 of 5 samples)"
    ]  # fmt: skip


def test_loop_of_some_instructions_counts_as_one_place() -> None:
    rounds = [(SPINNING.replace("1b52", f"1b{0x40 + number:x}"),) for number in range(5)]
    assert find_hung(parse_registers(samples(*rounds)))


@pytest.mark.parametrize(
    "last",
    [
        SPINNING.replace("00000046", "00000246"),  # interrupts on
        SPINNING.replace("HLT=0", "HLT=1"),  # halted with interrupts off: a vCPU that its kernel has switched off
        SPINNING.replace("1b52", "2b52"),  # somewhere else
    ],
)
def test_one_different_sample_clears_a_guest(last: str) -> None:
    assert find_hung(parse_registers(samples(*[(SPINNING,)] * 4, (last,)))) == []


def test_too_few_samples_are_not_a_hang() -> None:
    """A guest that ends during the samples, or a virsh that does not respond."""
    assert find_hung(parse_registers(samples(*[(SPINNING,)] * 4))) == []
    assert parse_registers("error: failed to connect to the hypervisor\n") == {}


def test_guests_are_distinguished() -> None:
    text = "\n".join(samples((SPINNING,)) + "\n" + samples((HALTED,)).replace("web", "a b") for _ in range(5))
    assert [line.partition(",")[0] for line in find_hung(parse_registers(text))] == ["guest web"]


def test_hung_guest_is_reported_as_lost_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LabDir("demo", tmp_path)
    lock = take_lock(folder)
    assert lock is not None
    text = samples(*[(SPINNING,)] * 5)
    monkeypatch.setattr(health, "execute", lambda *_, **__: Completed(0, text, ""))
    lab = Lab(folder, None)  # type: ignore[arg-type]
    with pytest.raises(LabLost, match=r"lab demo is lost: .*a guest hangs in the emulator\n    guest web, vCPU 0: spins"):
        health.check_guests(lab)
    text = samples(*[(HALTED,)] * 5)
    health.check_guests(lab)
    os.close(lock)


def test_failed_demo_checks_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LabError("timed out after 180 s waiting for the guest to report ready")

    def lose(*_: object) -> None:
        raise LabLost("a guest hangs in the emulator")

    monkeypatch.setattr(demo, "ask", fail)
    monkeypatch.setattr(demo, "check_emulation", lambda _: None)
    with pytest.raises(LabError, match="timed out"):
        demo.run_demo(Lab(LabDir("demo"), None), Timeline())  # type: ignore[arg-type]
    monkeypatch.setattr(demo, "check_emulation", lose)
    with pytest.raises(LabLost, match="hangs"):
        demo.run_demo(Lab(LabDir("demo"), None), Timeline())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "the lab host powered off, rebooted or panicked"),
        (-signal.SIGKILL, "QEMU was killed by SIGKILL, sent by"),
        (-signal.SIGABRT, "the emulator failed, not the lab host: QEMU was killed by SIGABRT"),
        (-signal.SIGSEGV, "the emulator failed, not the lab host: QEMU was killed by SIGSEGV"),
        (1, "the emulator failed, not the lab host: QEMU exited with status 1"),
    ],
)
def test_exit_of_the_emulator_is_explained(status: int, text: str) -> None:
    assert text in describe_end(status, ("assertion failed: (bql_locked())",))


def test_last_output_of_the_emulator_is_reported() -> None:
    assert describe_end(-signal.SIGABRT, ("1", "2", "3", "4")).endswith("last output: 2; 3; 4")
    assert describe_end(-signal.SIGABRT, ()).endswith("last output: none")
