"""Guests that run now, as libvirt and QEMU report them (never as our records do). Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from uuid import UUID

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
    """A guest that runs now.

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
