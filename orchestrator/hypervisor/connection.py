"""The only user of libvirt: starts, stops, pins and reads guests. libvirt's errors become HypervisorError.

Unless noted otherwise, a method raises NotFound if the guest does not run, and HypervisorError if libvirt or QEMU refuses.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import libvirt
import libvirt_qemu
from lxml import etree

from orchestrator.errors import HypervisorError, NotFound, RequestError
from orchestrator.hypervisor.guests import (
    EndCause,
    Pinning,
    RunningGuest,
    SerialConsole,
    Vcpu,
    parse_disks,
    parse_nics,
    parse_pinning,
    parse_targets,
)
from orchestrator.hypervisor.hints import find_hint
from orchestrator.hypervisor.unmanaged import Unmanaged, parse_unmanaged
from orchestrator.values import CpuSet, Size

__all__ = ["EndCause", "Hypervisor", "Pinning", "RunningGuest", "SerialConsole", "Vcpu"]

_Result = TypeVar("_Result")
_VCPU_COUNTER = re.compile(r"vcpu\.(\d+)\.(\w+)\.sum")
PID_FOLDER = Path("/run/libvirt/qemu")
_QTREE_DEVICE = re.compile(r"^\s*dev: ([^,]+),", re.MULTILINE)


class Hypervisor:
    """A connection to libvirt, opened at the first call and again after a restart of libvirt."""

    def __init__(self, uri: str = "qemu:///system") -> None:
        self._uri = uri
        self._connection: Any = None
        self._lock = threading.Lock()
        # libvirt prints each error on stderr unless a handler takes it; ours arrive as exceptions anyway.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)

    def create_paused(self, xml: str) -> None:
        """Creates a transient guest, paused before its first instruction. libvirt keeps nothing of it after its end."""
        flags = libvirt.VIR_DOMAIN_START_VALIDATE | libvirt.VIR_DOMAIN_START_PAUSED
        self._with_connection("create the guest", lambda connection: connection.createXML(xml, flags))

    def resume(self, uuid: UUID) -> None:
        self._with_domain(uuid, f"resume guest {uuid}", lambda domain: domain.resume())

    def is_paused(self, uuid: UUID) -> bool:
        """False for a guest that has ended."""
        try:
            state, _ = self._with_domain(uuid, f"read the state of guest {uuid}", lambda domain: domain.state())
        except NotFound:
            return False
        return bool(state == libvirt.VIR_DOMAIN_PAUSED)

    def destroy(self, uuid: UUID) -> None:
        """Stops a guest immediately; no error if it has ended."""
        with suppress(NotFound):
            self._with_domain(uuid, f"destroy guest {uuid}", lambda domain: domain.destroy())

    def shutdown(self, uuid: UUID) -> None:
        """Presses the guest's ACPI power button and returns immediately; no error if the guest has ended."""
        with suppress(NotFound):
            self._with_domain(uuid, f"shut down guest {uuid}", lambda domain: domain.shutdown())

    def pin(self, uuid: UUID, vcpu: int, cpus: CpuSet) -> None:
        what = f"pin vCPU {vcpu} of guest {uuid}"
        self._with_domain(uuid, what, lambda domain: domain.pinVcpu(vcpu, _cpu_map(domain, cpus)))

    def pin_emulator(self, uuid: UUID, cpus: CpuSet) -> None:
        """Pins QEMU's threads other than vCPUs and I/O threads."""
        what = f"pin the emulator threads of guest {uuid}"
        self._with_domain(uuid, what, lambda domain: domain.pinEmulator(_cpu_map(domain, cpus)))

    def running_uuids(self) -> frozenset[UUID]:
        """Includes unmanaged guests."""
        return frozenset(self._list())

    def running_names(self) -> frozenset[str]:
        """Includes unmanaged guests."""
        return frozenset(self._list().values())

    def read_guests(self) -> tuple[tuple[RunningGuest, ...], dict[str, str]]:
        """All running guests, managed or not, and the errors of guests that could not be read, by name. A guest that ends
        meanwhile is in neither.
        """
        running, unread = [], {}
        for uuid, name in sorted(self._list().items(), key=lambda item: item[1]):
            try:
                running.append(self.read_guest(uuid))
            except HypervisorError as error:
                # A guest that is ending cannot be read. The call below raises if libvirt cannot be reached at all.
                if uuid in self.running_uuids():
                    unread[name] = error.message
            except NotFound:
                continue
        return tuple(running), unread

    def list_running(self, managed: frozenset[UUID]) -> tuple[frozenset[UUID], tuple[Unmanaged, ...]]:
        """The ids of all running guests, and all domains whose id is not in `managed`, including domains that are shut off."""
        running = self._list()
        unmanaged = [(name, uuid, True) for uuid, name in running.items() if uuid not in managed]
        shut_off = self._list(libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE)
        unmanaged += [(name, uuid, False) for uuid, name in shut_off.items() if uuid not in managed and uuid not in running]
        domains = (self._read_unmanaged(Unmanaged(*domain)) for domain in sorted(unmanaged))
        return frozenset(running), tuple(domain for domain in domains if domain)

    def _read_unmanaged(self, domain: Unmanaged) -> Unmanaged | None:
        """None if the domain no longer exists. Calls libvirt only, not QEMU."""
        pid = _find_pid(domain.name) if domain.running else None
        try:
            xml = self._with_domain(domain.uuid, f"read the XML of {domain}", lambda found: found.XMLDesc())
        except NotFound:
            return None
        except HypervisorError as error:
            self.running_uuids()  # raises if libvirt cannot be reached
            return replace(domain, pid=pid, problem=error.message)
        return parse_unmanaged(replace(domain, pid=pid), xml)

    def read_guest(self, uuid: UUID) -> RunningGuest:
        return self._with_domain(uuid, f"read guest {uuid}", _read_guest)

    def console(self, uuid: UUID) -> SerialConsole:
        return self._with_domain(uuid, f"find the console of guest {uuid}", _read_console)

    def read_pinning(self, uuid: UUID) -> Pinning:
        """Reads pinning and passed-through devices: two libvirt calls, no QMP (`read_guest` takes five)."""
        return self._with_domain(uuid, f"read the pinning of guest {uuid}", _read_pinning)

    def read_exits(self, uuid: UUID) -> tuple[dict[str, int], ...]:
        """KVM's counters per vCPU since the guest started: `exits`, `halt_exits`, `io_exits`, ... The names come from the kernel
        through QEMU (query-stats) and are not stable: treat every key as optional.
        """
        flags = libvirt.VIR_DOMAIN_STATS_VCPU

        def read(domain: Any) -> dict[str, Any]:
            return domain.connect().domainListGetStats([domain], flags)[0][1]  # type: ignore[no-any-return]

        counters: dict[int, dict[str, int]] = {}
        for key, value in self._with_domain(uuid, f"read the exits of guest {uuid}", read).items():
            if match := _VCPU_COUNTER.fullmatch(key):
                counters.setdefault(int(match[1]), {})[match[2]] = int(value)
        return tuple(counters[index] for index in sorted(counters))

    def watch_ends(self, ended: Callable[[UUID, EndCause], None]) -> None:
        """Calls back when a guest ends, each time from a new thread. Call once, before any other method. Ends during a restart
        of libvirt are not reported.
        """
        libvirt.virEventRegisterDefaultImpl()
        reasons: dict[str, str] = {}

        def loop() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError:
                    time.sleep(1)  # libvirt was stopped; the next call connects again

        def shutdown(_connection: Any, domain: Any, _event: str, _s: int, _us: int, details: str, _opaque: Any) -> None:
            # QMP's event SHUTDOWN has the reason; libvirt's own event does not distinguish a power-off from a reset. The first
            # reason counts: libvirt then ends QEMU by a signal, for which QEMU sends another event.
            reasons.setdefault(domain.UUIDString(), str(json.loads(details or "{}").get("reason", "")))

        def stopped(_connection: Any, domain: Any, kind: int, detail: int, _opaque: Any) -> None:
            if kind == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                uuid = domain.UUIDString()
                end = _end_cause(detail, reasons.pop(uuid, ""))
                # In a thread: this callback runs inside libvirt's event loop, which must keep running for calls of libvirt.
                threading.Thread(target=ended, args=(UUID(uuid), end), daemon=True).start()

        def connected(connection: Any) -> None:
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, stopped, None)
            libvirt_qemu.qemuMonitorEventRegister(connection, None, "SHUTDOWN", shutdown, None)

        self._on_connect = connected
        threading.Thread(target=loop, name="libvirt-events", daemon=True).start()
        self.running_names()

    _on_connect: Callable[[Any], object] | None = None

    def _list(self, flags: int = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE) -> dict[UUID, str]:
        def read(connection: Any) -> dict[UUID, str]:
            domains = connection.listAllDomains(flags)
            return {UUID(domain.UUIDString()): domain.name() for domain in domains}

        return self._with_connection("list guests", read)

    def _with_domain(self, uuid: UUID, what: str, use: Callable[[Any], _Result]) -> _Result:
        # By id only: another guest can have the name by now.
        try:
            return self._with_connection(what, lambda connection: use(connection.lookupByUUIDString(str(uuid))))
        except HypervisorError as error:
            if error.number in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise NotFound(f"guest {uuid} is not running", "`nohype guest list` shows running guests") from None
            raise

    def _with_connection(self, what: str, use: Callable[[Any], _Result]) -> _Result:
        try:
            return use(self._connect())
        except libvirt.libvirtError as error:
            raise HypervisorError(f"cannot {what}: {error.get_error_message()}", _hint(error), error.get_error_code()) from None
        except (AttributeError, KeyError, TypeError, ValueError, RequestError, etree.XMLSyntaxError) as error:
            # Domains that were started outside the manager can have elements and values that are not known here.
            raise HypervisorError(f"cannot {what}: cannot parse the reply of libvirt or QEMU: {error}") from None

    def _connect(self) -> Any:
        with self._lock:
            if self._connection is None or not self._connection.isAlive():
                self._connection = self._open()
            return self._connection

    def _open(self) -> Any:
        connection = libvirt.open(self._uri)
        # Without keepalive, calls hang if libvirt hangs. Keepalive needs the event loop of `watch_ends`.
        if self._on_connect:
            try:
                # Interval in seconds, count: a hang is detected after 90 s, at two wake-ups per minute.
                connection.setKeepAlive(30, 2)
                self._on_connect(connection)
            except libvirt.libvirtError:
                connection.close()
                raise
        return connection


_ENDS = {
    "guest-reset": EndCause.RESET,
    "guest-panic": EndCause.RESET,
    "host-signal": EndCause.FAILED,
    "host-error": EndCause.FAILED,
}


def _end_cause(detail: int, reason: str) -> EndCause:
    # detail: virDomainEventStoppedDetailType; reason: QEMU's ShutdownCause (qapi/run-state.json).
    if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN:
        return _ENDS.get(reason, EndCause.POWERED_OFF)
    if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED:
        return EndCause.DESTROYED
    return EndCause.FAILED


def _cpu_map(domain: Any, cpus: CpuSet) -> tuple[bool, ...]:
    return tuple(cpu in cpus for cpu in range(domain.connect().getCPUMap()[0]))


def _hint(error: Any) -> str:
    return find_hint(error.get_error_message() or "", connecting=error.get_error_code() == libvirt.VIR_ERR_NO_CONNECT)


def _read_guest(domain: Any) -> RunningGuest:
    tree: Any = etree.fromstring(domain.XMLDesc().encode())
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


def _read_pinning(domain: Any) -> Pinning:
    tree: Any = etree.fromstring(domain.XMLDesc().encode())
    # `current` is present if fewer vCPUs are plugged in than the maximum (libvirt.org/formatdomain.html#cpu-allocation).
    vcpus = tree.find("vcpu")
    return _parse_pinning(domain, tree, range(int(vcpus.get("current", vcpus.text))))


def _read_console(domain: Any) -> SerialConsole:
    # libvirt.org/formatdomain.html#consoles-serial-parallel-channel-devices
    serial: Any = etree.fromstring(domain.XMLDesc().encode()).find("devices/serial[@type='pty']")
    if serial is None:
        return SerialConsole(None, None)
    pty, log = serial.xpath("string(source/@path)"), serial.xpath("string(log/@file)")
    return SerialConsole(Path(pty) if pty else None, Path(log) if log else None)


def _parse_pinning(domain: Any, tree: Any, vcpus: Sequence[int]) -> Pinning:
    return parse_pinning(tree, vcpus, lambda: int(domain.connect().getCPUMap()[0]))


def _monitor(domain: Any, command: str, *, human: bool = False) -> str:
    flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP if human else 0
    return str(libvirt_qemu.qemuMonitorCommand(domain, command, flags))


def _read_pid(domain: Any) -> int:
    pid = _find_pid(domain.name())
    if pid is None:
        raise HypervisorError(f"cannot read the process id of guest {domain.name()} from {PID_FOLDER}/{domain.name()}.pid")
    return pid


def _find_pid(name: str) -> int | None:
    # libvirt has no call for the process id. The pid file is documented (libvirt.org/drvqemu.html).
    try:
        return int((PID_FOLDER / f"{name}.pid").read_text())
    except (OSError, ValueError):
        return None
