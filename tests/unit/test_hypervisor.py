"""How libvirt is asked about a guest: by its id, since another may have its name by the time of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import libvirt
import libvirt_qemu
import pytest

from orchestrator.errors import HypervisorError, NotFound
from orchestrator.hypervisor import connection as hypervisor_module
from orchestrator.hypervisor.connection import Hypervisor, SerialConsole

OLD, NEW, OTHER = (UUID(int=number) for number in (1, 2, 3))
LOG = "<log file='/var/log/nohype/guests/web.log' append='off'/>"
XML = "<domain><vcpu>1</vcpu><cputune><vcpupin vcpu='0' cpuset='{cpu}'/><emulatorpin cpuset='0'/></cputune>{devices}</domain>"


class Domain:
    def __init__(self, libvirtd: Libvirt, uuid: UUID) -> None:
        self._libvirtd, self._uuid = libvirtd, uuid

    def _check(self) -> None:
        if self._uuid not in self._libvirtd.running:
            raise build_error(libvirt.VIR_ERR_OPERATION_INVALID)

    def UUIDString(self) -> str:
        return str(self._uuid)

    def name(self) -> str:
        return self._libvirtd.names[self._uuid]

    def XMLDesc(self) -> str:
        self._check()
        return XML.format(cpu=self._uuid.int, devices=self._libvirtd.devices)

    def maxMemory(self) -> int:
        self._check()
        return 1024

    def connect(self) -> Libvirt:
        return self._libvirtd


class Libvirt:
    """What runs, and what its domains are called. There is no look-up by name."""

    def __init__(self) -> None:
        self.names = {OLD: "web", NEW: "web", OTHER: "db"}
        self.running = [OLD, OTHER]
        self.devices = ""

    def isAlive(self) -> bool:
        return True

    def listAllDomains(self, _flags: int) -> list[Domain]:
        return [Domain(self, uuid) for uuid in self.running]

    def lookupByUUIDString(self, text: str) -> Domain:
        if UUID(text) not in self.running:
            raise build_error(libvirt.VIR_ERR_NO_DOMAIN)
        return Domain(self, UUID(text))

    def domainListGetStats(self, domains: list[Domain], _flags: int) -> list[tuple[Domain, dict[str, int]]]:
        return [(domain, {"vcpu.0.exits.sum": UUID(domain.UUIDString()).int}) for domain in domains]


def build_error(number: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("no")
    error.err = (number, 0, "no", 0, "", None, None, 0, 0)
    return error


@pytest.fixture
def libvirtd(monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    made = Libvirt()
    monkeypatch.setattr(libvirt, "open", lambda _uri: made)

    def monitor(domain: Domain, command: str, _flags: int) -> str:
        domain._check()
        return json.dumps({"return": [{"cpu-index": 0, "thread-id": 7}]}) if "query" in command else ""

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", monitor)
    monkeypatch.setattr(hypervisor_module, "_read_pid", lambda _domain: 4711)
    return made


def replace_old(libvirtd: Libvirt) -> None:
    """The guest ends, and another of its name is started."""
    libvirtd.running = [NEW, OTHER]


def test_a_guest_is_read_by_its_id(libvirtd: Libvirt) -> None:
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


def test_a_guest_whose_name_was_taken_while_all_were_read_is_left_out(libvirtd: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    hypervisor, read = Hypervisor(), hypervisor_module._read_guest

    def read_late(domain: Any) -> Any:
        replace_old(libvirtd)
        return read(domain)

    monkeypatch.setattr(hypervisor_module, "_read_guest", read_late)
    found, unread = hypervisor.read_guests()
    assert ([guest.uuid for guest in found], unread) == ([OTHER], {})


def test_the_process_id_is_not_that_of_another_guest_of_the_name(libvirtd: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt names the file that it is in after the domain."""

    def read_late(_domain: Any) -> int:
        replace_old(libvirtd)
        return 4712

    monkeypatch.setattr(hypervisor_module, "_read_pid", read_late)
    with pytest.raises(NotFound):
        Hypervisor().read_guest(OLD)


def test_trouble_with_a_guest_that_runs_is_no_end(libvirtd: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_domain: Any) -> Any:
        raise HypervisorError("QEMU does not answer")

    monkeypatch.setattr(hypervisor_module, "_read_guest", fail)
    found, unread = Hypervisor().read_guests()
    assert (found, unread) == ((), dict.fromkeys(("db", "web"), "QEMU does not answer"))


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
def test_the_console_is_the_one_that_the_guest_was_started_with(
    libvirtd: Libvirt, devices: str, pty: str | None, log: str | None
) -> None:
    libvirtd.devices = f"<devices>{devices}</devices>"
    assert Hypervisor().console(OLD) == SerialConsole(Path(pty) if pty else None, Path(log) if log else None)
