"""Domains that the manager did not create: what their XML says, and that one which libvirt can't describe hides no other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import libvirt
import libvirt_qemu
import pytest
from lxml import etree

from orchestrator.errors import HypervisorError
from orchestrator.hypervisor import guests as guests_module
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.hypervisor.guests import parse_pinning
from orchestrator.hypervisor.unmanaged import Unmanaged, parse_cpuset, parse_unmanaged
from orchestrator.values import CpuSet, PciAddress, Size

ID = UUID(int=1)
ADDRESS = "<source><address domain='0x0000' bus='0x10' slot='0x10' function='0x2'/></source>"


def parse(inner: str) -> Unmanaged:
    return parse_unmanaged(Unmanaged("db", ID, running=True), f"<domain><memory unit='MiB'>64</memory>{inner}</domain>")


@pytest.mark.parametrize(
    ("inner", "pins"),
    [
        ("<cputune><vcpupin vcpu='0' cpuset='4'/><vcpupin vcpu='1' cpuset='5'/></cputune>", ["4", "5"]),
        ("<cputune><emulatorpin cpuset='6-7'/></cputune>", ["6-7"]),
        ("<cputune><iothreadpin iothread='1' cpuset='8'/></cputune>", ["8"]),
        ("<vcpu placement='static' cpuset='4-7,^6'>2</vcpu>", ["4-5,7"]),
        ("<vcpu placement='auto'>2</vcpu>", []),
    ],
)
def test_every_way_to_pin_counts(inner: str, pins: list[str]) -> None:
    found = parse(inner)
    assert ([str(cpus) for cpus in found.pins], found.problem) == (pins, "")
    assert found.memory == Size.parse("64M")


@pytest.mark.parametrize("tag", ["memory mode='strict'", "memnode cellid='0' mode='strict'"])
def test_nodes_of_its_memory_count(tag: str) -> None:
    assert parse(f"<numatune><{tag} nodeset='1,3'/></numatune>").nodes == {1, 3}


@pytest.mark.parametrize("kind", ["hostdev mode='subsystem' type='pci'", "interface type='hostdev'", "disk type='nvme'"])
def test_every_way_to_own_a_function_counts(kind: str) -> None:
    tag = kind.split()[0]
    assert parse(f"<devices><{kind}>{ADDRESS}</{tag}></devices>").hostdevs == {PciAddress.parse("10:10.2")}


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("<cputune><vcpupin vcpu='0' cpuset='all'/><emulatorpin cpuset='6'/></cputune>", "'all' is not a list of CPUs"),
        ("<devices><hostdev type='pci'><source><address uuid='4'/></source></hostdev></devices>", "cannot parse the PCI address"),
        ("<vcpu cpuset='99999'>1</vcpu>", "contains more CPUs than the kernel supports"),
    ],
)  # fmt: skip
def test_what_is_odd_is_named_and_the_rest_is_read(inner: str, said: str) -> None:
    found = parse(inner)
    assert said in found.problem
    assert found.memory == Size.parse("64M")
    assert ("emulatorpin" in inner) == (CpuSet.of([6]) in found.pins)


def test_xml_that_is_none() -> None:
    assert "cannot be parsed" in parse_unmanaged(Unmanaged("db", ID, running=True), "<domain").problem


def test_libvirts_sets_can_leave_numbers_out() -> None:
    assert parse_cpuset("0-7,^2,^4") == CpuSet.parse("0-1,3,5-7")


@pytest.mark.parametrize(
    ("inner", "pins", "emulator"),
    [
        ("<vcpu>2</vcpu>", ["0-7", "0-7"], "0-7"),
        ("<vcpu cpuset='4-5'>2</vcpu>", ["4-5", "4-5"], "4-5"),
        ("<vcpu cpuset='4-7,^6'>2</vcpu><cputune><vcpupin vcpu='1' cpuset='2'/></cputune>", ["4-5,7", "2"], "4-5,7"),
        ("<vcpu cpuset='4-5'>2</vcpu><cputune><emulatorpin cpuset='0'/></cputune>", ["4-5", "4-5"], "0"),
    ],
)
def test_vcpus_without_pinning_get_the_default(inner: str, pins: list[str], emulator: str) -> None:
    """So that the audit tells such a guest from one that may run anywhere."""
    pinning = parse_pinning(etree.fromstring(f"<domain>{inner}</domain>"), range(2), lambda: 8)
    assert ([str(cpus) for cpus in pinning.pins], str(pinning.emulator_pin)) == (pins, emulator)


class Error(libvirt.libvirtError):
    def __init__(self, code: int) -> None:
        self._code = code

    def get_error_code(self) -> int:
        return self._code

    def get_error_message(self) -> str:
        return "internal error: odd"


@dataclass
class Domain:
    uuid: UUID
    label: str
    xml: str | int = "<domain><memory>1024</memory><vcpu cpuset='4'>1</vcpu></domain>"

    def UUIDString(self) -> str:
        return str(self.uuid)

    def name(self) -> str:
        return self.label

    def XMLDesc(self) -> str:
        if isinstance(self.xml, int):
            raise Error(self.xml)
        return self.xml

    def maxMemory(self) -> int:
        return 1024

    def connect(self) -> Domain:
        return self

    def getCPUMap(self) -> tuple[int, list[bool], int]:
        return 8, [True] * 8, 8


@dataclass
class Connection:
    """libvirt with these domains."""

    active: list[Domain]
    inactive: list[Domain] = field(default_factory=list)
    alive: bool = True

    def isAlive(self) -> bool:
        return self.alive

    def listAllDomains(self, flags: int) -> list[Domain]:
        return self.active if flags == libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE else self.inactive

    def lookupByUUIDString(self, uuid: str) -> Domain:
        return next(domain for domain in [*self.active, *self.inactive] if str(domain.uuid) == uuid)


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Connection:
    active = [
        Domain(UUID(int=1), "ours"), Domain(UUID(int=2), "odd", libvirt.VIR_ERR_INTERNAL_ERROR),
        Domain(UUID(int=3), "gone", libvirt.VIR_ERR_NO_DOMAIN), Domain(UUID(int=4), "db"),
    ]  # fmt: skip
    made = Connection(active, [Domain(UUID(int=5), "asleep")])
    monkeypatch.setattr(libvirt, "open", lambda _uri: made)
    return made


@pytest.fixture
def hypervisor(connection: Connection) -> Hypervisor:
    return Hypervisor()


def test_domain_without_xml_is_listed_with_its_problem(hypervisor: Hypervisor) -> None:
    running, domains = hypervisor.list_running(frozenset([UUID(int=1)]))
    assert len(running) == 4
    assert [(domain.name, domain.running, bool(domain.problem)) for domain in domains] == [
        ("asleep", False, False), ("db", True, False), ("odd", True, True),
    ]  # fmt: skip
    assert "internal error: odd" in domains[2].problem
    assert domains[0].pins == domains[1].pins == (CpuSet.of([4]),)


def test_unreadable_guest_hides_no_other(hypervisor: Hypervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of which libvirt says nothing, nor one whose XML has something that is not understood."""
    for name in ("ours", "odd", "gone", "db"):
        (tmp_path / f"{name}.pid").write_text("4711\n")
    monkeypatch.setattr(guests_module, "PID_FOLDER", tmp_path)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda *_: '{"return": []}')
    live, unread = hypervisor.read_guests()
    assert [guest.name for guest in live] == ["db", "ours"]
    assert sorted(unread) == ["odd"]


def test_invalid_xml_is_an_error_of_that_guest(hypervisor: Hypervisor, connection: Connection) -> None:
    connection.active[3].xml = "<domain><vcpu>many</vcpu></domain>"
    with pytest.raises(HypervisorError, match="read the pinning .*: cannot parse the reply of libvirt or QEMU: invalid literal"):
        hypervisor.read_pinning(UUID(int=4))


def test_stopped_libvirt_is_an_error(hypervisor: Hypervisor, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    hypervisor.running_uuids()

    def fail(_uri: str) -> None:
        raise Error(libvirt.VIR_ERR_NO_CONNECT)

    connection.alive = False
    monkeypatch.setattr(libvirt, "open", fail)
    with pytest.raises(HypervisorError, match="cannot list guests"):
        hypervisor.list_running(frozenset())
