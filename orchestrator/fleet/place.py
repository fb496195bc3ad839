"""The place of a guest on its host: what Slurm has allocated, as the host's manager knows it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.client.host_shapes import Host
from orchestrator.client.shapes import Guest
from orchestrator.errors import Conflict, HostError
from orchestrator.fleet.gres import NVME
from orchestrator.fleet.manager import WIPING
from orchestrator.fleet.node import FleetNode
from orchestrator.fleet.slurm import Allocation
from orchestrator.values import CpuSet, Size


def check_place(host: Host, guests: list[Guest], node: FleetNode, allocation: Allocation) -> None:
    """Raises Conflict or HostError if a guest has the CPUs, VFs, NVMe controllers, name or id, or if pages are missing.

    Disks that are being wiped do not prevent the guest: its creation waits for them.
    """
    cpus, vfs = node.map_cpus(allocation.cpus), {str(vf) for vf in node.map_vfs(allocation.vfs)}
    others = [guest for guest in guests if guest["state"] != WIPING]
    for guest in others:
        owned = {nic["address"] for nic in guest["nics"]}
        what = [
            *(["its name"] if guest["name"] == allocation.name else []),
            *(["its id"] if guest["id"] == allocation.guest_id else []),
            *([f"CPUs {CpuSet.of(guest['cpus']) & cpus}"] if CpuSet.of(guest["cpus"]).meets(cpus) else []),
            *(f"VF {vf}" for vf in sorted(vfs & {address for address in owned if address})),
        ]
        if what:
            raise Conflict(
                f"guest {guest['name']} ({guest['state']}) already has {' and '.join(what)}", "see `nohype guest list`"
            )
    _check_disks(others, node, allocation)
    free = sum(
        page["count"] for page in host["pages"]
        if (page["node"], page["page_size"], page["use"]) == (node.numa, node.page_size, "free")
    )  # fmt: skip
    if (needed := (allocation.memory << 20) // node.page_size) > free:
        where = f"of {Size(node.page_size)} are free on NUMA node {node.numa}"
        raise HostError(f"{free} huge pages {where}, {needed} requested", "see `nohype survey`")


def _check_disks(guests: list[Guest], node: FleetNode, allocation: Allocation) -> None:
    controllers = set(map(str, node.disks))
    owners = {disk["address"]: guest["name"] for guest in guests for disk in guest["disks"] if disk["address"] in controllers}
    if (free := len(controllers) - len(owners)) < allocation.disks:
        names = ", ".join(sorted(set(owners.values())))
        what = f"{free} NVMe controllers of {node.name} have no guest, {allocation.disks} requested"
        raise Conflict(f"{what}; the others belong to {names}", "see `nohype guest list`")


def build_request(fields: Mapping[str, Any], node: FleetNode, allocation: Allocation) -> dict[str, Any]:
    """The request for the host's manager: that of the caller, on exactly what Slurm allocated.

    The manager chooses the NVMe controllers among those of the node: Slurm only counts them.

    Raises Conflict if Slurm allocated another number of VFs or controllers than the request has interfaces or disks.
    """
    cpus, vfs = node.map_cpus(allocation.cpus), node.map_vfs(allocation.vfs)
    placement: dict[str, Any] = {"cpus": str(cpus)}
    if (wanted := _count_nvme(fields)) != allocation.disks:
        raise Conflict(f"the guest has {wanted} NVMe controllers, and Slurm allocated {allocation.disks}")
    if wanted:
        placement["disks"] = [str(disk) for disk in node.disks]
    request = {**fields, "placement": placement, "page_size": str(Size(node.page_size))}
    if not vfs:
        return request
    nics = fields.get("nics") or [{"address": fields["address"]} if fields.get("address") else {}]
    if len(nics) != len(vfs):
        raise Conflict(f"the guest has {len(nics)} network interfaces, and Slurm allocated {len(vfs)} VFs")
    request.pop("address", None)
    return {**request, "nics": [{**nic, "vf": str(vf)} for nic, vf in zip(nics, vfs, strict=True)]}


def _count_nvme(fields: Mapping[str, Any]) -> int:
    """As `disks.count_nvme`, for a request that `wish.read_wish` has checked. To parse it again takes 80 ms for each guest."""
    return sum(disk.get("kind", NVME) == NVME for disk in fields.get("disks") or ())
