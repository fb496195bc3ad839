"""SR-IOV functions, drivers and IOMMU groups. On a real host the VFs of the PF are made and destroyed here."""

from __future__ import annotations

from errno import EBUSY, EIO, ENODEV, ENOENT, ENOMEM, EPERM, ERANGE

import pytest

from orchestrator.errors import HostError
from orchestrator.host.iommu import read_iommu_group, read_iommu_groups
from orchestrator.host.pci import bind_driver, read_driver, release_driver
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_numvfs, read_pfs, set_numvfs
from orchestrator.model.topology import PhysicalFunction
from orchestrator.values import PciAddress
from tests.contract.conftest import Holder, release_vfs
from tests.fakes.root import DEVICES, FakeRoot

NOWHERE = PciAddress.parse("0000:ff:1f.7")


def read_pf(host: HostRoot, pf: PhysicalFunction) -> PhysicalFunction:
    """The PF as it is now."""
    return next(now for now in read_pfs(host) if now.address == pf.address)


def make_vfs(host: HostRoot, pf: PhysicalFunction, count: int) -> list[PciAddress]:
    """Gives the PF that many VFs without a driver."""
    set_numvfs(host, pf.address, count)
    # A VF driver that is loaded while there are VFs takes those that it may probe.
    release_vfs(host, pf)
    return [vf.address for vf in read_pf(host, pf).vfs]


def test_a_pf_is_described(host: HostRoot, pf: PhysicalFunction) -> None:
    assert pf.interface
    assert host.read(f"sys/bus/pci/devices/{pf.address}/net/{pf.interface}/address") == str(pf.mac)
    vendor, _, device = pf.device.partition(":")
    assert host.read(f"sys/bus/pci/devices/{pf.address}/vendor") == f"0x{vendor}"
    assert host.read(f"sys/bus/pci/devices/{pf.address}/device") == f"0x{device}"
    assert pf.driver
    assert pf.up
    assert pf.total_vfs > 0
    assert len(pf.vfs) == read_numvfs(host, pf.address)


def test_functions_without_sriov_are_no_pfs(host: HostRoot) -> None:
    capable = [name for name in host.names(DEVICES) if host.exists(f"{DEVICES}/{name}/sriov_totalvfs")]
    assert {str(pf.address) for pf in read_pfs(host)} <= set(capable)
    assert len(capable) < len(host.names(DEVICES))


def test_an_sriov_function_that_is_no_nic_is_left_out(fake: FakeRoot, pf: PhysicalFunction) -> None:
    folder = fake.path / DEVICES / str(pf.address)
    fake.add(f"{DEVICES}/{pf.address}/class", "0x010802")  # an NVMe controller can have VFs too
    (folder / "net").rename(folder / "nvme")
    assert read_pfs(fake) == ()
    (folder / "nvme").rename(folder / "net")
    assert [found.address for found in read_pfs(fake)] == [pf.address], "with a network interface it is a NIC, whatever its class"
    fake.add(f"{DEVICES}/{pf.address}/class", "0x020000")


@pytest.mark.parametrize(("name", "text"), [("operstate", "down"), ("carrier", "0")])
def test_a_pf_without_link_is_not_up(fake: FakeRoot, pf: PhysicalFunction, name: str, text: str) -> None:
    fake.add(f"{DEVICES}/{pf.address}/net/{pf.interface}/{name}", text)
    assert not read_pf(fake, pf).up


def test_vfs_are_made_where_the_pf_says_they_will_be(host: HostRoot, pf: PhysicalFunction) -> None:
    made = make_vfs(host, pf, 2)
    assert made == [pf.vf_address(index) for index in range(2)]
    assert [vf.index for vf in read_pf(host, pf).vfs] == [0, 1]
    assert all(host.link(f"{DEVICES}/{vf}/physfn") == str(pf.address) for vf in made)


def test_fresh_vfs_have_no_driver_where_the_host_has_one_for_them(host: HostRoot, pf: PhysicalFunction, vf_driver: str) -> None:
    assert host.exists(f"sys/bus/pci/drivers/{vf_driver}")
    autoprobe = f"{DEVICES}/{pf.address}/sriov_drivers_autoprobe"
    before = host.read(autoprobe)
    host.write(autoprobe, "1")
    set_numvfs(host, pf.address, 0)
    try:
        set_numvfs(host, pf.address, 2)
        assert [vf.driver for vf in read_pf(host, pf).vfs] == [None, None]
        assert host.read(autoprobe) == "1"
    finally:
        host.write(autoprobe, before)


def test_the_number_of_vfs_changes_and_returns_to_none(host: HostRoot, pf: PhysicalFunction) -> None:
    for count in (3, 1, 0):
        set_numvfs(host, pf.address, count)
        assert read_numvfs(host, pf.address) == count == len(read_pf(host, pf).vfs)
    assert not host.exists(f"{DEVICES}/{pf.vf_address(0)}")


def test_the_same_number_changes_nothing(host: HostRoot, pf: PhysicalFunction) -> None:
    make_vfs(host, pf, 2)
    host.write(f"{DEVICES}/{pf.vf_address(0)}/driver_override", "marker")
    set_numvfs(host, pf.address, 2)
    assert host.read(f"{DEVICES}/{pf.vf_address(0)}/driver_override") == "marker"


@pytest.mark.parametrize("count", [-1, 1000])
def test_too_many_vfs_leave_the_ones_that_are_there(host: HostRoot, pf: PhysicalFunction, count: int) -> None:
    make_vfs(host, pf, 2)
    with pytest.raises(HostError, match=f"cannot create {count} VFs on PF {pf.address}: the maximum is {pf.total_vfs}") as caught:
        set_numvfs(host, pf.address, count)
    assert caught.value.errno == ERANGE
    assert read_numvfs(host, pf.address) == 2


def test_vfs_of_what_is_no_pf(host: HostRoot, pf: PhysicalFunction) -> None:
    vf = make_vfs(host, pf, 2)[0]
    for address in (vf, NOWHERE):
        with pytest.raises(HostError, match=f"{address} is not an SR-IOV physical function") as caught:
            set_numvfs(host, address, 1)
        assert caught.value.errno == ENODEV


@pytest.mark.parametrize(
    ("number", "hint"),
    [(EBUSY, "stop the guests"), (EIO, "interface up"), (ENOMEM, "pci=realloc"), (EPERM, "root"), (524, "firmware")],
)
def test_what_the_kernel_says_about_vfs_comes_with_advice(fake: FakeRoot, pf: PhysicalFunction, number: int, hint: str) -> None:
    set_numvfs(fake, pf.address, 0)
    fake.write_errors[f"{DEVICES}/{pf.address}/sriov_numvfs"] = number
    with pytest.raises(HostError, match=f"cannot create 2 VFs on PF {pf.address}") as caught:
        set_numvfs(fake, pf.address, 2)
    assert caught.value.errno == number
    assert hint in caught.value.hint
    fake.write_errors.clear()


def test_a_failure_on_the_way_says_what_was_lost_and_restores_the_autoprobe(fake: FakeRoot, pf: PhysicalFunction) -> None:
    class Full(FakeRoot):
        def write(self, name: str, value: str) -> None:
            """Vanishing VFs is all that works."""
            self.write_errors.update({name: ENOMEM} if name.endswith("sriov_numvfs") and value != "0" else {})
            super().write(name, value)
            self.write_errors.clear()

    set_numvfs(fake, pf.address, 2)
    fake.add(f"{DEVICES}/{pf.address}/sriov_drivers_autoprobe", "1")
    with pytest.raises(HostError, match=r"3 VFs on PF .* \(before: 2, now: 0\)"):
        set_numvfs(Full(fake.path), pf.address, 3)
    assert fake.text(f"{DEVICES}/{pf.address}/sriov_drivers_autoprobe") == "1"


def test_another_number_than_asked_for_is_an_error_with_both(fake: FakeRoot, pf: PhysicalFunction) -> None:
    class Miser(FakeRoot):
        def write(self, name: str, value: str) -> None:
            """Gives two VFs at most."""
            super().write(name, str(min(int(value), 2)) if name.endswith("sriov_numvfs") else value)

    with pytest.raises(HostError, match=f"PF {pf.address}: requested 3 VFs, kernel created 2"):
        set_numvfs(Miser(fake.path), pf.address, 3)


def test_a_vf_goes_to_vfio_and_back(host: HostRoot, pf: PhysicalFunction) -> None:
    vf = make_vfs(host, pf, 2)[0]
    bind_driver(host, vf, "vfio-pci")
    assert read_driver(host, vf) == "vfio-pci"
    assert read_pf(host, pf).vfs[0].driver == "vfio-pci"
    bind_driver(host, vf, "vfio-pci")
    for _ in range(2):
        release_driver(host, vf, None)
        assert read_driver(host, vf) is None
        assert host.read(f"{DEVICES}/{vf}/driver_override") == "(null)"


@pytest.mark.parametrize("autoprobe", ["0", "1"])
def test_a_vf_returns_to_the_driver_it_had(host: HostRoot, pf: PhysicalFunction, vf_driver: str, autoprobe: str) -> None:
    vf = make_vfs(host, pf, 2)[0]
    switch = f"{DEVICES}/{pf.address}/sriov_drivers_autoprobe"
    before = host.read(switch)
    host.write(switch, autoprobe)
    try:
        bind_driver(host, vf, vf_driver)
        bind_driver(host, vf, "vfio-pci")
        release_driver(host, vf, vf_driver)
        assert read_driver(host, vf) == vf_driver
        assert host.read(f"{DEVICES}/{vf}/driver_override") == "(null)"
        release_driver(host, vf, None)
    finally:
        host.write(switch, before)


def test_without_override_a_vf_is_probed_only_with_autoprobe(host: HostRoot, pf: PhysicalFunction, vf_driver: str) -> None:
    """Why `release_driver` sets an override for a moment."""
    vf = make_vfs(host, pf, 2)[0]
    switch = f"{DEVICES}/{pf.address}/sriov_drivers_autoprobe"
    before = host.read(switch)
    try:
        for value, expected in (("0", None), ("1", vf_driver)):
            host.write(switch, value)
            host.write("sys/bus/pci/drivers_probe", str(vf))
            assert read_driver(host, vf) == expected
        release_driver(host, vf, None)
    finally:
        host.write(switch, before)


def test_a_vf_in_use_is_neither_taken_away_nor_destroyed(host: HostRoot, pf: PhysicalFunction, hold: Holder) -> None:
    vf = make_vfs(host, pf, 2)[1]
    bind_driver(host, vf, "vfio-pci")
    with hold(vf):
        for change in (
            lambda: set_numvfs(host, pf.address, 0),
            lambda: set_numvfs(host, pf.address, 1),
            lambda: release_driver(host, vf, None),
        ):
            with pytest.raises(HostError, match=f"{vf} is in use by a guest") as caught:
                change()
            assert caught.value.errno == EBUSY
        assert read_driver(host, vf) == "vfio-pci"
        assert read_numvfs(host, pf.address) == 2
    release_driver(host, vf, None)
    set_numvfs(host, pf.address, 0)


def test_no_such_function(host: HostRoot) -> None:
    for change in (lambda: bind_driver(host, NOWHERE, "vfio-pci"), lambda: release_driver(host, NOWHERE, None)):
        with pytest.raises(HostError, match=f"PCI function {NOWHERE} does not exist") as caught:
            change()
        assert caught.value.errno == ENODEV
    assert read_driver(host, NOWHERE) is None
    assert read_iommu_group(host, NOWHERE) is None


def test_a_driver_that_is_not_loaded(host: HostRoot, pf: PhysicalFunction) -> None:
    vf = make_vfs(host, pf, 2)[0]
    with pytest.raises(HostError, match=f"bind {vf} to nohype-none.*\n.*modprobe nohype-none") as caught:
        bind_driver(host, vf, "nohype-none")
    assert caught.value.errno == ENOENT
    assert host.read(f"{DEVICES}/{vf}/driver_override") == "(null)"


def test_a_driver_that_does_not_take_the_function(host: HostRoot, pf: PhysicalFunction) -> None:
    """`pcieport` takes only bridges, whatever the override says: its probe fails."""
    vf = make_vfs(host, pf, 2)[0]
    with pytest.raises(HostError, match=f"{vf}: requested driver pcieport, bound driver none"):
        bind_driver(host, vf, "pcieport")
    release_driver(host, vf, None)
    assert host.read(f"{DEVICES}/{vf}/driver_override") == "(null)"


def test_each_vf_has_an_iommu_group_of_its_own(host: HostRoot, pf: PhysicalFunction) -> None:
    groups = {}
    for vf in make_vfs(host, pf, 2):
        group = read_iommu_group(host, vf)
        assert group
        assert group.devices == (vf,)
        assert group.type.startswith("DMA")
        assert group in read_iommu_groups(host)
        groups[group.number] = group
    assert len(groups) == 2
    assert [vf.iommu_group for vf in read_pf(host, pf).vfs] == list(groups)


def test_a_group_shows_everything_that_is_in_it(host: HostRoot) -> None:
    groups = read_iommu_groups(host)
    assert [group.number for group in groups] == sorted(group.number for group in groups)
    assert all(read_iommu_group(host, device) == group for group in groups for device in group.devices)
    if isinstance(host, FakeRoot):  # a real host may have no two functions that share a group
        assert any(len(group.devices) > 1 for group in groups)


def test_a_host_without_iommu_has_no_groups(fake: FakeRoot, pf: PhysicalFunction) -> None:
    (fake.path / f"{DEVICES}/{pf.address}/iommu_group").unlink()
    assert read_iommu_group(fake, pf.address) is None
    set_numvfs(fake, pf.address, 1)
    assert read_pf(fake, pf).vfs[0].iommu_group is None
