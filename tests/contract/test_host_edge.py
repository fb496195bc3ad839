"""The edge mode of a PF. The registers are the device's own on a real host, and a table on the fake one."""

from __future__ import annotations

from dataclasses import replace
from errno import EINVAL, ENODEV, EOPNOTSUPP, EPERM

import pytest

from orchestrator.errors import HostError
from orchestrator.host.edge import describe_edge, read_edge_mode, set_edge_mode
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import set_numvfs
from orchestrator.model.edge import EdgeMode
from orchestrator.model.topology import PhysicalFunction
from tests.fakes.root import DEVICES, FakeRoot

DTXSWC, TXSWC = 0x3500, 0x5ACC
LOW_BITS = 0x7FFF_FFFF


@pytest.fixture(autouse=True)
def _only_82576(pf: PhysicalFunction) -> None:
    if pf.device != "8086:10c9":
        pytest.skip(f"these tests know the registers of the 82576 (8086:10c9), not of {pf.device}")


def resource(pf: PhysicalFunction) -> str:
    """The file of the PF's registers."""
    return f"{DEVICES}/{pf.address}/resource0"


@pytest.mark.parametrize("mode", [EdgeMode.VEPA, EdgeMode.VEB])
def test_the_mode_is_set_and_read_from_the_device(host: HostRoot, pf: PhysicalFunction, mode: EdgeMode) -> None:
    for _ in range(2):
        set_edge_mode(host, pf, mode)
        assert read_edge_mode(host, pf) is mode
        assert str(mode) in describe_edge(host, pf)


def test_the_bits_of_the_driver_stay(host: HostRoot, pf: PhysicalFunction) -> None:
    set_numvfs(host, pf.address, 0)  # new VFs: an operator may have switched the guard of old ones off
    set_numvfs(host, pf.address, 2)
    set_edge_mode(host, pf, EdgeMode.VEB)
    before = host.read32(resource(pf), DTXSWC)
    assert before & LOW_BITS == 0xFBFB, "igb guards all pools but the PF's own, which comes after those of the two VFs"
    set_edge_mode(host, pf, EdgeMode.VEPA)
    assert host.read32(resource(pf), DTXSWC) == before & LOW_BITS
    assert f"{before & LOW_BITS:#010x}" in describe_edge(host, pf)
    set_edge_mode(host, pf, EdgeMode.VEB)
    assert host.read32(resource(pf), DTXSWC) == before


def test_the_driver_switches_in_the_nic_again_when_vfs_are_made(host: HostRoot, pf: PhysicalFunction) -> None:
    """Why the edge mode has to be looked at again after every reset of the PF."""
    set_numvfs(host, pf.address, 0)
    set_edge_mode(host, pf, EdgeMode.VEPA)
    set_numvfs(host, pf.address, 2)
    assert read_edge_mode(host, pf) is EdgeMode.VEB


def test_nothing_is_written_if_the_mode_is_right(fake: FakeRoot, pf: PhysicalFunction) -> None:
    set_edge_mode(fake, pf, EdgeMode.VEPA)
    fake.writes.clear()
    set_edge_mode(fake, pf, EdgeMode.VEPA)
    assert fake.writes == []


@pytest.mark.parametrize(
    ("devices", "offset", "name"),
    [
        (("10c9", "10e6", "10e7", "10e8", "150a", "150d", "1518", "1526"), DTXSWC, "DTXSWC"),
        (("1521", "1522", "1523", "1524", "1546"), TXSWC, "TXSWC"),
    ],
)
def test_each_chip_has_its_register(
    fake: FakeRoot, pf: PhysicalFunction, devices: tuple[str, ...], offset: int, name: str
) -> None:
    for device in devices:
        chip = replace(pf, device=f"8086:{device}")
        fake.registers.clear()
        set_edge_mode(fake, chip, EdgeMode.VEB)
        assert list(fake.registers.items()) == [((fake.real(resource(pf)), offset), 1 << 31)]
        assert describe_edge(fake, chip) == f"PF {pf.address} {name} (BAR0+{offset:#06x}) is 0x80000000, loopback bit 31 set: veb"


@pytest.mark.parametrize(("number", "hint"), [(EINVAL, "iomem=relaxed"), (EPERM, "lockdown")])
def test_registers_that_cannot_be_mapped_come_with_advice(fake: FakeRoot, pf: PhysicalFunction, number: int, hint: str) -> None:
    fake.read_errors[resource(pf)] = number
    calls = (lambda: read_edge_mode(fake, pf), lambda: set_edge_mode(fake, pf, EdgeMode.VEPA), lambda: describe_edge(fake, pf))
    for call in calls:
        with pytest.raises(HostError, match=rf"DTXSWC of PF {pf.address}.*\n.*{hint}") as caught:
            call()
        assert caught.value.errno == number
    fake.read_errors.clear()


def test_registers_that_cannot_be_written_come_with_advice(fake: FakeRoot, pf: PhysicalFunction) -> None:
    set_edge_mode(fake, pf, EdgeMode.VEB)
    fake.write_errors[resource(pf)] = EINVAL
    with pytest.raises(HostError, match="iomem=relaxed"):
        set_edge_mode(fake, pf, EdgeMode.VEPA)
    fake.write_errors.clear()


def test_a_device_that_does_not_answer_is_not_in_any_mode(fake: FakeRoot, pf: PhysicalFunction) -> None:
    before = dict(fake.registers)
    fake.registers[fake.real(resource(pf)), DTXSWC] = 0xFFFF_FFFF
    for call in (lambda: read_edge_mode(fake, pf), lambda: set_edge_mode(fake, pf, EdgeMode.VEPA)):
        with pytest.raises(HostError, match="all ones") as caught:
            call()
        assert caught.value.errno == ENODEV
    fake.registers.update(before)


def test_a_bit_that_does_not_stay_is_an_error_with_both_values(fake: FakeRoot, pf: PhysicalFunction) -> None:
    class Stubborn(FakeRoot):
        def write32(self, name: str, offset: int, value: int) -> None:
            """Takes the write, and does nothing."""

    set_edge_mode(fake, pf, EdgeMode.VEB)
    value = fake.read32(resource(pf), DTXSWC)
    stubborn = Stubborn(fake.path)
    with pytest.raises(HostError, match=rf"is {value:#010x}, expected {value & LOW_BITS:#010x} \(vepa\)"):
        set_edge_mode(stubborn, pf, EdgeMode.VEPA)


def test_a_nic_without_any_way_says_so(fake: FakeRoot, pf: PhysicalFunction) -> None:
    unknown = replace(pf, device="ffff:0001", interface=None)
    assert read_edge_mode(fake, unknown) is None
    assert describe_edge(fake, unknown) == f"PF {pf.address} (no interface, igb) hwmode unknown"
    with pytest.raises(HostError, match=f"cannot set edge mode vepa on PF {pf.address}.*\n.*software edge") as caught:
        set_edge_mode(fake, unknown, EdgeMode.VEPA)
    assert caught.value.errno == EOPNOTSUPP
