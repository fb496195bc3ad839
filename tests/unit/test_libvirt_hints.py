"""Hints for errors of libvirt and QEMU: each names the cause that the text tells, not the one that the code suggests."""

from __future__ import annotations

import pytest

from orchestrator.hypervisor.hints import find_hint

QEMU = "qemu unexpectedly closed the monitor: "


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("cannot set CPU affinity on process 4242: Invalid argument", "the CPUs are offline or outside the cpuset"),
        ("Unable to write to '/sys/fs/cgroup/machine.slice/x.scope/cpuset.cpus': Permission denied", "control group"),
        ("Failed to create controller cpuset for group: No such file or directory (cgroup)", "cgroup version 2"),
        ("Failed to connect socket to '/var/run/libvirt/virtqemud-sock': No such file", "`systemctl start virtqemud.socket`"),
        ("Failed to connect socket to '/run/libvirt/virtlogd-sock': Connection refused", "`systemctl start virtlogd.socket`"),
        ("Failed to connect socket to '/var/run/libvirt/libvirt-sock': No such file", "`systemctl start libvirtd.socket`"),
        ("Failed to connect socket to '/var/run/libvirt/libvirt-sock': Permission denied", "group libvirt"),
        ("End of file while reading data: Input/output error", "check that libvirt's daemon runs, or retry"),
        ("internal error: client socket is closed", "`systemctl status virtqemud.socket` (modular daemons) or"),
        ("Cannot access storage file '/srv/images/vmlinuz': Permission denied", "QEMU's user (libvirt-qemu) may read it"),
        (f"{QEMU}qemu-system-x86_64: could not load kernel '/srv/vmlinuz': No such file", "may read it"),
        (f"{QEMU}vfio 0000:10:10.0: failed to setup container for group 9: Failed to set iommu for container", "RMRR"),
        (f"{QEMU}vfio 0000:10:10.0: group 9 is not viable", "bound to a host driver"),
        (f"{QEMU}Could not open '/dev/vfio/9': No such file or directory", "vfio-pci is not loaded"),
        ("host doesn't support passthrough of host PCI devices", "the host does not use an IOMMU"),
        (f"{QEMU}unable to map backing store for guest RAM: Cannot allocate memory", "resv_hugepages"),
        (f"{QEMU}os_mem_prealloc: Insufficient free host memory pages available to allocate guest RAM", "resv_hugepages"),
        ("internal error: Unable to find any usable hugetlbfs mount for 1048576 KiB", "mount -t hugetlbfs"),
        (f"{QEMU}vfio_container_dma_map(0x1, 0x0, 0xa0000) = -12 (Cannot allocate memory)", "LimitMEMLOCK"),
        ("could not get preferred machine for /usr/bin/qemu-system-x86_64 type=kvm", "cannot use KVM"),
        ("Emulator '/usr/bin/qemu-system-x86_64' does not support virt type 'kvm'", "cannot use KVM"),
        (f"{QEMU}Could not access KVM kernel module: Permission denied", "may open /dev/kvm"),
        ("cannot acquire state change lock (held by monitor=remoteDispatchDomainGetBlockInfo)", "has not returned"),
        ("internal error: cannot load AppArmor profile 'libvirt-4e6f'", "security module"),
        ("operation failed: domain 'web' already exists with uuid 4e6f", "virsh list --all"),
        ("unsupported configuration: hint-dedicated is not supported by this QEMU", "`virsh version`"),
        (f"{QEMU}2026-01-01: something of its own", "/var/log/libvirt/qemu"),
        ("Timed out during operation", "`journalctl -u virtqemud -u libvirtd`"),
    ],
)  # fmt: skip
def test_the_hint_is_that_of_the_cause(message: str, said: str) -> None:
    assert said in find_hint(message, connecting=False)


def test_a_libvirt_that_cannot_be_reached_is_named_with_both_kinds_of_daemons() -> None:
    hint = find_hint("failed to open a connection", connecting=True)
    assert "virtqemud.socket" in hint
    assert "libvirtd.socket" in hint
