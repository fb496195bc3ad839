"""A running guest as libvirt and QEMU report it: the values, and how they are read. The readers raise what libvirt raises."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import libvirt_qemu

from orchestrator.errors import HypervisorError
from orchestrator.hypervisor.unmanaged import parse_cpuset
from orchestrator.model.target import TARGET_WORD
from orchestrator.values import CpuSet, PciAddress, Size

PID_FOLDER = Path("/run/libvirt/qemu")
_QTREE_DEVICE = re.compile(r"^\s*dev: ([^,]+),", re.MULTILINE)


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
    paused: bool = False  # known only if `Hypervisor.read_pinning` has read it


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
    return tuple(EmulatedNic(_find_attribute(one, "target", "dev"), _find_attribute(one, "mac", "address")) for one in found)


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


def _find_attribute(tree: Any, child: str, name: str) -> str:
    """Empty without the child or its attribute."""
    found = tree.find(child)
    return "" if found is None else str(found.get(name, ""))


def _read_address(source: Any) -> PciAddress:
    return PciAddress(*(int(source.get(part), 16) for part in ("domain", "bus", "slot", "function")))


def read_guest(domain: Any) -> RunningGuest:
    tree: Any = ElementTree.fromstring(domain.XMLDesc().encode())
    threads = json.loads(_monitor(domain, json.dumps({"execute": "query-cpus-fast"})))["return"]
    pinning = _parse_pinning(domain, tree, [cpu["cpu-index"] for cpu in threads])
    nodeset = tree.find("numatune/memory")
    pid = _read_pid(domain)
    # After the pid file, which is found by name: the reply shows that this domain still had the name.
    devices = tuple(_QTREE_DEVICE.findall(_monitor(domain, "info qtree", human=True)))
    return RunningGuest(
        name=domain.name(),
        pid=pid,
        vcpus=tuple(Vcpu(cpu["cpu-index"], cpu["thread-id"], pin) for cpu, pin in zip(threads, pinning.pins, strict=True)),
        emulator_pin=pinning.emulator_pin,
        node=int(nodeset.get("nodeset")) if nodeset is not None and nodeset.get("nodeset", "").isdigit() else None,
        memory=Size(domain.maxMemory() * 1024),
        hostdevs=pinning.hostdevs,
        devices=devices,
        uuid=UUID(domain.UUIDString()),
        disks=parse_disks(tree),
        nics=parse_nics(tree),
        targets=parse_targets(tree),
    )


@dataclass(frozen=True)
class DomainText:
    """The XML of a running domain, without secrets, and the files that QEMU read at its start, by their role."""

    xml: str
    files: tuple[tuple[str, str], ...]


def read_text(domain: Any) -> DomainText:
    xml = str(domain.XMLDesc())
    system: Any = ElementTree.fromstring(xml.encode()).find("os")
    # libvirt.org/formatdomain.html#direct-kernel-boot and #bios-bootloader
    found = [(role, system.findtext(role)) for role in ("loader", "kernel", "initrd", "dtb")]
    return DomainText(xml, tuple((role, path) for role, path in found if path and path.startswith("/")))


def read_pinning(domain: Any) -> Pinning:
    tree: Any = ElementTree.fromstring(domain.XMLDesc().encode())
    # `current` is present if fewer vCPUs are plugged in than the maximum (libvirt.org/formatdomain.html#cpu-allocation).
    vcpus = tree.find("vcpu")
    return _parse_pinning(domain, tree, range(int(vcpus.get("current", vcpus.text))))


def read_console(domain: Any) -> SerialConsole:
    # libvirt.org/formatdomain.html#consoles-serial-parallel-channel-devices
    serial: Any = ElementTree.fromstring(domain.XMLDesc().encode()).find("devices/serial[@type='pty']")
    if serial is None:
        return SerialConsole(None, None)
    pty, log = _find_attribute(serial, "source", "path"), _find_attribute(serial, "log", "file")
    return SerialConsole(Path(pty) if pty else None, Path(log) if log else None)


def _parse_pinning(domain: Any, tree: Any, vcpus: Sequence[int]) -> Pinning:
    return parse_pinning(tree, vcpus, lambda: int(domain.connect().getCPUMap()[0]))


def _monitor(domain: Any, command: str, *, human: bool = False) -> str:
    flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP if human else 0
    return str(libvirt_qemu.qemuMonitorCommand(domain, command, flags))


def _read_pid(domain: Any) -> int:
    pid = find_pid(domain.name())
    if pid is None:
        raise HypervisorError(f"cannot read the process id of guest {domain.name()} from {PID_FOLDER}/{domain.name()}.pid")
    return pid


def find_pid(name: str) -> int | None:
    # libvirt has no call for the process id. The pid file is documented (libvirt.org/drvqemu.html).
    try:
        return int((PID_FOLDER / f"{name}.pid").read_text())
    except (OSError, ValueError):
        return None
