"""The only user of libvirt: start, stop, look, count exits. libvirt's errors become HypervisorError."""

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
from orchestrator.hypervisor.guests import Bounds, End, LiveGuest, SerialConsole, Vcpu, parse_bounds
from orchestrator.hypervisor.hints import find_hint
from orchestrator.hypervisor.unmanaged import Unmanaged, parse_unmanaged
from orchestrator.values import CpuSet, Size

__all__ = ["Bounds", "End", "Hypervisor", "LiveGuest", "SerialConsole", "Vcpu"]

_Result = TypeVar("_Result")
_VCPU_COUNTER = re.compile(r"vcpu\.(\d+)\.(\w+)\.sum")
_PIDS = "/run/libvirt/qemu"
_QTREE_DEVICE = re.compile(r"^\s*dev: ([^,]+),", re.MULTILINE)


class Hypervisor:
    """A connection to libvirt, opened when it is first needed and again after libvirt was restarted.

    Args:
        uri: libvirt's connection URI (libvirt.org/uri.html).
    """

    def __init__(self, uri: str = "qemu:///system") -> None:
        self._uri = uri
        self._connection: Any = None
        self._lock = threading.Lock()
        # libvirt prints each error on stderr unless a handler takes it; ours arrive as exceptions anyway.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)

    def start(self, xml: str) -> None:
        """Creates a transient guest, paused before its first instruction: libvirt forgets it when it ends, and so leaves nothing.

        Raises:
            HypervisorError: libvirt or QEMU refused.
        """
        flags = libvirt.VIR_DOMAIN_START_VALIDATE | libvirt.VIR_DOMAIN_START_PAUSED
        self._call("start the guest", lambda connection: connection.createXML(xml, flags))

    def resume(self, uuid: UUID) -> None:
        """Lets a paused guest run.

        Raises:
            NotFound: it has ended.
            HypervisorError: libvirt or QEMU refused.
        """
        self._on(uuid, f"resume the guest {uuid}", lambda domain: domain.resume())

    def is_paused(self, uuid: UUID) -> bool:
        """Whether a guest is paused, as it is between ``start`` and ``resume``; False for one that has ended."""
        try:
            state, _ = self._on(uuid, f"look at the guest {uuid}", lambda domain: domain.state())
        except NotFound:
            return False
        return bool(state == libvirt.VIR_DOMAIN_PAUSED)

    def destroy(self, uuid: UUID) -> None:
        """Ends a guest at once. One that has ended already is fine, and so is a stranger's that has taken its name."""
        with suppress(NotFound):
            self._on(uuid, f"end the guest {uuid}", lambda domain: domain.destroy())

    def shutdown(self, uuid: UUID) -> None:
        """Presses a guest's power button (ACPI) and returns at once. One that has ended already is fine."""
        with suppress(NotFound):
            self._on(uuid, f"shut the guest {uuid} down", lambda domain: domain.shutdown())

    def pin(self, uuid: UUID, vcpu: int, cpus: CpuSet) -> None:
        """Lets a vCPU of a running guest run on these host CPUs only.

        Raises:
            NotFound: no such guest runs.
            HypervisorError: libvirt refused.
        """
        self._on(uuid, f"pin vCPU {vcpu} of the guest {uuid}", lambda domain: domain.pinVcpu(vcpu, _cpu_map(domain, cpus)))

    def pin_emulator(self, uuid: UUID, cpus: CpuSet) -> None:
        """Lets QEMU's other threads run on these host CPUs only; raises as ``pin``."""
        self._on(uuid, f"pin the emulator threads of the guest {uuid}", lambda domain: domain.pinEmulator(_cpu_map(domain, cpus)))

    def uuids(self) -> frozenset[UUID]:
        """The ids of all guests that run now, ours or not."""
        return frozenset(self._list())

    def names(self) -> frozenset[str]:
        """The names of all guests that run now, ours or not."""
        return frozenset(self._list().values())

    def guests(self) -> tuple[LiveGuest, ...]:
        """All guests that run now and can be read; see ``read_guests``."""
        return self.read_guests()[0]

    def read_guests(self) -> tuple[tuple[LiveGuest, ...], dict[str, str]]:
        """All guests that run now, managed or not, and by name why some could not be read. One that ends meanwhile is in neither.

        Raises:
            HypervisorError: libvirt cannot be reached.
        """
        live, unread = [], {}
        for uuid, name in sorted(self._list().items(), key=lambda item: item[1]):
            try:
                live.append(self.guest(uuid))
            except HypervisorError as error:
                # One that is just ending can no longer be read; this raises if it is libvirt that is away.
                if uuid in self.uuids():
                    unread[name] = error.message
            except NotFound:
                continue
        return tuple(live), unread

    def look_around(self, known: frozenset[UUID]) -> tuple[frozenset[UUID], tuple[Unmanaged, ...]]:
        """The ids of all guests that run now, and all domains that are not known, those that are shut off too.

        Raises:
            HypervisorError: libvirt cannot be reached.
        """
        running = self._list()
        others = [(uuid, name, True) for uuid, name in running.items() if uuid not in known]
        shut_off = self._list(libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE)
        others += [(uuid, name, False) for uuid, name in shut_off.items() if uuid not in known and uuid not in running]
        found = (self._read_unmanaged(Unmanaged(name, uuid, runs)) for uuid, name, runs in sorted(others, key=lambda one: one[1]))
        return frozenset(running), tuple(domain for domain in found if domain)

    def _read_unmanaged(self, domain: Unmanaged) -> Unmanaged | None:
        """The domain with what libvirt says of it; None if it is gone. What QEMU would have to be asked for is left out."""
        pid = _find_pid(domain.name) if domain.running else None
        try:
            xml = self._on(domain.uuid, f"read the XML of {domain}", lambda found: found.XMLDesc())
        except NotFound:
            return None
        except HypervisorError as error:
            self.uuids()  # raises if it is libvirt that is away
            return replace(domain, pid=pid, problem=error.message)
        return parse_unmanaged(replace(domain, pid=pid), xml)

    def guest(self, uuid: UUID) -> LiveGuest:
        """A running guest.

        Raises:
            NotFound: no such guest runs.
            HypervisorError: libvirt or QEMU refused.
        """
        return self._on(uuid, f"look at the guest {uuid}", _read_guest)

    def console(self, uuid: UUID) -> SerialConsole:
        """The serial console of a running guest, as it was started; raises as ``guest``. One call of libvirt, none of QEMU."""
        return self._on(uuid, f"find the console of the guest {uuid}", _read_console)

    def bounds(self, uuid: UUID) -> Bounds:
        """What a running guest is held to; raises as ``guest``.

        Two calls of libvirt, none of QEMU: ``guest`` takes five, each of which wakes the daemon and several of our threads.
        """
        return self._on(uuid, f"look at the guest {uuid}", _read_bounds)

    def read_exits(self, uuid: UUID) -> tuple[dict[str, int], ...]:
        """KVM's counters of each vCPU since the guest started: ``exits``, ``halt_exits``, ``io_exits``, ...

        The names come from the kernel through QEMU (query-stats) and are no stable interface: treat every key as optional.
        """
        flags = libvirt.VIR_DOMAIN_STATS_VCPU

        def read(domain: Any) -> dict[str, Any]:
            return domain.connect().domainListGetStats([domain], flags)[0][1]  # type: ignore[no-any-return]

        counters: dict[int, dict[str, int]] = {}
        for key, value in self._on(uuid, f"read the exits of the guest {uuid}", read).items():
            if match := _VCPU_COUNTER.fullmatch(key):
                counters.setdefault(int(match[1]), {})[match[2]] = int(value)
        return tuple(counters[index] for index in sorted(counters))

    def watch_ends(self, ended: Callable[[UUID, End], None]) -> None:
        """Calls back whenever a guest ends, from a thread of its own. Call once, before anything else.

        Ends that fall into a restart of libvirt are not told.
        """
        libvirt.virEventRegisterDefaultImpl()
        reasons: dict[str, str] = {}

        def loop() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError:
                    time.sleep(1)  # libvirt was stopped; the next request connects again

        def shutdown(_connection: Any, domain: Any, _event: str, _s: int, _us: int, details: str, _opaque: Any) -> None:
            # QEMU says why (QMP SHUTDOWN); libvirt's own event tells a power-off and a reset by the same word. The first word
            # counts: libvirt then ends QEMU by a signal, and QEMU says that too.
            reasons.setdefault(domain.UUIDString(), str(json.loads(details or "{}").get("reason", "")))

        def stopped(_connection: Any, domain: Any, kind: int, detail: int, _opaque: Any) -> None:
            if kind == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                uuid = domain.UUIDString()
                end = _end(detail, reasons.pop(uuid, ""))
                # Not here: the callback runs inside libvirt's event loop, which must go on while we ask libvirt things.
                threading.Thread(target=ended, args=(UUID(uuid), end), daemon=True).start()

        def connected(connection: Any) -> None:
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, stopped, None)
            libvirt_qemu.qemuMonitorEventRegister(connection, None, "SHUTDOWN", shutdown, None)

        self._on_connect = connected
        threading.Thread(target=loop, name="libvirt-events", daemon=True).start()
        self.names()

    _on_connect: Callable[[Any], object] | None = None

    def _list(self, flags: int = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE) -> dict[UUID, str]:
        """The ids of all guests that run now, and their names: libvirt tells both at once."""

        def read(connection: Any) -> dict[UUID, str]:
            domains = connection.listAllDomains(flags)
            return {UUID(domain.UUIDString()): domain.name() for domain in domains}

        return self._call("list the guests", read)

    def _on(self, uuid: UUID, what: str, use: Callable[[Any], _Result]) -> _Result:
        """By id only: a name may be another guest's by now."""
        try:
            return self._call(what, lambda connection: use(connection.lookupByUUIDString(str(uuid))))
        except HypervisorError as error:
            if error.number in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise NotFound(f"no guest {uuid} runs", "`nohype guest list` shows what runs") from None
            raise

    def _call(self, what: str, use: Callable[[Any], _Result]) -> _Result:
        try:
            return use(self._connect())
        except libvirt.libvirtError as error:
            raise HypervisorError(f"cannot {what}: {error.get_error_message()}", _hint(error), error.get_error_code()) from None
        except (AttributeError, KeyError, TypeError, ValueError, RequestError, etree.XMLSyntaxError) as error:
            # A domain that was started outside the manager may be described in a way that is not known here.
            raise HypervisorError(f"cannot {what}: what libvirt or QEMU said is not understood: {error}") from None

    def _connect(self) -> Any:
        with self._lock:
            if self._connection is None or not self._connection.isAlive():
                self._connection = self._open()
            return self._connection

    def _open(self) -> Any:
        """A connection that tells of ends, if anybody wants to hear of them; else none at all."""
        connection = libvirt.open(self._uri)
        # Without keepalive a libvirt that hangs would hang us too; without an event loop it is refused, which is fine.
        if self._on_connect:
            try:
                # Seconds, count: a libvirt that hangs is noticed after a minute and a half, at two wake-ups a minute.
                connection.setKeepAlive(30, 2)
                self._on_connect(connection)
            except libvirt.libvirtError:
                connection.close()
                raise
        return connection


_ENDS = {"guest-reset": End.RESET, "guest-panic": End.RESET, "host-signal": End.FAILED, "host-error": End.FAILED}


def _end(detail: int, reason: str) -> End:
    """From libvirt's detail (virDomainEventStoppedDetailType) and QEMU's reason (qapi/run-state.json, ShutdownCause)."""
    if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN:
        return _ENDS.get(reason, End.POWERED_OFF)
    if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED:
        return End.DESTROYED
    return End.FAILED


def _cpu_map(domain: Any, cpus: CpuSet) -> tuple[bool, ...]:
    return tuple(cpu in cpus for cpu in range(domain.connect().getCPUMap()[0]))


def _hint(error: Any) -> str:
    return find_hint(error.get_error_message() or "", connecting=error.get_error_code() == libvirt.VIR_ERR_NO_CONNECT)


def _read_guest(domain: Any) -> LiveGuest:
    tree: Any = etree.fromstring(domain.XMLDesc().encode())
    threads = json.loads(_monitor(domain, json.dumps({"execute": "query-cpus-fast"})))["return"]
    bounds = _parse_bounds(domain, tree, [cpu["cpu-index"] for cpu in threads])
    nodeset = tree.find("numatune/memory")
    pid = _read_pid(domain)
    # After the file of the process id, which goes by name: the answer shows that the name was still this domain's.
    devices = tuple(_QTREE_DEVICE.findall(_monitor(domain, "info qtree", human=True)))
    return LiveGuest(
        name=domain.name(),
        pid=pid,
        vcpus=tuple(Vcpu(cpu["cpu-index"], cpu["thread-id"], pin) for cpu, pin in zip(threads, bounds.pins, strict=True)),
        emulator_pin=bounds.emulator_pin,
        node=int(nodeset.get("nodeset")) if nodeset is not None and nodeset.get("nodeset", "").isdigit() else None,
        memory=Size(domain.maxMemory() * 1024),
        hostdevs=bounds.hostdevs,
        devices=devices,
        uuid=UUID(domain.UUIDString()),
    )


def _read_bounds(domain: Any) -> Bounds:
    tree: Any = etree.fromstring(domain.XMLDesc().encode())
    # `current` is there while fewer vCPUs are plugged in than may be (libvirt.org/formatdomain.html#cpu-allocation).
    vcpus = tree.find("vcpu")
    return _parse_bounds(domain, tree, range(int(vcpus.get("current", vcpus.text))))


def _read_console(domain: Any) -> SerialConsole:
    """libvirt.org/formatdomain.html#consoles-serial-parallel-channel-devices."""
    serial: Any = etree.fromstring(domain.XMLDesc().encode()).find("devices/serial[@type='pty']")
    if serial is None:
        return SerialConsole(None, None)
    pty, log = serial.xpath("string(source/@path)"), serial.xpath("string(log/@file)")
    return SerialConsole(Path(pty) if pty else None, Path(log) if log else None)


def _parse_bounds(domain: Any, tree: Any, vcpus: Sequence[int]) -> Bounds:
    return parse_bounds(tree, vcpus, lambda: int(domain.connect().getCPUMap()[0]))


def _monitor(domain: Any, command: str, *, human: bool = False) -> str:
    flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP if human else 0
    return str(libvirt_qemu.qemuMonitorCommand(domain, command, flags))


def _read_pid(domain: Any) -> int:
    pid = _find_pid(domain.name())
    if pid is None:
        raise HypervisorError(f"cannot read the process id of guest {domain.name()} from {_PIDS}/{domain.name()}.pid")
    return pid


def _find_pid(name: str) -> int | None:
    # libvirt has no call for the process id; its own pid file is the documented place (libvirt.org/drvqemu.html).
    try:
        return int(Path(f"{_PIDS}/{name}.pid").read_text())
    except (OSError, ValueError):
        return None
