"""How libvirt is asked about a guest: by its id, since another may have its name by the time of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import libvirt
import libvirt_qemu
import pytest

from orchestrator.errors import NotFound
from orchestrator.hypervisor import guests as guests_module
from orchestrator.hypervisor.connection import Hypervisor, SerialConsole
from orchestrator.hypervisor.counters import parse_exits

OLD, NEW, OTHER = (UUID(int=number) for number in (1, 2, 3))
LOG = "<log file='/var/log/nohype/guests/web.log' append='off'/>"
XML = "<domain><vcpu>1</vcpu><cputune><vcpupin vcpu='0' cpuset='{cpu}'/><emulatorpin cpuset='0'/></cputune>{devices}</domain>"


class Domain:
    def __init__(self, libvirtd: Libvirt, uuid: UUID) -> None:
        self._libvirtd, self._uuid = libvirtd, uuid

    def check(self) -> None:
        if self._uuid not in self._libvirtd.running:
            raise build_error(libvirt.VIR_ERR_OPERATION_INVALID)

    def UUIDString(self) -> str:
        return str(self._uuid)

    def name(self) -> str:
        return self._libvirtd.names[self._uuid]

    def XMLDesc(self) -> str:
        self.check()
        return XML.format(cpu=self._uuid.int, devices=self._libvirtd.devices)

    def maxMemory(self) -> int:
        self.check()
        return 1024

    def state(self) -> tuple[int, int]:
        self.check()
        return libvirt.VIR_DOMAIN_RUNNING, 1

    def connect(self) -> Libvirt:
        return self._libvirtd


class Libvirt:
    """What runs, and what its domains are called. There is no look-up by name."""

    def __init__(self) -> None:
        self.names = {OLD: "web", NEW: "web", OTHER: "db"}
        self.running = [OLD, OTHER]
        self.devices = ""
        self.on_lookup: Callable[[], object] = lambda: None
        self.on_reply: Callable[[], object] = lambda: None

    def isAlive(self) -> bool:
        return True

    def listAllDomains(self, _flags: int) -> list[Domain]:
        return [Domain(self, uuid) for uuid in self.running]

    def lookupByUUIDString(self, text: str) -> Domain:
        if UUID(text) not in self.running:
            raise build_error(libvirt.VIR_ERR_NO_DOMAIN)
        self.on_lookup()
        return Domain(self, UUID(text))

    def domainListGetStats(self, domains: list[Domain], _flags: int) -> list[tuple[Domain, dict[str, int]]]:
        return [(domain, {"vcpu.0.exits.sum": UUID(domain.UUIDString()).int}) for domain in domains]


def build_error(number: int, text: str = "no") -> libvirt.libvirtError:
    error = libvirt.libvirtError(text)
    error.err = (number, 0, text, 0, "", None, None, 0, 0)
    return error


@pytest.fixture
def libvirtd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    made = Libvirt()
    monkeypatch.setattr(libvirt, "open", lambda _uri: made)

    def monitor(domain: Domain, command: str, _flags: int) -> str:
        domain.check()
        made.on_reply()
        return json.dumps({"return": [{"cpu-index": 0, "thread-id": 7}]}) if "query" in command else ""

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", monitor)
    for name in ("web", "db"):
        (tmp_path / f"{name}.pid").write_text("4711\n")
    monkeypatch.setattr(guests_module, "PID_FOLDER", tmp_path)
    return made


def replace_old(libvirtd: Libvirt) -> None:
    """The guest ends, and another of its name is started."""
    libvirtd.running = [NEW, OTHER]


def test_guest_is_read_by_its_id(libvirtd: Libvirt) -> None:
    found = Hypervisor().read_guest(OLD)
    assert (found.name, found.uuid, found.pid, str(found.vcpus[0].pin)) == ("web", OLD, 4711, "1")
    replace_old(libvirtd)
    for ask in (Hypervisor().read_guest, Hypervisor().read_pinning, Hypervisor().console, Hypervisor().read_exits):
        with pytest.raises(NotFound, match=f"guest {OLD} is not running"):
            ask(OLD)  # type: ignore[operator]


def test_counters_are_read_by_id(libvirtd: Libvirt) -> None:
    assert Hypervisor().read_exits(OLD) == ({"exits": OLD.int},)
    replace_old(libvirtd)
    assert Hypervisor().read_exits(NEW) == ({"exits": NEW.int},)


@pytest.mark.parametrize(
    ("statistics", "counters"),
    [
        ({}, ()),
        ({"vcpu.current": 2, "vcpu.0.state": 1, "vcpu.0.halt_poll_success_ns.sum": "7"}, ({"halt_poll_success_ns": 7},)),
        ({"vcpu.10.exits.sum": 3, "vcpu.9.exits.sum": 2, "vcpu.9.exits.max": 1}, ({"exits": 2}, {"exits": 3})),
    ],
)
def test_counters_are_sums_by_vcpu(statistics: dict[str, object], counters: tuple[dict[str, int], ...]) -> None:
    assert parse_exits(statistics) == counters


def test_guest_that_was_replaced_during_the_reading_is_omitted(libvirtd: Libvirt) -> None:
    libvirtd.on_lookup = lambda: replace_old(libvirtd)
    found, unread = Hypervisor().read_guests()
    assert ([guest.uuid for guest in found], unread) == ([OTHER], {})


def test_process_id_of_a_replaced_guest_is_not_returned(libvirtd: Libvirt) -> None:
    """libvirt names the file that it is in after the domain: it is read between two replies of QEMU."""
    libvirtd.on_reply = lambda: replace_old(libvirtd)
    with pytest.raises(NotFound):
        Hypervisor().read_guest(OLD)


def test_error_of_a_running_guest_is_reported(libvirtd: Libvirt) -> None:
    def fail() -> None:
        raise build_error(libvirt.VIR_ERR_INTERNAL_ERROR, "QEMU does not answer")

    libvirtd.on_reply = fail
    found, unread = Hypervisor().read_guests()
    assert (found, sorted(unread)) == ((), ["db", "web"])
    assert all("QEMU does not answer" in text for text in unread.values())


@pytest.mark.parametrize(
    ("devices", "pty", "log"),
    [
        (f"<serial type='pty'><source path='/dev/pts/3'/>{LOG}</serial>", "/dev/pts/3", "/var/log/nohype/guests/web.log"),
        ("<serial type='pty'><source path='/dev/pts/3'/></serial><console type='pty'/>", "/dev/pts/3", None),
        (f"<serial type='pty'>{LOG}</serial>", None, "/var/log/nohype/guests/web.log"),
        ("<serial type='file'><source path='/dev/pts/3'/></serial>", None, None),
        ("", None, None),
    ],
)
def test_console_is_read_from_the_running_guest(libvirtd: Libvirt, devices: str, pty: str | None, log: str | None) -> None:
    libvirtd.devices = f"<devices>{devices}</devices>"
    assert Hypervisor().console(OLD) == SerialConsole(Path(pty) if pty else None, Path(log) if log else None)


def test_pinning_of_a_listed_guest_needs_no_lookup(libvirtd: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice per guest and minute: each call wakes two threads."""
    hypervisor = Hypervisor()
    lookups: list[int] = []
    libvirtd.on_lookup = lambda: lookups.append(1)
    first = hypervisor.read_pinning(OLD)
    assert len(lookups) == 1
    hypervisor.running_uuids()
    assert hypervisor.read_pinning(OLD) == first
    assert len(lookups) == 1
    replace_old(libvirtd)
    with pytest.raises(NotFound, match=f"guest {OLD} is not running"):
        hypervisor.read_pinning(OLD)


def test_pinning_after_a_restart_of_libvirt_is_not_read_by_an_old_handle(
    libvirtd: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    hypervisor = Hypervisor()
    lookups: list[int] = []
    hypervisor.running_uuids()
    monkeypatch.setattr(libvirtd, "isAlive", lambda: False)
    again = Libvirt()
    again.on_lookup = lambda: lookups.append(1)
    monkeypatch.setattr(libvirt, "open", lambda _uri: again)
    hypervisor.read_pinning(OLD)
    assert len(lookups) == 1
