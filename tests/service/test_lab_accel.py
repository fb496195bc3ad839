"""KVM is used only after a kernel reports `ready` under it. QEMU is a stand-in; tests/lab has the real probe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import LabError
from orchestrator.host.root import HostRoot
from orchestrator.lab import accel
from orchestrator.lab.accel import Accel, AccelChoice, Probe, choose_accel, probe_kvm
from orchestrator.lab.progress import Event, Kind, Timeline

pytestmark = [pytest.mark.netns, pytest.mark.timeout(60)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Probe]:
    """A probe whose QEMU is the stand-in, in the given mode."""
    program = tmp_path / "bin" / "qemu-system-x86_64"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fakes/qemu.py "$@"\n')
    program.chmod(0o755)
    for name in ("vmlinuz", "initrd", "kvm"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "kvm")

    def make(mode: str) -> Probe:
        monkeypatch.setenv("STAND_IN", mode)
        return Probe(Path("/"), tmp_path / "vmlinuz", tmp_path / "initrd")

    return make


@pytest.mark.parametrize("virt", ["svm", "vmx"])
def test_ready_kernel_with_nesting_passes(probe: Callable[[str], Probe], virt: str) -> None:
    assert probe_kvm(probe(f"ready={virt}")) == Accel(kvm=True, reason=f"a kernel boots under KVM and reports {virt}")


def test_kernel_without_nesting_fails(probe: Callable[[str], Probe]) -> None:
    found = probe_kvm(probe("ready=none"))
    assert not found.kvm
    assert "nested virtualization is off" in found.reason


def test_hung_kernel_fails(probe: Callable[[str], Probe]) -> None:
    found = probe_kvm(probe("mute"), timeout=2)
    assert not found.kvm
    assert "did not become ready within 2 s" in found.reason


def test_failed_emulator_fails(probe: Callable[[str], Probe]) -> None:
    found = probe_kvm(probe("die"))
    assert not found.kvm
    assert "status 1: qemu-system-x86_64: -device nonsense" in found.reason


def test_result_is_cached_and_its_reason_shown_once(probe: Callable[[str], Probe], tmp_path: Path) -> None:
    events: list[Event] = []
    cache = tmp_path / "kvm.json"
    first = choose_accel(HostRoot(), AccelChoice.AUTO, probe("ready=none"), Timeline(events.append), cache=cache)
    notes = [event.text for event in events if event.kind is Kind.NOTE]
    assert notes == [f"KVM does not work for labs, using emulation: {first.reason}"]
    events.clear()
    assert choose_accel(HostRoot(), AccelChoice.AUTO, probe("ready=svm"), Timeline(events.append), cache=cache) == first
    assert events == []


def test_requested_kvm_is_used_or_an_error(probe: Callable[[str], Probe], tmp_path: Path) -> None:
    cache = tmp_path / "kvm.json"
    with pytest.raises(LabError, match="KVM does not work for labs: .*nested virtualization is off"):
        choose_accel(HostRoot(), AccelChoice.KVM, probe("ready=none"), Timeline(), cache=cache)
    assert choose_accel(HostRoot(), AccelChoice.KVM, probe("ready=svm"), Timeline(), cache=cache).kvm
    assert choose_accel(HostRoot(), AccelChoice.AUTO, probe("ready=none"), Timeline(), cache=cache).kvm


def test_result_of_another_boot_is_ignored(probe: Callable[[str], Probe], tmp_path: Path) -> None:
    cache = tmp_path / "kvm.json"
    choose_accel(HostRoot(), AccelChoice.AUTO, probe("ready=none"), Timeline(), cache=cache)
    host = tmp_path / "host" / "proc/sys/kernel/random"
    host.mkdir(parents=True)
    (host / "boot_id").write_text("another\n")
    assert choose_accel(HostRoot(tmp_path / "host"), AccelChoice.AUTO, probe("ready=svm"), Timeline(), cache=cache).kvm


def test_emulation_is_not_probed(probe: Callable[[str], Probe], tmp_path: Path) -> None:
    assert not choose_accel(HostRoot(), AccelChoice.TCG, probe("die"), Timeline(), cache=tmp_path / "kvm.json").kvm
    assert not (tmp_path / "kvm.json").exists()


def test_machine_without_kvm_is_not_probed(probe: Callable[[str], Probe], tmp_path: Path) -> None:
    (tmp_path / "kvm").unlink()
    found = choose_accel(HostRoot(), AccelChoice.AUTO, probe("ready=svm"), Timeline(), cache=tmp_path / "kvm.json")
    assert not found.kvm
    assert "does not exist" in found.reason
