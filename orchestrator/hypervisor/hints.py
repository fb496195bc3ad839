"""Hints for errors of libvirt and QEMU. Pure.

libvirt's codes do not identify the cause: VIR_ERR_SYSTEM_ERROR is any failed system call, VIR_ERR_INTERNAL_ERROR any output of
QEMU. The text does: it consists of fixed phrases (libvirt: src/qemu and src/util; QEMU: hw/vfio and util).
"""

from __future__ import annotations

import re

_DAEMON = "virtqemud (modular daemons) or libvirtd"
_STATUS = "`systemctl status virtqemud.socket` (modular daemons) or `systemctl status libvirtd.socket`"
_PAGES = "compare free_hugepages and resv_hugepages in /sys/kernel/mm/hugepages: another program uses or has reserved huge pages"
_KVM = (
    "enable SVM or VT-x in the firmware, load kvm_amd or kvm_intel, and check that QEMU's user may open /dev/kvm: QEMU cannot use"
    " KVM"
)
_VFIO = (
    "check `journalctl -k --grep 'vfio|RMRR|DMAR|AMD-Vi'`: the firmware reserves memory of this device (RMRR), or the IOMMU lacks"
    " interrupt remapping"
)
_FILE = "check that the file exists and that QEMU's user (libvirt-qemu) may read it and enter each folder above it"
_QEMU_LOG = "check QEMU's output in the guest's log in /var/log/libvirt/qemu"

# The first match counts: special patterns before general ones.
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"failed to connect socket to '[^']*'.*permission denied", "run as root, or as a member of the group libvirt"),
    (r"failed to connect socket to '[^']*/(virt[a-z]+)-sock", "start libvirt's daemon: `systemctl start {0}.socket`"),
    (r"failed to connect socket to '[^']*/libvirt-sock", "start libvirt's daemon: `systemctl start libvirtd.socket`"),
    (
        r"failed to connect socket|end of file while reading data|client socket is closed|cannot (recv|write) data"
        r"|keepalive timeout|internal error: client connection",
        f"check that libvirt's daemon runs, or retry if it was restarted: {_STATUS}",
    ),
    (r"authentication (failed|unavailable|cancelled)|access denied by policy", "run as root, or allow it in polkit"),
    (
        r"set cpu affinity|sched_setaffinity|cpu affinity",
        "compare /sys/devices/system/cpu/online and `systemctl show --property AllowedCPUs machine.slice`, then restart"
        f" {_DAEMON}: the CPUs are offline or outside the cpuset of libvirt's control group",
    ),
    (
        r"cgroup",
        "check that the host mounts cgroup version 2 and that /sys/fs/cgroup/machine.slice/cgroup.controllers lists cpuset:"
        " libvirt could not set up the guest's control group",
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
        "raise LimitMEMLOCK of libvirt's daemon: QEMU must lock the guest's memory",
    ),
    (r"set iommu for container|setup container|rmrr|failed to attach.*iommu", _VFIO),
    (
        r"group \d+ is not viable",
        "check the IOMMU groups with `nohype survey`: another device of the VF's group is bound to a host driver",
    ),
    (
        r"(open|access).*/dev/vfio|no such file.*vfio|passthrough of host pci devices|vfio.*not supported|no iommu found",
        "enable the IOMMU in the firmware, boot with intel_iommu=on on Intel, and `modprobe vfio-pci`: the host does not use an"
        " IOMMU or vfio-pci is not loaded",
    ),
    (r"apparmor|selinux|security label", "check denials of the security module: `journalctl -k --grep 'apparmor|avc'`"),
    (
        r"(cannot|could not|failed to|unable to) (access|open|load|read|stat).*"
        r"(permission denied|no such file|kernel|initrd|storage file)",
        _FILE,
    ),
    (
        r"state change lock",
        "check `virsh domstate --reason NAME`: another libvirt call for this guest has not returned, or QEMU's monitor does not"
        " respond",
    ),
    (r"domain '?[^ ]+'? (already )?exists|already (exists|defined) with uuid|is already active", "check `virsh list --all`"),
    (
        r"unsupported configuration|does not support|not supported by|xml error|does not validate|failed to validate",
        "check the versions with `virsh version`: libvirt or QEMU is too old or built without a required feature",
    ),
    (r"unable to allocate|cannot allocate memory|out of memory", "check `free -h`: the host has no free memory for QEMU itself"),
    (r"monitor|qemu|process exited", _QEMU_LOG),
)
_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE | re.DOTALL), hint) for pattern, hint in _CAUSES)


def find_hint(message: str, *, connecting: bool) -> str:
    """`message` is libvirt's text; `connecting` is set if libvirt could not be reached at all, by its error code."""
    for pattern, hint in _PATTERNS:
        if match := pattern.search(message):
            return hint.format(*match.groups())
    if connecting:
        return f"check that libvirt's daemon runs: {_STATUS}"
    return "check libvirt's messages: `journalctl -u virtqemud -u libvirtd`"
