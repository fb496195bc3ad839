"""That a VF is what it is taken for, that a PF is never taken for one, and what the host uses; IOMMU groups that are odd."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY, EIO, ENODEV, EPERM

import pytest

from orchestrator.errors import Conflict, HostError
from orchestrator.host.iommu import check_alone, read_iommu_group, read_iommu_groups
from orchestrator.host.pci import bind_driver, read_driver, read_override, release_driver, reset_function
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import check_vf, find_vf, read_numvfs, read_pf, read_use, set_numvfs
from orchestrator.host.survey import read_topology
from orchestrator.model.plan import NicPlan
from orchestrator.model.topology import PhysicalFunction
from orchestrator.resources.nic import BindVfio, ConfigureVf, CreateVfs
from orchestrator.resources.step import Step, UndoContext
from orchestrator.values import MacAddress, PciAddress
from tests.contract.conftest import make_two_vfs
from tests.fakes.root import DEVICES, DRIVERS, GROUPS, FakeRoot

MAC = MacAddress.parse("02:4e:48:00:00:01")


@pytest.fixture
def vfs(host: HostRoot, pf: PhysicalFunction) -> tuple[PciAddress, ...]:
    """Two VFs with the settings of new ones."""
    make_two_vfs(host, pf)
    return tuple(vf.address for vf in read_pf(host, pf.address).vfs)


def test_a_vf_is_found_by_the_kernels_links(host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]) -> None:
    for index, address in enumerate(vfs):
        assert find_vf(host, pf.address, index) == address
        check_vf(host, pf.address, index, address)
    assert find_vf(host, pf.address, 2) is None
    assert find_vf(host, PciAddress.parse("ff:1f.7"), 0) is None


def test_a_vf_that_is_another_is_refused_with_both_addresses(
    host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]
) -> None:
    with pytest.raises(HostError, match=f"VF 0 of PF {pf.address} is {vfs[0]}, expected {vfs[1]}"):
        check_vf(host, pf.address, 0, vfs[1])
    with pytest.raises(HostError, match=f"is {vfs[0]}, expected {pf.address}"):
        check_vf(host, pf.address, 0, pf.address)
    with pytest.raises(HostError, match=f"VF 2 of PF {pf.address} does not exist") as caught:
        check_vf(host, pf.address, 2, vfs[1])
    assert caught.value.errno == ENODEV


@pytest.mark.parametrize("step", [ConfigureVf, BindVfio])
def test_no_step_touches_what_is_not_the_planned_vf(
    host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...], step: Callable[[NicPlan], Step]
) -> None:
    """The PF itself, as with a first VF offset of 0, a sibling, and another function."""
    for address in (pf.address, vfs[1], PciAddress.parse("0000:00:00.0")):
        made = step(NicPlan(pf.address, pf.interface or "", 0, address, MAC))
        for work in (made.read_before, made.apply):
            with pytest.raises(HostError, match=f"VF 0 of PF {pf.address} is {vfs[0]}, expected {address}"):
                work(host)
    assert read_driver(host, pf.address) == pf.driver
    assert [vf.mac for vf in host.net.read_vfs(pf.interface or "")] == [None, None]


@pytest.mark.parametrize(
    "work",
    [
        lambda host, pf: bind_driver(host, pf, "vfio-pci"),
        lambda host, pf: release_driver(host, pf, None),
        lambda host, pf: reset_function(host, pf),
        lambda host, pf: BindVfio.undo(UndoContext(host), {"address": str(pf), "driver": ""}),
    ],
)
def test_a_pf_is_never_taken_for_a_vf(
    host: HostRoot, pf: PhysicalFunction, work: Callable[[HostRoot, PciAddress], object]
) -> None:
    with pytest.raises(HostError, match=f"{pf.address} is a physical function") as caught:
        work(host, pf.address)
    assert caught.value.errno == EPERM
    assert read_driver(host, pf.address) == pf.driver
    assert read_override(host, pf.address) == ""


def test_what_was_never_bound_is_left_alone_by_an_undo(host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]) -> None:
    """VFs that were made anew, with another number or offset: what is at the recorded address now is another VF, or the PF."""
    for address in (pf.address, vfs[1]):
        before = [read_driver(host, address), read_override(host, address)]
        record = {"address": str(address), "driver": "igbvf", "override": "x", "pf": str(pf.address)}
        BindVfio.undo(UndoContext(host), {**record, "index": 0})
        BindVfio.undo(UndoContext(host), {**record, "index": 7})
        assert [read_driver(host, address), read_override(host, address)] == before


def test_what_is_no_vf_by_now_is_left_alone_by_an_old_record(host: HostRoot, pf: PhysicalFunction) -> None:
    """After a reboot another function may be at the address; records of earlier versions name no PF."""
    set_numvfs(host, pf.address, 0)
    others = [PciAddress.parse(name) for name in host.names(DEVICES) if name != str(pf.address)]
    before = [read_driver(host, address) for address in others]
    for address in others:
        BindVfio.undo(UndoContext(host), {"address": str(address), "driver": "igbvf"})
    assert [read_driver(host, address) for address in others] == before


def test_an_override_that_was_there_is_put_back(host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]) -> None:
    """As driverctl sets it."""
    host.write(f"{DEVICES}/{vfs[0]}/driver_override", "marker")
    step = BindVfio(NicPlan(pf.address, pf.interface or "", 0, vfs[0], MAC))
    before = step.read_before(host)
    assert before
    step.apply(host)
    assert read_override(host, vfs[0]) == "vfio-pci"
    BindVfio.undo(UndoContext(host), before)
    assert (read_driver(host, vfs[0]), read_override(host, vfs[0])) == (None, "marker")
    host.write(f"{DEVICES}/{vfs[0]}/driver_override", "\n")


def give_to_host(fake: FakeRoot, vf: PciAddress, driver: str = "igbvf", name: str = "ens1v0") -> str:
    """Binds the VF to a driver of the host; returns the folder of its interface, which is down and unused."""
    for file in ("bind", "unbind"):
        fake.add(f"{DRIVERS}/{driver}/{file}")
    fake.add_link(f"{fake.real(f'{DEVICES}/{vf}')}/driver", f"../../../bus/pci/drivers/{driver}")
    folder = f"{fake.real(f'{DEVICES}/{vf}')}/net/{name}"
    for file, text in (("address", "02:00:00:00:00:01"), ("operstate", "down"), ("flags", "0x1002")):
        fake.add(f"{folder}/{file}", text)
    return folder


def sets_up(fake: FakeRoot, folder: str) -> None:
    fake.add(f"{folder}/flags", "0x1003")


def sets_up_without_flags(fake: FakeRoot, folder: str) -> None:
    (fake.path / folder / "flags").unlink()
    fake.add(f"{folder}/operstate", "up")


def bonds(fake: FakeRoot, folder: str) -> None:
    fake.add_link(f"{folder}/master", "../../../../../virtual/net/bond0")


def puts_a_macvtap_above(fake: FakeRoot, folder: str) -> None:
    fake.add_link(f"{folder}/upper_macvtap0", "../macvtap0")


def puts_two_vlans_above(fake: FakeRoot, folder: str) -> None:
    fake.add_link(f"{folder}/upper_v0.7", "../v0.7")
    fake.add_link(f"{folder}/upper_v0.8", "../v0.8")


def moves_it_away(fake: FakeRoot, folder: str) -> None:
    (fake.path / folder).rename(fake.path / "elsewhere")


def gives_it_an_address(fake: FakeRoot, folder: str) -> None:
    fake.fake_net.give_address(folder.rsplit("/", 1)[1])


def hands_it_to_user_space(fake: FakeRoot, folder: str) -> None:
    fake.add(f"{folder.partition('/net/')[0]}/uio/uio0/name", "igb_uio")


def hands_it_to_another_vfio_driver(fake: FakeRoot, folder: str) -> None:
    fake.add(f"{folder.partition('/net/')[0]}/vfio-dev/vfio0/dev", "1:1")


def makes_it_unreadable(fake: FakeRoot, folder: str) -> None:
    fake.read_errors[f"{folder}/flags"] = EIO


USES = [
    (sets_up, "its interface ens1v0 is up"),
    (sets_up_without_flags, "its interface ens1v0 is up"),
    (bonds, "its interface ens1v0 is a port of bond0"),
    (puts_a_macvtap_above, "macvtap0 uses its interface ens1v0"),
    (puts_two_vlans_above, "v0.7, v0.8 use its interface ens1v0"),
    (moves_it_away, "its interface is in another network namespace"),
    (gives_it_an_address, "its interface ens1v0 has an IP address"),
    (hands_it_to_user_space, "its driver igbvf serves a user-space program"),
    (hands_it_to_another_vfio_driver, "its driver igbvf serves a user-space program"),
    (makes_it_unreadable, "its interface ens1v0 cannot be read"),
]


@pytest.mark.parametrize(("use", "said"), USES)
def test_a_vf_that_the_host_uses_says_how_and_is_not_bound(
    fake: FakeRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...], use: Callable[[FakeRoot, str], None], said: str
) -> None:
    folder = give_to_host(fake, vfs[0])
    assert read_use(fake, vfs[0]) == ""
    step = BindVfio(NicPlan(pf.address, pf.interface or "", 0, vfs[0], MAC))
    assert step.read_before(fake)
    use(fake, folder)
    assert said in read_use(fake, vfs[0])
    used, free = read_topology(fake).pfs[0].vfs
    assert said in used.use
    assert free.use == ""
    with pytest.raises(Conflict, match=f"the host uses VF {vfs[0]}"):
        step.read_before(fake)


@pytest.mark.parametrize("driver", ["pci-stub", "xen-pciback"])
def test_a_vf_that_is_set_aside_is_in_use(fake: FakeRoot, vfs: tuple[PciAddress, ...], driver: str) -> None:
    give_to_host(fake, vfs[0], driver)
    assert f"its driver {driver} serves" in read_use(fake, vfs[0])


@pytest.mark.parametrize(("use", "said"), USES)
def test_vfs_of_which_the_host_uses_one_are_not_removed(
    fake: FakeRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...], use: Callable[[FakeRoot, str], None], said: str
) -> None:
    use(fake, give_to_host(fake, vfs[1]))
    with pytest.raises(HostError, match=f"the host uses VF {vfs[1]}") as caught:
        CreateVfs.undo(UndoContext(fake), {"pf": str(pf.address), "count": 2})
    assert caught.value.errno == EBUSY
    assert said in caught.value.message
    assert read_numvfs(fake, pf.address) == 2


def test_vfs_that_others_have_made_since_are_left(host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]) -> None:
    """The journal outlives a reboot, and a host may make VFs while it boots."""
    CreateVfs.undo(UndoContext(host), {"pf": str(pf.address), "count": 5})
    assert read_numvfs(host, pf.address) == 2
    CreateVfs.undo(UndoContext(host), {"pf": "0000:ff:1f.7", "count": 5})
    CreateVfs.undo(UndoContext(host), {"pf": str(pf.address), "count": 2})
    assert read_numvfs(host, pf.address) == 0


def test_a_record_of_an_earlier_version_has_no_count(host: HostRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]) -> None:
    CreateVfs.undo(UndoContext(host), {"pf": str(pf.address)})
    assert read_numvfs(host, pf.address) == 0


@pytest.mark.parametrize("state", ["unknown", "dormant"])
def test_a_port_that_does_not_tell_its_state_is_not_waited_for(fake: FakeRoot, pf: PhysicalFunction, state: str) -> None:
    set_numvfs(fake, pf.address, 0)
    fake.add(f"{DEVICES}/{pf.address}/net/{pf.interface}/operstate", state)
    CreateVfs(pf.address, "another name", 2).apply(fake)
    assert read_numvfs(fake, pf.address) == 2


def group_of(fake: FakeRoot, vf: PciAddress) -> str:
    return fake.real(f"{DEVICES}/{vf}/iommu_group")


def test_a_group_that_cannot_be_read_stays_with_its_devices(
    fake: FakeRoot, vfs: tuple[PciAddress, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, broken = FakeRoot.names, f"{group_of(fake, vfs[0])}/devices"

    def fail(self: FakeRoot, name: str) -> tuple[str, ...]:
        if name == broken:
            raise HostError(f"cannot list /{name}", errno=EIO)
        return names(self, name)

    before = len(read_iommu_groups(fake))
    monkeypatch.setattr(FakeRoot, "names", fail)
    groups = read_iommu_groups(fake)
    assert len(groups) == before
    assert [group.number for group in groups if group.fault] == [int(broken.split("/")[-2])]
    assert len(read_topology(fake).iommu_groups) == before


def test_a_group_whose_type_cannot_be_read_is_still_a_group(fake: FakeRoot, vfs: tuple[PciAddress, ...]) -> None:
    """The survey and a start need its devices; who asks for the type gets the error."""
    fake.read_errors[f"{group_of(fake, vfs[0])}/type"] = EIO
    (found,) = [group for group in read_iommu_groups(fake) if vfs[0] in group.devices]
    assert (found.type, found.fault) == ("", "")
    check_alone(fake, vfs[0])
    with pytest.raises(HostError):
        read_iommu_group(fake, vfs[0])


def test_a_group_of_an_old_kernel_has_no_type(fake: FakeRoot, vfs: tuple[PciAddress, ...]) -> None:
    (fake.path / group_of(fake, vfs[0]) / "type").unlink()
    assert [group.type for group in read_iommu_groups(fake) if vfs[0] in group.devices] == [""]


def test_a_name_in_a_group_that_is_no_address_stays_with_the_group(fake: FakeRoot, vfs: tuple[PciAddress, ...]) -> None:
    fake.add(f"{DEVICES}/odd:name/class", "0x060400")
    fake.add_link(f"{group_of(fake, vfs[0])}/devices/odd:name", "../../../../devices/odd:name")
    (found,) = [group for group in read_iommu_groups(fake) if group.fault]
    assert "odd:name" in found.fault


def test_the_group_is_read_again_before_a_vf_is_bound(fake: FakeRoot, pf: PhysicalFunction, vfs: tuple[PciAddress, ...]) -> None:
    """A device of any bus that has come into it since."""
    step = BindVfio(NicPlan(pf.address, pf.interface or "", 0, vfs[0], MAC))
    assert step.read_before(fake)
    fake.add_link(f"{group_of(fake, vfs[0])}/devices/MSFT0201:00", "../../../../devices/platform/MSFT0201:00")
    with pytest.raises(HostError, match=r"shares IOMMU group \d+ with MSFT0201:00"):
        step.apply(fake)
    assert read_driver(fake, vfs[0]) is None


def test_why_a_device_has_no_group_is_said_by_its_cause(fake: FakeRoot, vfs: tuple[PciAddress, ...]) -> None:
    with pytest.raises(HostError, match=r"PCI function 0000:ff:1f\.7 does not exist"):
        check_alone(fake, PciAddress.parse("ff:1f.7"))
    groups = len(fake.names(GROUPS))
    (fake.path / fake.real(f"{DEVICES}/{vfs[0]}") / "iommu_group").unlink()
    with pytest.raises(HostError, match=f"has no IOMMU group, but the host has {groups} groups") as caught:
        check_alone(fake, vfs[0])
    assert "DMAR" in caught.value.hint
    (fake.path / GROUPS).rename(fake.path / "none")
    with pytest.raises(HostError, match="the host does not use an IOMMU") as caught:
        check_alone(fake, vfs[0])
    assert "intel_iommu=on" in caught.value.hint
