"""Writes down what orchestrator/host reads of a host, as data for tests/fakes/root.py. Run as root on the host itself:

    python3 capture_host.py > NAME.txt

Changes nothing: each interrupt is only sent to the CPUs that it is sent to already, to learn whether the kernel allows it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from glob import glob

_FILES = """
sys/devices/system/cpu/{online,isolated,possible}
sys/devices/system/cpu/cpu[0-9]*/topology/{core_cpus_list,physical_package_id,core_id}
sys/devices/system/cpu/cpu[0-9]*/node[0-9]*
sys/devices/system/node/node[0-9]*/cpulist
sys/devices/system/node/node[0-9]*/hugepages/*/{nr_hugepages,free_hugepages,surplus_hugepages}
sys/kernel/mm/hugepages/*/resv_hugepages
sys/class/misc/kvm/dev
proc/cmdline
sys/fs/cgroup/cpuset.cpus.isolated
sys/bus/pci/drivers_probe
sys/bus/pci/drivers/*/{bind,unbind}
sys/bus/pci/devices/*
sys/kernel/iommu_groups/*/type
sys/kernel/iommu_groups/*/devices/*
sys/kernel/irq/*/actions
proc/irq/*/{smp_affinity_list,effective_affinity_list}
"""
_DEVICE = """
vendor device class numa_node enable driver_override driver iommu_group physfn resource0
sriov_totalvfs sriov_numvfs sriov_offset sriov_stride sriov_vf_device sriov_drivers_autoprobe virtfn*
net/*/address net/*/operstate net/*/carrier
""".split()
# Registers whose value tells something, by vendor and device: the switch control of igb's chips (orchestrator/host/edge.py).
_REGISTERS = {"0x8086 0x10c9": 0x3500, "0x8086 0x1521": 0x5ACC}


def main() -> None:
    """Prints one line a file: `path = text`, `path -> target`, `path !read ERRNO`, `path !write ERRNO`."""
    os.chdir("/")
    for pattern in _FILES.split():
        for path in _sorted(_expand(pattern)):
            for line in _describe(path):
                print(line)
    for folder in _sorted({os.path.realpath(link).lstrip("/") for link in glob("sys/bus/pci/devices/*")}):
        for name in _DEVICE:
            for path in _sorted(glob(f"{folder}/{name}")):
                for line in _describe(path):
                    print(line)


def _expand(pattern: str) -> list[str]:
    """glob(3) with one {a,b}, which Python's lacks."""
    head, brace, rest = pattern.partition("{")
    choices, _, tail = rest.partition("}")
    return [path for choice in choices.split(",") for path in glob(head + choice + tail)] if brace else glob(pattern)


def _sorted(paths: Iterable[str]) -> list[str]:
    """Numbers in their order, so that two captures compare well."""
    return sorted(paths, key=lambda path: [part.rjust(8, "0") if part.isdecimal() else part for part in path.split("/")])


def _describe(path: str) -> Iterator[str]:
    if os.path.islink(path):
        yield f"{path} -> {os.readlink(path)}"
        return
    if path.endswith("resource0"):
        yield f"{path} ="
        yield from _describe_register(path)
        return
    try:
        with open(path) as file:
            text = file.read().strip()
        yield f"{path} = {text}".rstrip()
    except OSError as error:
        yield f"{path} ="
        if not (error.errno == errno.EACCES or path.endswith(("bind", "drivers_probe"))):
            yield f"{path} !read {errno.errorcode[error.errno or 0]}"
        return
    if path.endswith("smp_affinity_list"):
        try:
            with open(path, "w") as file:
                file.write(text)
        except OSError as error:
            yield f"{path} !write {errno.errorcode[error.errno or 0]}"


def _describe_register(path: str) -> Iterator[str]:
    folder = os.path.dirname(path)
    with open(f"{folder}/vendor") as vendor, open(f"{folder}/device") as device:
        offset = _REGISTERS.get(f"{vendor.read().strip()} {device.read().strip()}")
    if offset is not None:
        with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size) as registers:
            yield f"{path} @{offset:#x} = {struct.unpack_from('<I', registers, offset)[0]:#x}"


if __name__ == "__main__":
    main()
