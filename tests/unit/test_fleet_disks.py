"""Disks of guests of the fleet: what Slurm counts of them, what is refused, and how nodes offer them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import Conflict, RequestError
from orchestrator.fleet import requeue, slurm
from orchestrator.fleet import wish as wishes
from orchestrator.fleet.configuration import Address, build_common, build_gres_lines, build_node_lines, find_differences
from orchestrator.fleet.gres import count_gres, parse_indexes
from orchestrator.fleet.node import FleetNode, build_nodes
from orchestrator.fleet.place import build_request, check_place
from orchestrator.values import CpuSet
from tests.unit.test_fleet_node import PF, core, host, vf

FIELDS: dict[str, Any] = {"name": "web", "memory": "256M", "image": "minimal", "id": "order-1"}
NODES = """\
host1|idle|1:3:2|1024|vf:4,nvme:2,apart0:1|sriov,pages-2M,emulated-disk|Unknown|Unknown|none
host2|idle|1:3:2|1024|vf:4|sriov,pages-2M|Unknown|Unknown|none
"""
USES = ("free", "claimed", "wiping", "quarantined", "unusable")


def wish(*disks: dict[str, Any], **more: Any) -> wishes.Wish:
    return wishes.read_wish({**FIELDS, "disks": list(disks), **more})


def example(*disks: tuple[int | None, str], emulated: bool = False) -> Any:
    return host(core("2-3"), core("4-5"), disks=list(disks), emulated=emulated)


def test_node_has_the_controllers_that_guests_can_own_whether_or_not_they_do_now() -> None:
    (node,) = build_nodes(example(*((0, use) for use in USES)), "a")
    assert [str(disk) for disk in node.disks] == [f"0000:5{number}:00.0" for number in range(4)]
    assert " Gres=vf:2,nvme:4,apart0:1," in build_node_lines((node,), Address("a", "a"))
    assert "nvme" not in build_gres_lines((node,))  # Slurm does not choose the controllers
    assert "GresTypes=vf,nvme,apart0," in build_common("controller", "ops")


def test_controller_without_a_numa_node_belongs_to_the_first() -> None:
    pfs = [{**PF, "address": f"0000:4{node}:00.0", "node": node, "vfs": [vf(0)]} for node in range(2)]
    cores = (core("2-3", node=0), core("4-5", node=1))
    first, second = build_nodes(host(*cores, pfs=pfs, disks=[(None, "free"), (1, "free"), (0, "free")]), "a")
    assert [str(disk) for disk in first.disks] == ["0000:50:00.0", "0000:52:00.0"]
    assert [str(disk) for disk in second.disks] == ["0000:51:00.0"]


def test_node_whose_manager_offers_emulated_disks_has_the_feature() -> None:
    (node,) = build_nodes(example(emulated=True), "a")
    assert node.features == ("sriov", "pages-2M", "emulated-disk")


def find(offered: Any, written: Any) -> tuple[str, ...]:
    """Differences of a host from the files that were written for another state of it."""
    nodes = build_nodes(written, "a")
    return find_differences(build_nodes(offered, "a"), "a", build_node_lines(nodes, Address("a", "a")), build_gres_lines(nodes))


def test_missing_controllers_and_emulated_disks_are_a_difference() -> None:
    two, one = example((0, "free"), (0, "claimed"), emulated=True), example((0, "unusable"), (0, "wiping"), emulated=True)
    assert find(two, two) == ()
    assert find(one, two) == ("node a: Gres=vf:2,nvme:2 in nohype-nodes.conf, the host has vf:2,nvme:1",)
    assert find(example(), example((0, "free"))) == ("node a: Gres=vf:2,nvme:1 in nohype-nodes.conf, the host has vf:2",)
    (difference,) = find(example(), example(emulated=True))
    assert "Feature=sriov,pages-2M,emulated-disk,cores-" in difference


def test_disks_that_the_files_do_not_use_are_no_difference() -> None:
    """Otherwise a disk that is plugged in would take its host out of use."""
    assert find(example((0, "free"), (0, "free"), emulated=True), example((0, "free"))) == ()


def test_controllers_are_requested_by_number_and_emulated_disks_by_feature() -> None:
    options = wishes.build_options(wish({}, {"size": "10G"}, {"kind": "emulated", "size": "1G"}))
    assert "--gres=vf:1,nvme:2" in options
    assert "--constraint=sriov&emulated-disk" in options
    assert "--gres=vf:1" in wishes.build_options(wish())
    bare = wishes.build_options(wish({}, accept=["software-edge"]))
    assert "--gres=nvme:1" in bare


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        ({"serial": "S5GX"}, "the serial number of a disk cannot .* fleet: it names a device of one host"),
        (
            {"target": "nvme-tcp://10.9.0.100/nqn.2026-11.example:web"},
            "a network disk cannot .* fleet: two hosts could use one target at the same time, because the manager of a host "
            "checks only its own guests",
        ),
    ],
)
def test_disk_that_only_one_host_knows_is_refused(disk: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        wish(disk, address="10.9.0.11/24")


def test_reasons_name_the_missing_disks() -> None:
    nodes = tuple(slurm.parse_nodes(NODES))
    assert [node.disks for node in nodes] == [2, 0]
    assert wishes.find_reasons(wish({}), nodes) == ()
    assert wishes.find_reasons(wish({}, {}, {}), nodes) == (
        "host1: 2 NVMe controllers, 3 requested", "host2: 0 NVMe controllers, 3 requested"
    )  # fmt: skip
    assert wishes.find_reasons(wish({}, {"kind": "emulated", "size": "1G"}), nodes[1:]) == (
        "host2: 0 NVMe controllers, 1 requested, lacks the feature emulated-disk",
    )


def test_disks_survive_the_job_script() -> None:
    again = requeue.parse_script(wishes.build_script(wish({"size": "10G"})))
    assert (again.disks, again.fields["disks"]) == (1, [{"size": "10G"}])


@pytest.mark.parametrize(
    ("text", "vfs", "indexes", "disks"),
    [
        ("vf:2(IDX:0-1),nvme(CNT:1),apart7(CNT:1)", 2, "0-1", 1), ("nvme:2,vf:4", 4, "", 2), ("vf:1(IDX:3)", 1, "3", 0),
        ("", 0, "", 0), ("gres:vf:1,gres:nvme:2", 1, "", 2), ("gres/nvme=3,gres/vf=2", 2, "", 3), ("xnvme:2,nvmex:3", 0, "", 0),
    ],
)  # fmt: skip
def test_resources_are_read(text: str, vfs: int, indexes: str, disks: int) -> None:
    assert (count_gres("vf", text), str(parse_indexes("vf", text)), count_gres("nvme", text)) == (vfs, indexes, disks)


def allocate(disks: int) -> slurm.Allocation:
    return slurm.Allocation("a", CpuSet.parse("0-1"), CpuSet.parse("0"), 64, "web", "order-1", disks=disks)


def make_node() -> FleetNode:
    (node,) = build_nodes(example((0, "free"), (0, "claimed")), "a")
    return node


def test_manager_chooses_among_the_controllers_of_the_node() -> None:
    """A guest of another NUMA node has the others: Slurm counts them there."""
    request = build_request({**FIELDS, "disks": [{"size": "10G"}]}, make_node(), allocate(1))
    assert request["placement"] == {"cpus": "2-3", "disks": ["0000:50:00.0", "0000:51:00.0"]}
    assert "disks" not in build_request(FIELDS, make_node(), allocate(0))["placement"]
    with pytest.raises(Conflict, match="the guest has 2 NVMe controllers, and Slurm allocated 1"):
        build_request({**FIELDS, "disks": [{}, {}]}, make_node(), allocate(1))


def guest(name: str, state: str, *addresses: str | None) -> Any:
    disks = [{"address": address} for address in addresses]
    return {"name": name, "state": state, "id": name, "cpus": [], "nics": [], "disks": disks}


def test_place_has_as_many_controllers_without_a_guest_as_slurm_has_allocated() -> None:
    found = example((0, "free"), (0, "claimed"))
    owner = guest("other", "running", "0000:51:00.0", "0000:59:00.0", None)
    check_place(found, [owner], make_node(), allocate(1))
    with pytest.raises(Conflict, match="1 NVMe controllers of a have no guest, 2 requested; the others belong to other"):
        check_place(found, [owner], make_node(), allocate(2))
    wiping = guest("web", "wiping", "0000:50:00.0", "0000:51:00.0")  # of the name that the new guest has
    check_place(found, [wiping], make_node(), allocate(2))
