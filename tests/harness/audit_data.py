"""What was read of a lab host with two running guests (tests/data/audit), as the values that the proofs take.

The lab: 2 sockets x 2 cores x 2 threads, a NUMA node a socket, housekeeping CPUs 0-1; guest1 on CPUs 2-3, guest2 on 4-5, with
256 MB each.
"""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

from orchestrator.host.processes import Maps, Thread, parse_numa_maps, parse_smaps
from orchestrator.hypervisor.connection import RunningGuest, Vcpu
from orchestrator.model.exits import ExitSample
from orchestrator.model.topology import Core, IommuGroup, PagePool, PhysicalFunction, Topology, VirtualFunction
from orchestrator.values import CpuSet, PciAddress, Size

DATA = Path(__file__).parents[1] / "data" / "audit"

HOUSEKEEPING = CpuSet.parse("0-1")
MANAGERS = {"nohyped.service": (4935,), "libvirtd.service": (2040,), "virtqemud.service": (), "virtlogd.service": (491,)}

_HUGE = Size(2 << 20)
_VFS = tuple(PciAddress.parse(f"0000:41:10.{function}") for function in (0, 2, 4, 6))
_PF = PciAddress.parse("0000:41:00.0")

TOPOLOGY = Topology(
    cores=tuple(Core(CpuSet.of((cpu, cpu + 1)), socket=cpu // 4, node=cpu // 4) for cpu in range(0, 8, 2)),
    isolated=CpuSet.parse("2-7"),
    pools=(PagePool(0, _HUGE, 256, 128), PagePool(1, _HUGE, 256, 128)),
    pfs=(
        PhysicalFunction(
            _PF, "nic0", "8086:10c9", "igb", 0, True, None, 7, 128, 2,
            tuple(VirtualFunction(address, index, "vfio-pci", 9 + index) for index, address in enumerate(_VFS)),
        ),
    ),
    iommu_groups=tuple(IommuGroup(9 + index, "DMA", (address,)) for index, address in enumerate(_VFS)),
)  # fmt: skip

# HMP `info qtree` of a guest as domain.build_domain makes it.
_DEVICES = (
    "kvm-ioapic", "q35-pcihost", "vfio-pci", "ICH9-LPC", "isa-serial", "mc146818rtc", "i8257", "i8257", "mch", "fw_cfg_io",
    "kvmclock",
)  # fmt: skip


def _guest(name: str, pid: int, tids: tuple[int, int], cpu: int, node: int, vf: PciAddress) -> RunningGuest:
    vcpus = tuple(Vcpu(index, tid, CpuSet.of((cpu + index,))) for index, tid in enumerate(tids))
    return RunningGuest(name, pid, vcpus, HOUSEKEEPING, node, Size(256 << 20), (vf,), _DEVICES, UUID(int=pid))


GUEST1 = _guest("guest1", 4944, (4955, 4956), 2, 0, _VFS[2])
GUEST2 = _guest("guest2", 4967, (4977, 4978), 4, 1, _VFS[3])
GUESTS = (GUEST1, GUEST2)


def load_threads() -> tuple[Thread, ...]:
    """All threads of the host."""
    return tuple(thread for thread, _ in _read_threads())


def load_last_runs() -> dict[int, float | None]:
    """When each thread ran last, in seconds after boot."""
    return {thread.tid: last_run for thread, last_run in _read_threads()}


def load_maps(name: str) -> Maps:
    """The memory of a guest's QEMU; some of its many libraries are left out."""
    numa = parse_numa_maps((DATA / f"numa_maps-{name}.txt").read_text())
    locked = (DATA / f"status-{name}.txt").read_text().partition("VmLck:")[2].split()[0]
    return Maps(tuple(parse_smaps((DATA / f"smaps-{name}.txt").read_text(), numa)), int(locked) << 10)


def load_exits() -> tuple[ExitSample, ExitSample]:
    """KVM's counters of guest1, twice, 10 s apart, while it idles."""
    before, after = json.loads((DATA / "exits-guest1.json").read_text())
    return ExitSample(before["time"], tuple(before["vcpus"])), ExitSample(after["time"], tuple(after["vcpus"]))


def _read_threads() -> list[tuple[Thread, float | None]]:
    found = []
    for line in (DATA / "threads.txt").read_text().splitlines():
        if not line.startswith("#"):
            pid, tid, flags, started, allowed, last_cpu, _, exec_start, name = line.split(maxsplit=8)
            kernel, pinned = bool(int(flags) & 0x200000), bool(int(flags) & 0x4000000)
            thread = Thread(
                int(pid),
                int(tid),
                name,
                CpuSet.parse(allowed),
                int(last_cpu),
                kernel,
                pinned,
                int(started) / 100,
            )
            found.append((thread, float(exec_start) / 1000 or None))
    return found
