"""Which accelerator a lab gets. KVM is believed only after a kernel has really booted in it and shows nested virtualization.

/dev/kvm alone proves nothing: there are kinds that make a virtual machine in which a stock kernel dies in its decompressor.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.errors import LabError
from orchestrator.host.processes import read_boot_id
from orchestrator.host.root import HostRoot
from orchestrator.host.run import spawn
from orchestrator.lab.paths import RUNTIME, read_tail
from orchestrator.lab.progress import Timeline
from orchestrator.lab.qemu import INSIDE, build_entry

PROBE_DEADLINE = 20.0
_DEVICE = Path("/dev/kvm")
_READY = re.compile(r"^nohype: ready .*\bvirt=(\w+)", re.MULTILINE)
_POLL = 0.1


class AccelChoice(StrEnum):
    """What the user asks for."""

    AUTO = "auto"
    TCG = "tcg"
    KVM = "kvm"


@dataclass(frozen=True)
class Accel:
    """The choice, and the reason for it in one line."""

    kvm: bool
    reason: str


@dataclass(frozen=True)
class Probe:
    """What the probe boots: the guest image `minimal`, in the QEMU of the tools root."""

    tools: Path
    kernel: Path
    initrd: Path


def choose_accel(
    host: HostRoot, wanted: AccelChoice, probe: Probe, timeline: Timeline, *, cache: Path = RUNTIME / "kvm.json"
) -> Accel:
    """Decides, and probes KVM where that is needed.

    The verdict is kept until the machine boots again; only who insists on KVM has a refusal looked at anew.

    Args:
        cache: file that keeps the verdict.

    Raises:
        LabError: KVM is asked for, but does not work; with the reason.
    """
    if wanted is AccelChoice.TCG:
        return Accel(kvm=False, reason="emulation was asked for")
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        verdict = Accel(kvm=False, reason=f"{_DEVICE} is not there, or not ours to open")
    else:
        boot = read_boot_id(host)
        known = _find_verdict(cache, boot)
        if known is None or (wanted is AccelChoice.KVM and not known.kvm):
            with timeline.stage("probe KVM"):
                known = probe_kvm(probe)
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache.write_text(json.dumps({"boot": boot, **asdict(known)}))
            if not known.kvm:
                timeline.note(f"KVM cannot be used, so the lab is emulated: {known.reason}")
        verdict = known
    if wanted is AccelChoice.KVM and not verdict.kvm:
        raise LabError(f"KVM cannot be used for a lab: {verdict.reason}", "--accel auto takes emulation instead")
    return verdict


def probe_kvm(probe: Probe, *, deadline: float = PROBE_DEADLINE) -> Accel:
    """Boots a kernel under KVM; only one that gets to its `ready` line and sees SVM or VMX counts.

    Args:
        deadline: seconds that it may take.
    """
    with TemporaryDirectory(prefix="nohype-kvm-") as folder:
        log, console = Path(folder, "qemu.log"), Path(folder, "console.log")
        binds = {"lab": Path(folder), "kernel": probe.kernel, "initrd": probe.initrd}
        process = spawn([*build_entry(probe.tools, binds, os.getpid()), *_PROBE_ARGV], log=log)
        try:
            end = time.monotonic() + deadline
            while time.monotonic() < end:
                alive = process.poll() is None
                # The size is known only when the guest is done with the line; a part of it does not match.
                match = _READY.search(console.read_text(errors="replace")) if console.exists() else None
                if match:
                    return _judge(match[1])
                if not alive:
                    said = "; ".join((read_tail(log) or read_tail(console))[-2:])
                    return Accel(
                        kvm=False, reason=f"QEMU with KVM ended with status {process.returncode}: {said or 'it said nothing'}"
                    )
                time.sleep(_POLL)
            last = "; ".join(read_tail(console)[-2:]) or "nothing"
            return Accel(
                kvm=False, reason=f"a kernel did not get ready under KVM within {deadline:g} s; its console shows {last}"
            )
        finally:
            process.kill()
            process.wait()


_PROBE_ARGV = [
    "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot",
    "-M", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", "host", "-smp", "2", "-m", "256M",
    "-kernel", str(INSIDE / "kernel"), "-initrd", str(INSIDE / "initrd"), "-append", "console=ttyS0 panic=-1",
    "-serial", f"file:{INSIDE / 'lab' / 'console.log'}",
]  # fmt: skip


def _judge(virt: str) -> Accel:
    if virt in ("svm", "vmx"):
        return Accel(kvm=True, reason=f"a kernel boots under KVM and sees {virt}")
    return Accel(kvm=False, reason="a kernel boots under KVM, but sees neither SVM nor VMX: nested virtualization is off")


def _find_verdict(cache: Path, boot: str) -> Accel | None:
    try:
        fields = json.loads(cache.read_text())
        return Accel(kvm=bool(fields["kvm"]), reason=str(fields["reason"])) if fields["boot"] == boot else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
