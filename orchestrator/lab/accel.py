"""Chooses the accelerator of a lab. KVM is used only after a kernel has booted under it and reported nested virtualization.

The existence of /dev/kvm is not enough: on some machines a stock kernel crashes in its decompressor under KVM.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.errors import LabError
from orchestrator.host.processes import read_boot_id
from orchestrator.host.root import HostRoot
from orchestrator.host.run import spawn
from orchestrator.lab.paths import RUNTIME, read_tail
from orchestrator.lab.progress import Timeline
from orchestrator.lab.qemu import INSIDE, build_entry
from orchestrator.waiting import wait_until

PROBE_TIMEOUT = 20.0
DEVICE = Path("/dev/kvm")
_READY = re.compile(r"^nohype: ready .*\bvirt=(\w+) ", re.MULTILINE)


class AccelChoice(StrEnum):
    AUTO = "auto"
    TCG = "tcg"
    KVM = "kvm"


@dataclass(frozen=True)
class Accel:
    kvm: bool
    reason: str  # one line


@dataclass(frozen=True)
class Probe:
    """Kernel and initrd of the guest image `minimal`, booted by the QEMU of the tools root."""

    tools: Path
    kernel: Path
    initrd: Path


def choose_accel(
    host: HostRoot, choice: AccelChoice, probe: Probe, timeline: Timeline, *, cache: Path = RUNTIME / "kvm.json"
) -> Accel:
    """Probes KVM unless ``cache`` holds a result of this boot; with `kvm` also if it holds a failure.

    Raises LabError if KVM was requested but does not work.
    """
    if choice is AccelChoice.TCG:
        return Accel(kvm=False, reason="emulation was requested")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        result = Accel(kvm=False, reason=f"{DEVICE} does not exist or is not accessible")
    else:
        boot = read_boot_id(host)
        known = _find_result(cache, boot)
        if known is None or (choice is AccelChoice.KVM and not known.kvm):
            with timeline.stage("probe KVM"):
                known = probe_kvm(probe)
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache.write_text(json.dumps({"boot": boot, **asdict(known)}))
            if not known.kvm:
                timeline.note(f"KVM does not work for labs, using emulation: {known.reason}")
        result = known
    if choice is AccelChoice.KVM and not result.kvm:
        raise LabError(f"KVM does not work for labs: {result.reason}", "use --accel auto or --accel tcg for emulation")
    return result


def probe_kvm(probe: Probe, *, timeout: float = PROBE_TIMEOUT) -> Accel:
    """Boots a kernel under KVM; the probe passes if the guest reports `ready` with SVM or VMX."""
    with TemporaryDirectory(prefix="nohype-kvm-") as folder:
        log, console = Path(folder, "qemu.log"), Path(folder, "console.log")
        binds = {"lab": Path(folder), "kernel": probe.kernel, "initrd": probe.initrd}
        process = spawn([*build_entry(probe.tools, binds, os.getpid()), *PROBE_ARGV], log=log)
        try:
            return wait_until(lambda: _read_result(process, log, console), timeout=timeout, interval=0.1) or Accel(
                kvm=False, reason=f"a kernel under KVM did not become ready within {timeout:g} s; console: {_last(console)}"
            )
        finally:
            process.kill()
            process.wait()


PROBE_ARGV = [
    "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot",
    "-M", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", "256M",
    "-kernel", str(INSIDE / "kernel"), "-initrd", str(INSIDE / "initrd"), "-append", "console=ttyS0 panic=-1",
    "-serial", f"file:{INSIDE / 'lab' / 'console.log'}",
]  # fmt: skip


def _read_result(process: Any, log: Path, console: Path) -> Accel | None:
    # The status first: what QEMU wrote before its exit is in the console file then.
    status = process.poll()
    # An incomplete line does not match: a space follows the word.
    match = _READY.search(console.read_text(errors="replace")) if console.exists() else None
    if match and match[1] in ("svm", "vmx"):
        return Accel(kvm=True, reason=f"a kernel boots under KVM and reports {match[1]}")
    if match:
        return Accel(kvm=False, reason="a kernel boots under KVM without SVM or VMX: nested virtualization is off")
    if status is not None:
        return Accel(
            kvm=False, reason=f"QEMU with KVM exited with status {status}: {_last(log) or _last(console) or 'no output'}"
        )
    return None


def _last(path: Path) -> str:
    return "; ".join(read_tail(path)[-2:])


def _find_result(cache: Path, boot: str) -> Accel | None:
    try:
        fields = json.loads(cache.read_text())
        return Accel(kvm=bool(fields["kvm"]), reason=str(fields["reason"])) if fields["boot"] == boot else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
