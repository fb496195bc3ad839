"""Which VF a guest gets on odd servers, and the reason by its cause where there is none."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.errors import NoRoom
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.topology import IommuGroup, PhysicalFunction, Port, Topology, VirtualFunction
from orchestrator.planning.capacity import count_vfs
from orchestrator.planning.nic import find_unknown
from orchestrator.planning.planner import hide_device_owners, plan_guest
from orchestrator.values import MacAddress, PciAddress
from tests.harness.plans import add_up
from tests.unit.test_plan import HOST, PF, POLICY, groups, host, nic, refusals, request, second_nic

OTHER = PciAddress.parse("0000:42:00.0")
REPRESENTOR = Port("eth10", up=True, mac=None, fault="eth10 is a representor (phys_port_name pf0vf0)", representor=True)


def pf_with(*uses: str) -> PhysicalFunction:
    """A PF with a VF for each use, each in a group of its own."""
    vfs = (VirtualFunction(nic().vf_address(index), index, "igbvf", 20 + index, use) for index, use in enumerate(uses))
    return nic(vfs=tuple(vfs))


def host_with(pf: PhysicalFunction, **changes: object) -> Topology:
    return host(pfs=(pf,), iommu_groups=groups(*((vf.address,) for vf in pf.vfs), (PF,)), **changes)


def plan_on(topology: Topology, taken: Allocated | None = None) -> Plan:
    return plan_guest(request(), topology, taken or Allocated(), POLICY)


def test_a_vf_that_the_host_uses_is_no_candidate() -> None:
    assert plan_on(host_with(pf_with("its interface v0 is up", ""))).vf.index == 1
    (reason,) = refusals(host_with(pf_with("its interface v0 is up", "its interface is in another network namespace")))
    assert reason == (
        "uplink nic0: no free VF of 2 (of 7 possible)"
        "; VF 0000:41:10.0 is used by the host: its interface v0 is up"
        "; VF 0000:41:10.2 is used by the host: its interface is in another network namespace"
    )


def test_a_wanted_vf_that_the_host_uses_is_refused_with_the_use() -> None:
    topology = host_with(pf_with("its interface v0 is a port of bond0", ""))
    reasons = refusals(topology, placement={"cpus": "2-3", "vf": str(PF.offset(128))})
    assert reasons == (f"uplink nic0: VF {PF.offset(128)} is used by the host: its interface v0 is a port of bond0",)


def test_a_refusal_does_not_name_hundreds_of_vfs() -> None:
    (reason,) = refusals(host_with(pf_with(*(f"its interface v{index} is up" for index in range(250)))))
    assert reason.count("is used by the host") == 8
    assert reason.endswith("; and 242 more")


def test_metrics_count_what_the_host_uses_as_not_free() -> None:
    counts = count_vfs(host_with(pf_with("its interface v0 is up", "", "")), {}, (), POLICY)
    assert (counts["nic0", "foreign"], counts["nic0", "free"]) == (1, 2)


def test_a_vf_belongs_to_its_guest_by_its_number_too() -> None:
    """After a reboot the VFs of a stopped guest may have other addresses."""
    topology = host_with(pf_with("", ""))
    first = plan_on(topology)
    moved = dataclasses.replace(first, nics=(dataclasses.replace(first.vf, address=PF.offset(384)),))
    assert plan_on(topology, add_up([moved], frozenset())).vf.index == 1
    assert count_vfs(topology, {"g1": moved}, (), POLICY)["nic0", "claimed"] == 1


@pytest.mark.parametrize(("offset", "stride", "total"), [(0, 0, 7), (0, 2, 7), (128, 0, 7), (0, 0, 1)])
def test_an_address_that_is_not_known_yet_is_not_made_up(offset: int, stride: int, total: int) -> None:
    """With offset 0 the first VF would be the PF itself, with stride 0 all would be one."""
    pf = nic(first_vf_offset=offset, vf_stride=stride, total_vfs=total)
    (reason,) = refusals(host(pfs=(pf,)))
    assert f"the PF {PF} does not report the addresses of its VFs before they are created" in reason
    assert find_unknown(host(pfs=(pf,)), POLICY) == (pf,)
    with pytest.raises(ValueError, match="the address of VF .* is not known"):
        pf.vf_address(total - 1)


def test_the_only_vf_needs_no_stride() -> None:
    pf = nic(vf_stride=0, total_vfs=1)
    assert plan_on(host(pfs=(pf,))).vf.address == PF.offset(128)
    assert find_unknown(host(pfs=(pf,)), POLICY) == ()


def test_vfs_that_exist_are_where_they_are() -> None:
    """Whatever the arithmetic says of them."""
    vf = VirtualFunction(PF.offset(384), 0, None, 20)
    pf = nic(vfs=(vf,), first_vf_offset=0, vf_stride=0)
    assert pf.vf_address(0) == vf.address
    assert plan_on(host_with(pf)).vf.address == vf.address


def test_a_pf_is_never_a_vf() -> None:
    pf = nic(vfs=(VirtualFunction(PF, 0, None, 20),))
    (reason,) = refusals(host(pfs=(pf,), iommu_groups=groups((PF,))))
    assert "of the PF itself" in reason


@pytest.mark.parametrize("changes", [{"up": False}, {"fault": "it is odd"}, {"siblings": (REPRESENTOR,)}, {"interface": "nic9"}])
def test_vfs_are_not_made_on_a_pf_that_cannot_serve(changes: dict[str, object]) -> None:
    pf = nic(first_vf_offset=0, vf_stride=0, **changes)
    assert find_unknown(host(pfs=(pf,)), POLICY) == ()


def test_switchdev_mode_is_refused_as_what_it_is() -> None:
    (reason,) = refusals(host(pfs=(nic(siblings=(REPRESENTOR,)),)))
    assert f"PF {PF} is in switchdev mode, but VEPA requires legacy mode" in reason


def test_an_uplink_that_is_not_the_first_interface_of_its_pf_is_found() -> None:
    pf = nic("eth9", up=False, siblings=(Port("nic0", up=True, mac=MacAddress("52:54:00:00:01:07")),))
    plan = plan_on(host(pfs=(pf,)))
    assert (plan.vf.pf, plan.vf.interface) == (PF, "nic0")
    assert count_vfs(host(pfs=(pf,)), {}, (), POLICY)["nic0", "free"] == 7


def test_an_uplink_that_is_a_representor_is_refused() -> None:
    pf = nic("eth0", siblings=(dataclasses.replace(REPRESENTOR, name="nic0"),))
    (reason,) = refusals(host(pfs=(pf,)))
    assert "is a representor" in reason


def test_an_odd_port_is_refused_if_it_is_the_uplink_and_stops_no_other() -> None:
    odd = nic(address=OTHER, interface="nic1", mac=None, fault="nic1 has the address 00:00:00:00:00:00")
    assert plan_on(host(pfs=(nic(), odd))).vf.pf == PF
    policy = dataclasses.replace(POLICY, uplinks=("nic1",))
    assert refusals(host(pfs=(nic(), odd)), policy=policy) == (
        f"uplink nic1: PF {OTHER}: nic1 has the address 00:00:00:00:00:00",
    )


def test_an_uplink_that_is_missing_is_told_with_the_ports_that_have_none() -> None:
    hidden = nic(None, up=False, mac=None, fault="no network interface: it is in another network namespace")
    (reason,) = refusals(host(pfs=(hidden,)))
    assert reason == (
        "uplink nic0: there is no SR-IOV capable network interface of this name"
        f"; PF {PF}: no network interface: it is in another network namespace"
    )


def test_a_group_that_cannot_be_read_is_not_called_missing() -> None:
    pf = pf_with("", "")
    unread = IommuGroup(20, "", (), "cannot list /sys/kernel/iommu_groups/20/devices: Input/output error (errno 5)")
    topology = host(pfs=(pf,), iommu_groups=(unread, IommuGroup(21, "DMA", (pf.vfs[1].address,))))
    assert plan_on(topology).vf.index == 1
    (reason,) = refusals(topology, placement={"cpus": "2-3", "vf": str(pf.vfs[0].address)})
    assert f"the IOMMU group of VF {pf.vfs[0].address} cannot be read: cannot list" in reason
    (reason,) = refusals(host(pfs=(pf,), iommu_groups=(unread,)))
    assert "no IOMMU group can be read: cannot list" in reason
    without = dataclasses.replace(topology, iommu_groups=topology.iommu_groups[1:])
    (reason,) = refusals(without, placement={"cpus": "2-3", "vf": str(pf.vfs[0].address)})
    assert reason == f"uplink nic0: VF {pf.vfs[0].address} is in no IOMMU group"


def test_a_host_without_iommu_says_so() -> None:
    (reason,) = refusals(dataclasses.replace(HOST, iommu_groups=()))
    assert "the host has no IOMMU in use" in reason


TWO_UPLINKS = dataclasses.replace(POLICY, uplinks=("nic0", "nic1"))


def plan_nics(
    nics: list[dict[str, str]], topology: Topology, taken: Allocated | None = None, policy: Policy = TWO_UPLINKS
) -> Plan:
    return plan_guest(request(nics=nics), topology, taken or Allocated(), policy)


def test_nics_get_vfs_of_the_same_uplink_with_addresses_of_their_own() -> None:
    plan = plan_nics([{"address": "10.9.0.11/24"}, {}, {"address": "10.9.2.11/24"}], host(pfs=(nic(), second_nic())))
    assert [(vf.interface, vf.index, vf.address) for vf in plan.nics] == [
        ("nic0", index, nic().vf_address(index)) for index in range(3)
    ]
    assert len({vf.mac for vf in plan.nics}) == 3
    assert plan.cmdline == "nohype.address=10.9.0.11/24 nohype.address3=10.9.2.11/24"
    assert plan.vf.mac == plan_guest(request(), HOST, Allocated(), POLICY).vf.mac, "as that of a guest with one NIC"


def test_nics_are_planned_together_with_the_node() -> None:
    """nic0 has one VF left, so both come from nic1, and the cores from its node."""
    topology = host(pfs=(nic(total_vfs=1), second_nic()))
    assert plan_nics([{}], topology).node == 0
    plan = plan_nics([{}, {}], topology)
    assert (plan.node, [(vf.interface, vf.index) for vf in plan.nics]) == (1, [("nic1", 0), ("nic1", 1)])


def test_nic_gets_a_vf_of_the_uplink_that_it_names() -> None:
    topology = host(pfs=(nic(), second_nic()))
    plan = plan_nics([{"uplink": "nic1"}, {"uplink": "nic0"}], topology)
    assert [(vf.pf, vf.interface, vf.index) for vf in plan.nics] == [(second_nic().address, "nic1", 0), (PF, "nic0", 0)]
    both = plan_nics([{"uplink": "nic1"}, {}], topology)
    assert (both.node, [vf.interface for vf in both.nics]) == (1, ["nic1", "nic1"]), "so that all is of one node"


def test_nic_gets_the_vf_that_it_names_and_no_other_nic_gets_it() -> None:
    topology = host(pfs=(nic(), second_nic()))
    plan = plan_nics([{}, {"vf": str(nic().vf_address(0))}, {"vf": str(second_nic().vf_address(3))}], topology)
    assert [(vf.interface, vf.index) for vf in plan.nics] == [("nic0", 1), ("nic0", 0), ("nic1", 3)]


def test_guest_that_has_several_nics_owns_the_vfs_of_all() -> None:
    topology = host(pfs=(nic(total_vfs=4),))
    first = plan_nics([{}, {}], topology, policy=POLICY)
    taken = add_up([first], frozenset())
    second = plan_guest(request("g2", nics=[{}, {}]), topology, taken, POLICY)
    assert [vf.index for vf in (*first.nics, *second.nics)] == [0, 1, 2, 3]
    assert len({vf.mac for vf in (*first.nics, *second.nics)}) == 4
    counts = count_vfs(topology, {"g1": first}, (), POLICY)
    assert (counts["nic0", "claimed"], counts["nic0", "free"]) == (2, 2)


@pytest.mark.parametrize(
    ("nics", "expected"),
    [
        ([{}, {}, {}], "uplink nic0: no free VF of 2 (NIC 3 of 3)"),
        ([{"uplink": "nic0"}, {"uplink": "nic1"}], "uplink nic1: not configured ([host] uplinks) (NIC 2 of 2)"),
        ([{}, {"vf": "0000:99:00.1"}], "uplink nic0: VF 0000:99:00.1 is not one of its 2 VFs (NIC 2 of 2)"),
        ([{"uplink": "nic7"}], "uplink nic7: not configured ([host] uplinks)"),
    ],
)
def test_refusal_names_the_nic(nics: list[dict[str, str]], expected: str) -> None:
    assert refusals(host(pfs=(nic(total_vfs=2), second_nic())), nics=nics) == (expected,)


def test_vfs_named_by_a_tenant_are_hidden() -> None:
    wanted = request(nics=[{"vf": "0000:41:10.0"}, {}])
    error = NoRoom("no room", ("uplink nic0: VF 0000:41:10.0 is owned by a guest (NIC 1 of 2)", "node 0: full"), "")
    assert hide_device_owners(error, wanted).reasons == ("VF 0000:41:10.0 is not available", "node 0: full")
