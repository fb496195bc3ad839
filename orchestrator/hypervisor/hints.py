"""What to do about an error of libvirt or QEMU, by its cause. Pure.

libvirt's codes do not tell causes apart: VIR_ERR_SYSTEM_ERROR is any system call that failed, and VIR_ERR_INTERNAL_ERROR
whatever QEMU printed. The text does: it is made of fixed phrases (libvirt: src/qemu and src/util; QEMU: hw/vfio and util).
"""

from __future__ import annotations

import re

_DAEMON = "virtqemud (modular daemons) or libvirtd"
_STATUS = "`systemctl status virtqemud.socket` (modular daemons) or `systemctl status libvirtd.socket`"
_PAGES = (
    "huge pages were taken, or reserved without being used yet, by another program:"
    " compare free_hugepages and resv_hugepages in /sys/kernel/mm/hugepages"
)
_KVM = (
    "QEMU cannot use KVM: enable SVM or VT-x in the firmware, load kvm_amd or kvm_intel, and check that QEMU's user may open"
    " /dev/kvm"
)
_VFIO = (
    "`journalctl -k --grep 'vfio|RMRR|DMAR|AMD-Vi'` shows the kernel's reason: memory of this device that the firmware reserves"
    " (RMRR), or an IOMMU without interrupt remapping"
)
_FILE = "check that the file exists and that QEMU's user (libvirt-qemu) may read it and enter each folder above it"
_QEMU_LOG = "the guest's log in /var/log/libvirt/qemu has QEMU's own words"

# The first that matches counts: the special before the general.
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"failed to connect socket to '[^']*'.*permission denied", "run as root, or as a member of the group libvirt"),
    (r"failed to connect socket to '[^']*/(virt[a-z]+)-sock", "start libvirt's daemon: `systemctl start {0}.socket`"),
    (r"failed to connect socket to '[^']*/libvirt-sock", "start libvirt's daemon: `systemctl start libvirtd.socket`"),
    (
        r"failed to connect socket|end of file while reading data|client socket is closed|cannot (recv|write) data"
        r"|keepalive timeout|internal error: client connection",
        f"libvirt's daemon does not run, or was restarted: {_STATUS}",
    ),
    (r"authentication (failed|unavailable|cancelled)|access denied by policy", "run as root, or allow it in polkit"),
    (
        r"set cpu affinity|sched_setaffinity|cpu affinity",
        "the CPUs are offline, or outside the cpuset of libvirt's own control group: compare /sys/devices/system/cpu/online and"
        f" `systemctl show --property AllowedCPUs machine.slice`; then restart {_DAEMON}",
    ),
    (
        r"cgroup",
        "libvirt could not set up the guest's control group: check that the host mounts cgroup version 2 and that"
        " /sys/fs/cgroup/machine.slice/cgroup.controllers names cpuset",
    ),
    (
        r"does not support virt type 'kvm'|domaintype=kvm|type=kvm|kvm kernel module|failed to initialize kvm|/dev/kvm"
        r"|kvm is not available|virtualization.*not (supported|enabled)|domain type kvm",
        _KVM,
    ),
    (
        r"hugetlbfs mount|hugepage.*mount",
        f"mount huge pages of this size (mount -t hugetlbfs -o pagesize=...), then restart {_DAEMON}; the Ansible role does",
    ),
    (r"map backing store|insufficient free host memory pages|preallocat|os_mem_prealloc", _PAGES),
    (
        r"vfio_(listener_region_add|dma_map|container_dma_map).*cannot allocate memory|mlock|lock.{0,20}memory|memlock",
        "QEMU may not lock as much memory as the guest has: raise LimitMEMLOCK of libvirt's daemon",
    ),
    (r"set iommu for container|setup container|rmrr|failed to attach.*iommu", _VFIO),
    (
        r"group \d+ is not viable",
        "another device of the VF's IOMMU group is bound to a driver of the host: `nohype survey` shows the groups",
    ),
    (
        r"(open|access).*/dev/vfio|no such file.*vfio|passthrough of host pci devices|vfio.*not supported|no iommu found",
        "the host has no IOMMU in use, or vfio-pci is not loaded: enable the IOMMU in the firmware, boot with intel_iommu=on on"
        " Intel, and `modprobe vfio-pci`",
    ),
    (r"apparmor|selinux|security label", "the host's security module refused: `journalctl -k --grep 'apparmor|avc'`"),
    (
        r"(cannot|could not|failed to|unable to) (access|open|load|read|stat).*"
        r"(permission denied|no such file|kernel|initrd|storage file)",
        _FILE,
    ),
    (
        r"state change lock",
        "another call of libvirt for this guest has not returned, and QEMU's monitor may not respond: `virsh domstate --reason"
        " NAME`",
    ),
    (r"domain '?[^ ]+'? (already )?exists|already (exists|defined) with uuid|is already active", "`virsh list --all` shows it"),
    (
        r"unsupported configuration|does not support|not supported by|xml error|does not validate|failed to validate",
        "libvirt or QEMU is older or built otherwise than needed: `virsh version`",
    ),
    (r"unable to allocate|cannot allocate memory|out of memory", "the host has no memory left for QEMU itself: `free -h`"),
    (r"monitor|qemu|process exited", _QEMU_LOG),
)
_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE | re.DOTALL), hint) for pattern, hint in _CAUSES)


def find_hint(message: str, *, connecting: bool) -> str:
    """What an operator can do about an error.

    Args:
        message: libvirt's text.
        connecting: whether libvirt could not be reached at all, as its code tells.
    """
    for pattern, hint in _PATTERNS:
        if match := pattern.search(message):
            return hint.format(*match.groups())
    if connecting:
        return f"check that libvirt's daemon runs: {_STATUS}"
    return "`journalctl -u virtqemud -u libvirtd` has libvirt's own messages"
