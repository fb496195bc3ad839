"""A guest that runs now, as libvirt and QEMU tell it: the values that `hypervisor` fills in, and what the XML says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

from orchestrator.hypervisor.unmanaged import parse_cpuset
from orchestrator.values import CpuSet, PciAddress, Size


class End(StrEnum):
    """How a guest has ended."""

    POWERED_OFF = "powered off"
    RESET = "reset itself"
    """Its kernel rebooted, as it does on request, or panicked: nothing tells the two apart."""
    DESTROYED = "was ended from outside"
    FAILED = "failed"
    """QEMU has died, or somebody has killed it."""
    UNKNOWN = "ended unseen"


@dataclass(frozen=True)
class Vcpu:
    """A vCPU of a running guest: its number, its host thread (QMP query-cpus-fast) and the CPUs libvirt pins it to."""

    index: int
    tid: int
    pin: CpuSet


@dataclass(frozen=True)
class Bounds:
    """What libvirt holds a running guest to: the part of LiveGuest that can be had without asking QEMU.

    Attributes:
        pins: CPUs of each vCPU, by its number.
        emulator_pin, hostdevs: see LiveGuest.
    """

    pins: tuple[CpuSet, ...]
    emulator_pin: CpuSet
    hostdevs: tuple[PciAddress, ...]


@dataclass(frozen=True)
class LiveGuest:
    """A guest that runs now, as libvirt and QEMU tell it (never as our records do).

    Attributes:
        pid: QEMU's process id.
        vcpus: its vCPUs with their host threads.
        emulator_pin: CPUs that libvirt gives QEMU's other threads.
        node: NUMA node its memory is bound to, None if it is not bound.
        memory: configured memory.
        hostdevs: host PCI functions passed through.
        devices: QEMU's device models in the guest, one entry a device (HMP `info qtree`): "isa-serial", "vfio-pci", ...
        uuid: libvirt's id: another guest may have the name by now.
    """

    name: str
    pid: int
    vcpus: tuple[Vcpu, ...]
    emulator_pin: CpuSet
    node: int | None
    memory: Size
    hostdevs: tuple[PciAddress, ...]
    devices: tuple[str, ...]
    uuid: UUID

    @property
    def bounds(self) -> Bounds:
        """What it is held to."""
        return Bounds(tuple(vcpu.pin for vcpu in self.vcpus), self.emulator_pin, self.hostdevs)


@dataclass(frozen=True)
class SerialConsole:
    """The serial console of a running guest.

    Attributes:
        pty: QEMU's end of it, None if there is none.
        log: file that gets a copy of all that the guest prints, None if there is none.
    """

    pty: Path | None
    log: Path | None


def parse_bounds(tree: Any, vcpus: Sequence[int], count_cpus: Callable[[], int]) -> Bounds:
    """What the domain's XML says of these vCPUs, of QEMU's other threads, and of devices.

    Args:
        tree: the root element.
        count_cpus: asks libvirt how many CPUs the host has; used only if something is not pinned, which with our guests is never.
    """
    pins = {int(pin.get("vcpu")): parse_cpuset(pin.get("cpuset")) for pin in tree.iterfind("cputune/vcpupin")}
    emulator = tree.find("cputune/emulatorpin")
    rest = CpuSet()
    if emulator is None or not pins.keys() >= set(vcpus):
        # What no element pins by itself may run where <vcpu cpuset=> says (libvirt.org/formatdomain.html#cpu-allocation).
        default = tree.find("vcpu").get("cpuset")
        rest = parse_cpuset(default) if default else CpuSet.of(range(count_cpus()))
    return Bounds(
        pins=tuple(pins.get(index, rest) for index in vcpus),
        emulator_pin=parse_cpuset(emulator.get("cpuset")) if emulator is not None else rest,
        hostdevs=tuple(_read_address(source) for source in tree.iterfind("devices/hostdev[@type='pci']/source/address")),
    )


def _read_address(source: Any) -> PciAddress:
    return PciAddress(*(int(source.get(part), 16) for part in ("domain", "bus", "slot", "function")))
