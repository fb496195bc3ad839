"""Planning of disks: which controllers a guest gets, and why it gets none."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.errors import NoRoom, QuotaExceeded, RequestError
from orchestrator.model.access import Identity, Quota, Role
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.request import GuestRequest, parse_guest_request
from orchestrator.model.topology import (
    Core,
    IommuGroup,
    NvmeController,
    NvmeNamespace,
    PagePool,
    PhysicalFunction,
    Topology,
    VolumeGroup,
)
from orchestrator.model.waiver import Waiver
from orchestrator.planning.allocation_index import AllocationIndex
from orchestrator.planning.disk import list_disk_uses
from orchestrator.planning.planner import hide_device_owners, plan_guest
from orchestrator.planning.quota import check_quota
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

M2 = Size.parse("2M")
PF = PciAddress.parse("0000:41:00.0")
POLICY = Policy(CpuSet.parse("0-1"), ("nic0",), M2, disk_folder="/var/lib/disks")


def disk(number: int, size: str = "1G", node: int | None = 0, **changes: object) -> NvmeController:
    space = NvmeNamespace(1, f"nvme{number}n1", Size.parse(size), 512)
    address = PciAddress(0, 0x50 + number, 0, 0)
    made = NvmeController(address, f"nvme{number}", f"serial{number}", "a disk", node, "nvme", 20 + number, (space,))
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def host(*disks: NvmeController, together: bool = False) -> Topology:
    pf = PhysicalFunction(PF, "nic0", "8086:10c9", "igb", None, True, MacAddress.parse("52:54:00:00:01:00"), 7, 128, 2, ())
    cores = tuple(Core(CpuSet.of((2 * number, 2 * number + 1)), number // 2, number // 2) for number in range(4))
    pools = (PagePool(0, M2, 256, 256), PagePool(1, M2, 256, 256))
    addresses = tuple(one.address for one in disks)
    groups = (addresses,) if together else tuple((address,) for address in addresses)
    members = tuple(IommuGroup(20 + number, "DMA", group) for number, group in enumerate(groups))
    return Topology(cores, CpuSet.parse("2-7"), pools, (pf,), (IommuGroup(9, "DMA", (PF,)), *members), controllers=disks)


def request(*disks: dict[str, object], **fields: object) -> GuestRequest:
    return parse_guest_request({"name": "g1", "memory": "4M", "image": "minimal", "disks": list(disks), **fields})


def plan(topology: Topology, *disks: dict[str, object], taken: Allocated | None = None, policy: Policy = POLICY) -> Plan:
    return plan_guest(request(*disks), topology, taken or Allocated(), policy)


def refusal(topology: Topology, *disks: dict[str, object], taken: Allocated | None = None, policy: Policy = POLICY) -> str:
    with pytest.raises(NoRoom) as caught:
        plan(topology, *disks, taken=taken, policy=policy)
    assert caught.value.hint
    return "; ".join(caught.value.reasons)


def serials(found: Plan) -> list[str]:
    return [one.serial for one in found.disks]


def test_guest_without_disks_gets_none() -> None:
    assert plan(host(disk(0))).disks == ()


def test_disk_is_planned_with_its_exact_ids() -> None:
    (found,) = plan(host(disk(0)), {}).disks
    assert (found.serial, str(found.address), found.size, found.node) == ("serial0", "0000:50:00.0", Size(1 << 30), 0)


def test_cores_are_on_the_node_of_the_disk() -> None:
    """The host's own CPUs are on node 0, so node 1 would have more room: only the disk decides."""
    for node, number in ((0, 0), (1, 1)):
        found = plan(host(disk(0, node=0), disk(1, node=1)), {"serial": f"serial{number}"})
        assert (found.node, serials(found)) == (node, [f"serial{number}"])


def test_disk_of_the_cores_node_is_preferred_to_a_smaller_one() -> None:
    topology = host(disk(0, "1G", node=1), disk(1, "4G", node=0))
    cpus = {"placement": {"cpus": "2-3"}}
    assert serials(plan_guest(request({}, **cpus), topology, Allocated(), POLICY)) == ["serial1"]


def test_disks_of_a_placement_are_the_only_ones() -> None:
    """A fleet counts the controllers of each NUMA node: the planner would take one of another node if it fits better."""
    topology = host(disk(0, "4G", node=0), disk(1, "1G", node=0), disk(2, "1G", node=1))

    def choose(*disks: dict[str, object], among: list[str] | None = None) -> list[str]:
        placement = {"cpus": "4-5"} | ({"disks": among} if among is not None else {})
        return serials(plan_guest(request(*disks, placement=placement), topology, Allocated(), POLICY))

    assert choose({"size": "4G"}) == ["serial0"]
    assert choose({}, among=["0000:50:00.0", "51:00.0"]) == ["serial1"]
    for among in ([], ["0000:52:00.0"]):
        with pytest.raises(NoRoom, match=r"of at least 4G.*serial0 \(0000:50:00.0\): not in placement.disks"):
            choose({"size": "4G"}, among=among)


def test_use_of_each_controller_is_listed_with_owner_or_reason() -> None:
    group = (disk(4, driver="nvme", iommu_group=None),)
    topology = host(
        disk(0), disk(1), disk(2, uses=("nvme2n1 is mounted on /",)), disk(3, node=None, signatures=("nvme3n1 contains ext4",))
    )
    topology = dataclasses.replace(topology, controllers=(*topology.controllers, *group))
    owned = plan(topology, {})
    serials = frozenset({"serial3"})
    for state, use in {"running": "claimed", "wiping": "wiping", "quarantined": "quarantined"}.items():
        found = list_disk_uses(topology, {"g1": owned}, {"g1": state}, POLICY)
        assert [(one.serial, use, guest, why) for one, use, guest, why in found] == [
            ("serial0", use, "g1", ""),
            ("serial1", "free", "", ""),
            ("serial2", "unusable", "", "used by the host: nvme2n1 is mounted on /"),
            ("serial3", "unusable", "", "not empty: nvme3n1 contains ext4 (to have its contents destroyed, add the serial to "
             "[disks] serials)"),
            ("serial4", "unusable", "", "it is in no IOMMU group"),
        ]  # fmt: skip
    permitted = list_disk_uses(topology, {}, {}, dataclasses.replace(POLICY, disk_serials=serials))
    assert [use for _, use, _, _ in permitted] == ["free", "free", "unusable", "free", "unusable"]


def test_smallest_sufficient_disk_is_chosen() -> None:
    topology = host(disk(0, "4G"), disk(1, "2G"), disk(2, "1G"))
    assert serials(plan(topology, {"size": "2G"})) == ["serial1"]
    assert serials(plan(topology, {})) == ["serial2"]


@pytest.mark.parametrize("sizes", [("1G", "4G", "2G"), ("4G", "1G", "2G"), ("1G", "2G", "4G")])
def test_several_disks_keep_the_order_of_the_request(sizes: tuple[str, ...]) -> None:
    """A small request must not take the only disk that fits a large one."""
    topology = host(disk(0, "4G"), disk(1, "2G", node=1), disk(2, "1G", node=1))
    found = plan(topology, *({"size": size} for size in sizes))
    assert [str(one.size) for one in found.disks] == list(sizes)


def test_named_disk_is_not_given_to_an_unnamed_request() -> None:
    topology = host(disk(0, "1G"), disk(1, "1G"))
    assert serials(plan(topology, {}, {"serial": "serial0"})) == ["serial1", "serial0"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (disk(0, uses=("nvme0n1 is mounted on /srv",)), "used by the host: nvme0n1 is mounted on /srv"),
        (disk(0, signatures=("nvme0n1 contains ext4 at offset 0x438",)), "not empty: nvme0n1 contains ext4"),
        (disk(0, driver="vfio-pci", serial=None, namespaces=()), "its driver is vfio-pci, expected nvme"),
        (disk(0, driver=None, serial=None, namespaces=()), "its driver is none, expected nvme"),
        (disk(0, serial=None), "it reports no serial number"),
        (disk(0, fault="its state is dead, expected live"), "its state is dead"),
        (disk(0, namespaces=()), "it has 0 namespaces, expected 1"),
        (disk(0, namespaces=disk(0).namespaces * 2), "it has 2 namespaces, expected 1"),
        (disk(0, "1G"), "no free NVMe controller of at least 2G (free: 1G)"),
    ],
)
def test_unsuitable_disk_is_refused_with_the_reason(bad: NvmeController, says: str) -> None:
    assert says in refusal(host(bad), {"size": "2G"})
    assert serials(plan(host(bad, disk(1, "2G")), {"size": "2G"})) == ["serial1"]


def test_disks_in_one_iommu_group_are_refused() -> None:
    assert "shares IOMMU group 20 with 0000:51:00.0" in refusal(host(disk(0), disk(1), together=True), {})


def test_disk_outside_every_iommu_group_is_refused() -> None:
    topology = host(disk(0))
    assert "it is in no IOMMU group" in refusal(dataclasses.replace(topology, iommu_groups=topology.iommu_groups[:1]), {})


@pytest.mark.parametrize("taken", [{"serial0"}, {"0000:50:00.0"}])
def test_disk_of_a_guest_is_refused(taken: set[str]) -> None:
    """Also by its address: the serial number of a running guest's controller cannot be read."""
    assert "owned by a guest" in refusal(host(disk(0)), {}, taken=Allocated(disks=frozenset(taken)))


def test_disk_of_an_unmanaged_domain_is_refused_even_if_it_is_shut_off() -> None:
    address = disk(0).address
    for taken in (Allocated(vfs=frozenset({address})), Allocated(last_vfs={address: "is a device of vm"})):
        assert "a device of an unmanaged domain" in refusal(host(disk(0)), {}, taken=taken)


def test_serial_in_the_configuration_permits_signatures_but_not_use() -> None:
    policy = dataclasses.replace(POLICY, disk_serials=frozenset({"serial0"}))
    dirty = disk(0, signatures=("nvme0n1 contains LVM2_member at offset 0x218",))
    assert serials(plan(host(dirty), {}, policy=policy)) == ["serial0"]
    assert "used by the host" in refusal(host(dataclasses.replace(dirty, uses=("mounted",))), {}, policy=policy)


def test_named_disk_that_does_not_exist_is_refused() -> None:
    assert "no NVMe controller with serial 'other'" in refusal(host(disk(0)), {"serial": "other"})


def test_named_disk_that_is_too_small_is_refused_with_both_sizes() -> None:
    assert "serial0 (0000:50:00.0) has 1G, requested 2G" in refusal(host(disk(0)), {"serial": "serial0", "size": "2G"})


def test_fewer_disks_than_requested_are_refused() -> None:
    assert "2 NVMe controllers of the requested sizes, but only 1 are free" in refusal(host(disk(0)), {}, {})


def test_many_refused_disks_are_counted() -> None:
    assert "and 4 more" in refusal(host(*(disk(number, uses=("busy",)) for number in range(12))), {})


def test_tenant_does_not_see_what_the_host_uses_its_disks_for() -> None:
    wanted = request({})
    with pytest.raises(NoRoom) as caught:
        plan_guest(wanted, host(disk(0, uses=("nvme0n1 is mounted on /secret",))), Allocated(), POLICY)
    hidden = hide_device_owners(caught.value, wanted)
    assert "secret" not in str(hidden)
    assert "no suitable disks are available" in hidden.reasons


def test_emulated_disk_must_be_accepted_by_request_or_policy() -> None:
    emulated = {"kind": "emulated", "size": "1G"}
    with pytest.raises(RequestError, match="an emulated disk is weaker than an NVMe controller") as caught:
        plan(host(), emulated)
    assert "--accept emulated-disk" in caught.value.hint
    accepted = plan_guest(request(emulated, accept=["emulated-disk"]), host(), Allocated(), POLICY)
    by_policy = plan(host(), emulated, policy=dataclasses.replace(POLICY, accept=(Waiver.EMULATED_DISK,)))
    assert accepted.disks == by_policy.disks
    assert accepted.waived == (Waiver.EMULATED_DISK,)
    (found,) = accepted.disks
    assert (found.file, found.size, found.address) == ("/var/lib/disks/g1-1.raw", Size(1 << 30), None)


def test_accepting_a_property_does_not_emulate_a_disk() -> None:
    found = plan_guest(request({}, accept=["emulated-disk"]), host(disk(0)), Allocated(), POLICY)
    assert (serials(found), found.waived) == (["serial0"], ())


def test_host_without_a_folder_refuses_emulated_disks() -> None:
    policy = dataclasses.replace(POLICY, disk_folder="", accept=(Waiver.EMULATED_DISK,))
    assert "neither [disks] emulated nor volume_group is set" in refusal(
        host(), {"kind": "emulated", "size": "1G"}, policy=policy
    )


def test_volumes_together_have_room_in_the_group() -> None:
    group = VolumeGroup("vg0", "id", Size.parse("4M"), Size.parse("12M"))
    policy = dataclasses.replace(POLICY, disk_folder="", disk_group="vg0", accept=(Waiver.EMULATED_DISK,))
    topology = dataclasses.replace(host(), volume_group=group)
    five, four = {"kind": "emulated", "size": "5M"}, {"kind": "emulated", "size": "4M"}
    assert [str(one.size) for one in plan(topology, five, four, policy=policy).disks] == ["8M", "4M"]
    assert "volume group vg0 has 12M free, requested 16M" in refusal(topology, five, five, policy=policy)
    assert "volume group vg0 was not read" in refusal(host(), four, policy=policy)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"disks": [{"kind": "emulated"}]}, "disks.0: an emulated disk has a size and no serial"),
        ({"disks": [{"kind": "emulated", "size": "1G", "serial": "x"}]}, "disks.0: an emulated disk has a size and no serial"),
        ({"disks": [{"serial": "a"}, {"serial": "a"}]}, "disks name the same serial twice"),
        ({"disks": [{}] * 5}, "disks: "),
        ({"disks": [{"serial": "a\nb"}]}, "disks.0.serial: "),
        ({"disks": [{"serial": " "}]}, "disks.0.serial: "),
        ({"disks": [{"serial": "x" * 21}]}, "disks.0.serial: "),
        ({"disks": [{"size": "much"}]}, "disks.0.size: "),
        ({"disks": [{"kind": "virtio"}]}, "disks.0.kind: "),
        ({"disks": [{"path": "/dev/sda"}]}, "disks.0.path: "),
        ({"accept": ["everything"]}, "accept.0: "),
        ({"accept": "emulated-disk"}, "accept: "),
    ],
)
def test_wrong_request_is_refused_with_the_field(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_guest_request({"name": "g1", "memory": "4M", "image": "minimal", **fields})
    assert says in caught.value.message


def test_quota_counts_disks() -> None:
    tenant = Identity("t", Role.TENANT, "t", Quota(disks=2))
    owned = [plan(host(disk(0)), {})]
    check_quota(tenant, request({}), 1, owned)
    with pytest.raises(QuotaExceeded) as caught:
        check_quota(tenant, request({}, {}), 1, owned)
    assert "3 of 2 disks" in str(caught.value)


def test_index_follows_disks_of_guests_that_come_wipe_and_go() -> None:
    first = plan(host(disk(0)), {})
    second = plan_guest(request({}, name="g2", placement={"cpus": "6-7"}), host(disk(1)), Allocated(), POLICY)
    index = AllocationIndex().updated([first, second])
    assert index.to_allocated((), ()).disks == {"serial0", "serial1", "0000:50:00.0", "0000:51:00.0"}
    index = index.updated([first.only_disks(), second])
    wiping = index.to_allocated((), ())
    assert wiping.disks == {"serial0", "serial1", "0000:50:00.0", "0000:51:00.0"}
    assert wiping.cpus == CpuSet.of(second.cpus)
    assert index.updated([second]).to_allocated((), ()).disks == {"serial1", "0000:51:00.0"}
