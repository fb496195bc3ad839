"""A running guest as libvirt and QEMU report it: the values that `hypervisor` fills in, and the parser of their XML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

from orchestrator.hypervisor.unmanaged import parse_cpuset
from orchestrator.model.target import TARGET_WORD
from orchestrator.values import CpuSet, PciAddress, Size


class EndCause(StrEnum):
    POWERED_OFF = "powered off"
    RESET = "reset (reboot or panic)"  # QEMU reports the same reason for both
    DESTROYED = "destroyed outside the manager"
    FAILED = "failed"  # QEMU exited or was killed
    UNKNOWN = "end not observed"


@dataclass(frozen=True)
class Vcpu:
    """A vCPU with its host thread (QMP query-cpus-fast) and the CPUs that libvirt pins it to."""

    index: int
    tid: int
    pin: CpuSet


@dataclass(frozen=True)
class EmulatedNic:
    """A NIC that QEMU emulates: the host's interface for it, empty if libvirt names none, and its Ethernet address."""

    interface: str
    mac: str


@dataclass(frozen=True)
class Pinning:
    """The part of RunningGuest that libvirt reports without a call of QEMU."""

    pins: tuple[CpuSet, ...]  # CPUs per vCPU
    emulator_pin: CpuSet
    hostdevs: tuple[PciAddress, ...]
    interfaces: tuple[str, ...] = ()  # the host's network interfaces of emulated NICs


@dataclass(frozen=True)
class RunningGuest:
    """A guest as libvirt and QEMU report it, never as the ledger records it."""

    name: str
    pid: int  # of QEMU
    vcpus: tuple[Vcpu, ...]
    emulator_pin: CpuSet
    node: int | None  # to which the memory is bound, None if it is not bound
    memory: Size
    hostdevs: tuple[PciAddress, ...]
    devices: tuple[str, ...]  # QEMU's device models, one entry per device (HMP `info qtree`): "isa-serial", "vfio-pci", ...
    uuid: UUID
    disks: tuple[str, ...] = ()  # files, block devices and the like of emulated disks
    nics: tuple[EmulatedNic, ...] = ()
    targets: tuple[str, ...] = ()  # URLs of network disks on its kernel command line

    @property
    def pinning(self) -> Pinning:
        interfaces = tuple(nic.interface for nic in self.nics)
        return Pinning(tuple(vcpu.pin for vcpu in self.vcpus), self.emulator_pin, self.hostdevs, interfaces)


@dataclass(frozen=True)
class SerialConsole:
    pty: Path | None
    log: Path | None  # file with a copy of the guest's output


def parse_pinning(tree: Any, vcpus: Sequence[int], count_cpus: Callable[[], int]) -> Pinning:
    """`count_cpus` returns the number of host CPUs. It is called only if threads are not pinned, never for managed guests."""
    pins = {int(pin.get("vcpu")): parse_cpuset(pin.get("cpuset")) for pin in tree.iterfind("cputune/vcpupin")}
    emulator = tree.find("cputune/emulatorpin")
    rest = CpuSet()
    if emulator is None or not pins.keys() >= set(vcpus):
        # <vcpu cpuset=> is the default for threads without an element (libvirt.org/formatdomain.html#cpu-allocation).
        default = tree.find("vcpu").get("cpuset")
        rest = parse_cpuset(default) if default else CpuSet.of(range(count_cpus()))
    return Pinning(
        pins=tuple(pins.get(index, rest) for index in vcpus),
        emulator_pin=parse_cpuset(emulator.get("cpuset")) if emulator is not None else rest,
        hostdevs=tuple(_read_address(source) for source in tree.iterfind("devices/hostdev[@type='pci']/source/address")),
        interfaces=tuple(nic.interface for nic in parse_nics(tree)),
    )


def parse_nics(tree: Any) -> tuple[EmulatedNic, ...]:
    """All but passed-through ones (https://libvirt.org/formatdomain.html#network-interfaces)."""
    found = [interface for interface in tree.iterfind("devices/interface") if interface.get("type") != "hostdev"]
    return tuple(EmulatedNic(one.xpath("string(target/@dev)"), one.xpath("string(mac/@address)")) for one in found)


def parse_disks(tree: Any) -> tuple[str, ...]:
    """The source of each emulated disk, or its name in the guest (https://libvirt.org/formatdomain.html#hard-drives)."""
    found = []
    for disk in tree.iterfind("devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        names = [source.get(key) for key in ("file", "dev", "volume", "name", "dir") if source is not None and source.get(key)]
        found.append(names[0] if names else str(target.get("dev")) if target is not None else "unknown")
    return tuple(found)


def parse_targets(tree: Any) -> tuple[str, ...]:
    """The network disk of a guest is known only by the kernel command line with which it was started."""
    words = (tree.findtext("os/cmdline") or "").split()
    return tuple(word.removeprefix(TARGET_WORD) for word in words if word.startswith(TARGET_WORD))


def _read_address(source: Any) -> PciAddress:
    return PciAddress(*(int(source.get(part), 16) for part in ("domain", "bus", "slot", "function")))
