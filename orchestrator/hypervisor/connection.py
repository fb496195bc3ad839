"""The connection to libvirt: starts, stops, pins and reads guests. libvirt's errors become HypervisorError.

Unless noted otherwise, a method raises NotFound if the guest does not run, and HypervisorError if libvirt or QEMU refuses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar
from uuid import UUID
from xml.etree import ElementTree

import libvirt

from orchestrator.errors import HypervisorError, NotFound, RequestError
from orchestrator.hypervisor.counters import read_exits
from orchestrator.hypervisor.events import EndWatch, OnEnd, start_event_loop
from orchestrator.hypervisor.guests import (
    DomainText,
    EndCause,
    Pinning,
    RunningGuest,
    SerialConsole,
    Vcpu,
    find_pid,
    read_console,
    read_guest,
    read_pinning,
    read_text,
)
from orchestrator.hypervisor.hints import find_hint
from orchestrator.hypervisor.unmanaged import Unmanaged, parse_unmanaged
from orchestrator.values import CpuSet

__all__ = ["EndCause", "Hypervisor", "Pinning", "RunningGuest", "SerialConsole", "Vcpu"]

_Result = TypeVar("_Result")


class Hypervisor:
    """A connection to libvirt, opened at the first call and again after a restart of libvirt."""

    def __init__(self, uri: str = "qemu:///system") -> None:
        self._uri = uri
        self._connection: Any = None
        self._ends: EndWatch | None = None
        self._lock = threading.Lock()
        self._listed: tuple[Any, dict[UUID, Any]] = (None, {})  # running domains as last listed, and the connection of that call
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
            return self._with_domain(uuid, f"read the state of guest {uuid}", _is_paused)
        except NotFound:
            return False

    def pause(self, uuid: UUID) -> None:
        """Stops the vCPUs; no-op if they are stopped. Raises NotFound if the guest has ended."""
        self._with_domain(uuid, f"pause guest {uuid}", lambda domain: domain.suspend())

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
        pid = find_pid(domain.name) if domain.running else None
        try:
            xml = self._with_domain(domain.uuid, f"read the XML of {domain}", lambda found: found.XMLDesc())
        except NotFound:
            return None
        except HypervisorError as error:
            self.running_uuids()  # raises if libvirt cannot be reached
            return replace(domain, pid=pid, problem=error.message)
        return parse_unmanaged(replace(domain, pid=pid), xml)

    def read_guest(self, uuid: UUID) -> RunningGuest:
        return self._with_domain(uuid, f"read guest {uuid}", read_guest)

    def console(self, uuid: UUID) -> SerialConsole:
        return self._with_domain(uuid, f"find the console of guest {uuid}", read_console)

    def read_pinning(self, uuid: UUID) -> Pinning:
        """Reads pinning, passed-through devices and whether the guest is paused: two libvirt calls, no QMP (`read_guest` takes
        five).
        """
        return self._with_domain(uuid, f"read the pinning of guest {uuid}", _read_pinning, listed=True)

    def read_text(self, uuid: UUID) -> DomainText:
        return self._with_domain(uuid, f"read the XML of guest {uuid}", read_text)

    def read_versions(self) -> dict[str, str]:
        """Of the installed libvirt and QEMU: QEMU of a running guest may be older."""

        def read(connection: Any) -> dict[str, str]:
            numbers = {"libvirt": connection.getLibVersion(), "qemu": connection.getVersion()}
            return {name: f"{n // 1_000_000}.{n // 1000 % 1000}.{n % 1000}" for name, n in numbers.items()}

        return self._with_connection("read the versions of libvirt and QEMU", read)

    def read_exits(self, uuid: UUID) -> tuple[dict[str, int], ...]:
        """KVM's counters per vCPU since the guest started. Treat every key as optional."""
        return self._with_domain(uuid, f"read the exits of guest {uuid}", read_exits)

    def watch_ends(self, ended: OnEnd) -> None:
        """Calls back when a guest ends, each time from a new thread. Call once, before any other method. Ends during a restart
        of libvirt are not reported.
        """
        start_event_loop()
        self._ends = EndWatch(ended)
        self.running_names()

    def _list(self, flags: int = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE) -> dict[UUID, str]:
        def read(connection: Any) -> dict[UUID, str]:
            domains = {UUID(domain.UUIDString()): domain for domain in connection.listAllDomains(flags)}
            if flags == libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE:
                self._listed = connection, domains
            return {uuid: domain.name() for uuid, domain in domains.items()}

        return self._with_connection("list guests", read)

    def _with_domain(self, uuid: UUID, what: str, use: Callable[[Any], _Result], *, listed: bool = False) -> _Result:
        """``listed``: saves a call if the domain was listed before. libvirt finds it by its id; only its name may be old."""

        def find(connection: Any) -> Any:
            lister, domains = self._listed
            known = domains.get(uuid) if listed and lister is connection else None
            # By id only: another guest can have the name by now.
            return known or connection.lookupByUUIDString(str(uuid))

        try:
            return self._with_connection(what, lambda connection: use(find(connection)))
        except HypervisorError as error:
            if error.number in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise NotFound(f"guest {uuid} is not running", "`nohype guest list` shows running guests") from None
            raise

    def _with_connection(self, what: str, use: Callable[[Any], _Result]) -> _Result:
        try:
            return use(self._connect())
        except libvirt.libvirtError as error:
            raise HypervisorError(f"cannot {what}: {error.get_error_message()}", _hint(error), error.get_error_code()) from None
        except (AttributeError, KeyError, TypeError, ValueError, RequestError, ElementTree.ParseError) as error:
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
        if self._ends:
            try:
                # Interval in seconds, count: a hang is detected after 90 s, at two wake-ups per minute.
                connection.setKeepAlive(30, 2)
                self._ends.register(connection)
            except libvirt.libvirtError:
                connection.close()
                raise
        return connection


def _is_paused(domain: Any) -> bool:
    state, _ = domain.state()
    return bool(state == libvirt.VIR_DOMAIN_PAUSED)


def _read_pinning(domain: Any) -> Pinning:
    return replace(read_pinning(domain), paused=_is_paused(domain))


def _cpu_map(domain: Any, cpus: CpuSet) -> tuple[bool, ...]:
    return tuple(cpu in cpus for cpu in range(domain.connect().getCPUMap()[0]))


def _hint(error: Any) -> str:
    return find_hint(error.get_error_message() or "", connecting=error.get_error_code() == libvirt.VIR_ERR_NO_CONNECT)
