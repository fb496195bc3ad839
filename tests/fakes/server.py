"""Fake servers of any size, made by code: sockets with SMT, huge pages, kernel threads, interrupts, and PFs of igb's kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator.host.isolation import WORKQUEUE
from orchestrator.images.description import CONSOLE_PROTOCOL, Description, write_description
from orchestrator.model.plan import Policy
from orchestrator.values import CpuSet, Size
from tests.fakes.hypervisor import add_thread
from tests.fakes.nvme import FakeNvme, add_nvme
from tests.fakes.root import FakeRoot, build_host

IMAGE = "minimal"
CLOUD_IMAGE = "debian-cloud"
"""An image that can be configured in all ways."""
DISK_SIZE = 1 << 20
BOOT_ID = "proc/sys/kernel/random/boot_id"
_PF_KTHREAD, _PF_NO_SETAFFINITY = 0x0020_0000, 0x0400_0000  # include/linux/sched.h
_PCI = "sys/bus/pci"


@dataclass(frozen=True)
class Server:
    """What a server has.

    Attributes:
        cores: physical cores, evenly on the nodes; the first of node 0 does the housekeeping, the others are isolated.
        threads: SMT threads of a core.
        nodes: NUMA nodes, each with a socket, a PF and a share of the pages.
        vfs: VFs that a PF can have.
        pages: huge pages of 2 MiB on each node.
        disks: NVMe controllers of 1 MiB with the serial numbers disk0, disk1, ..., evenly on the nodes.
    """

    cores: int
    threads: int = 2
    nodes: int = 2
    vfs: int = 64
    pages: int = 4096
    disks: int = 0

    @property
    def cpus(self) -> CpuSet:
        """All CPUs. A core's siblings are numbered one after the other."""
        return CpuSet.of(range(self.cores * self.threads))

    @property
    def policy(self) -> Policy:
        """How an operator would divide it."""
        uplinks = tuple(f"nic{node}" for node in range(self.nodes))
        return Policy(CpuSet.of(range(self.threads)), uplinks, Size.parse("2M"), vfs_per_uplink=self.vfs)


def build_server(folder: Path, server: Server) -> FakeRoot:
    """Makes the server below the (empty) folder."""
    fake = build_host(folder, "\n".join([*_cpus(server), *_nodes(server), *_nics(server), *_irqs(server)]))
    everywhere = str(server.cpus)
    for number in range(server.disks):
        add_nvme(fake, f"0000:{0x50 + number:02x}:00.0", FakeNvme(f"disk{number}", DISK_SIZE), number % server.nodes)
    tid = 10
    for node in range(server.nodes):
        for name in (f"kswapd{node}", f"kcompactd{node}"):
            tid += 1
            add_thread(fake, tid, tid, name, everywhere, flags=_PF_KTHREAD)
    columns, zeros = " ".join(f"CPU{cpu}" for cpu in server.cpus), "0 " * len(server.cpus)
    fake.add("proc/interrupts", f"{columns}\nLOC: {zeros} Local timer interrupts")
    fake.add("proc/softirqs", f"{columns}\nTIMER: {zeros}")
    # Of the threads that the kernel pins, a few stand for the many: they are read again and again.
    for cpu in list(server.cpus)[:8]:
        add_thread(fake, 100 + cpu, 100 + cpu, f"ksoftirqd/{cpu}", str(cpu), flags=_PF_KTHREAD | _PF_NO_SETAFFINITY)
    return fake


def make_image(store: Path, name: str = IMAGE, **fields: Any) -> None:
    """An image that can be found, and nothing more; with further fields of its description."""
    folder = store / name
    folder.mkdir(parents=True)
    for file in ("vmlinuz", "initrd"):
        (folder / file).write_text("")
    wanted = {
        "cmdline": "quiet",
        "console": CONSOLE_PROTOCOL,
        "kernel_version": "6.12",
        "hash": "0",
        "disengages": True,
        **fields,
    }
    write_description(folder, Description(memory=Size.parse("64M"), **{**wanted, **fields}))


def _cpus(server: Server) -> Iterator[str]:
    folder = "sys/devices/system/cpu"
    everything, isolated = str(server.cpus), str(server.cpus - server.policy.housekeeping)
    yield f"{BOOT_ID} = {uuid4()}"
    yield f"{folder}/online = {everything}"
    yield f"{folder}/possible = {everything}"
    yield f"{folder}/isolated = {isolated}"
    yield "sys/class/misc/kvm/dev = 10:232"
    yield "sys/kernel/debug/kvm/exits = 0"
    yield "proc/cmdline = root=/dev/vda quiet"
    yield f"sys/fs/cgroup/cpuset.cpus.isolated = {isolated}"
    # As without the Ansible role: a manager sets them, and sets them back.
    for name in (f"{WORKQUEUE}/cpumask", f"{WORKQUEUE}/writeback/cpumask", "proc/irq/default_smp_affinity"):
        yield f"{name} = {server.cpus.mask}"
    yield f"proc/sys/kernel/watchdog_cpumask = {everything}"
    for cpu in server.cpus:
        core = cpu // server.threads
        node = core * server.nodes // server.cores
        siblings = CpuSet.of(range(core * server.threads, (core + 1) * server.threads))
        yield f"{folder}/cpu{cpu}/topology/core_cpus_list = {siblings}"
        yield f"{folder}/cpu{cpu}/topology/physical_package_id = {node}"
        yield f"{folder}/cpu{cpu}/node{node} -> ../../node/node{node}"


def _nodes(server: Server) -> Iterator[str]:
    share = server.cores // server.nodes * server.threads
    for node in range(server.nodes):
        folder = f"sys/devices/system/node/node{node}"
        yield f"{folder}/cpulist = {CpuSet.of(range(node * share, (node + 1) * share))}"
        for kib, count in ((2048, server.pages), (1048576, 0)):
            yield f"{folder}/hugepages/hugepages-{kib}kB/nr_hugepages = {count}"
            yield f"{folder}/hugepages/hugepages-{kib}kB/free_hugepages = {count}"


def _nics(server: Server) -> Iterator[str]:
    yield f"{_PCI}/drivers_probe ="
    for driver in ("igb", "vfio-pci"):
        yield f"{_PCI}/drivers/{driver}/bind ="
        yield f"{_PCI}/drivers/{driver}/unbind ="
    for node in range(server.nodes):
        # VFs come at routing ids of their own, up to two buses further on.
        bus = 0x10 + 4 * node
        address, folder = f"0000:{bus:02x}:00.0", f"sys/devices/pci0000:{bus:02x}/0000:{bus:02x}:00.0"
        texts = {
            "vendor": "0x8086", "device": "0x10c9", "class": "0x020000", "numa_node": node, "enable": 1,
            "driver_override": "(null)", "resource0": "", "sriov_totalvfs": server.vfs, "sriov_numvfs": 0, "sriov_offset": 128,
            "sriov_stride": 2, "sriov_vf_device": "10ca", "sriov_drivers_autoprobe": 0,
            f"net/nic{node}/address": f"52:54:00:00:01:{node:02x}", f"net/nic{node}/operstate": "up", f"net/nic{node}/carrier": 1,
            f"net/nic{node}/ifindex": 2 + node, f"net/nic{node}/type": 1, f"net/nic{node}/flags": "0x1003",
        }  # fmt: skip
        for name, text in texts.items():
            yield f"{folder}/{name} = {text}"
        yield f"{_PCI}/devices/{address} -> ../../../devices/pci0000:{bus:02x}/{address}"
        yield f"sys/class/net/nic{node} -> ../../devices/pci0000:{bus:02x}/{address}/net/nic{node}"
        yield f"{folder}/driver -> ../../../bus/pci/drivers/igb"
        yield f"{folder}/resource0 @0x3500 = 0x0"
        yield f"{folder}/iommu_group -> ../../../kernel/iommu_groups/{node}"
        yield f"sys/kernel/iommu_groups/{node}/type = DMA"
        yield f"sys/kernel/iommu_groups/{node}/devices/{address} -> ../../../../devices/pci0000:{bus:02x}/{address}"


def _irqs(server: Server) -> Iterator[str]:
    """A timer, and for each NIC an interrupt that may go anywhere, and one that the kernel manages."""
    names = ["timer", *(f"nic{node}" for node in range(server.nodes)), *(f"nvme{node}q1" for node in range(server.nodes))]
    for number, name in enumerate(names):
        managed = name.startswith("nvme")
        yield f"proc/irq/{number}/smp_affinity_list = {max(server.cpus) if managed else server.cpus}"
        yield f"proc/irq/{number}/effective_affinity_list = 0"
        yield f"sys/kernel/irq/{number}/actions = {name}"
        if managed:
            yield f"proc/irq/{number}/smp_affinity_list !write EPERM"
