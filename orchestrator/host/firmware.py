"""The firmware of guests whose image needs only a kernel to be started."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.host.root import HostRoot

QBOOT = Path("/usr/share/qemu/qboot.rom")
"""qboot, which comes with QEMU: Debian's qemu-system-data."""
_WITHOUT_MTRRS = (6, 11)  # "KVM: x86: Remove VMX support for virtualizing guest MTRR memtypes"
_RELEASE = re.compile(r"(\d+)\.(\d+)", re.ASCII)


def find_qboot(host: HostRoot) -> Path | None:
    """None without the file, and where guests must have SeaBIOS.

    qboot sets no MTRRs. On Intel, KVM before Linux 6.11 applies them if a device's DMA is not coherent (an IOMMU without snoop
    control): without MTRRs the guest's memory would not be cached.
    """
    if not host.exists(str(QBOOT.relative_to("/"))):
        return None
    if host.exists("sys/module/kvm_intel"):
        release = _RELEASE.match(host.find("proc/sys/kernel/osrelease") or "")
        if not release or (int(release[1]), int(release[2])) < _WITHOUT_MTRRS:
            return None
    return QBOOT
