"""Chooses the disks of a guest: whole NVMe controllers, or files. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.errors import RequestError
from orchestrator.model.plan import DiskPlan, Plan, Policy
from orchestrator.model.request import DiskKind, DiskRequest, GuestRequest
from orchestrator.model.target import TARGET_WORD, find_nic
from orchestrator.model.topology import NvmeController, Topology, VolumeGroup
from orchestrator.model.waiver import Waiver
from orchestrator.planning.capacity import CLAIMED, FREE, OWNED, UNUSABLE
from orchestrator.planning.inputs import PlanningInput
from orchestrator.values import PciAddress, Size

DISK = "disk"
"""Prefix of reasons that name disks."""
VOLUME_PREFIX = "nohype-"
"""Of the names of logical volumes. The host role's udev rule knows it."""
_NVME = "nvme"
_MOST_REASONS = 8
"""Maximum number of controllers that a refusal lists with a reason."""


def check_waivers(request: GuestRequest, policy: Policy) -> None:
    """Raises RequestError if the guest would lack a property, and neither request nor policy accept that."""
    emulated = any(disk.kind is DiskKind.EMULATED for disk in request.disks)
    if emulated and Waiver.EMULATED_DISK not in (*request.accept, *policy.accept):
        message = f"an emulated disk is weaker than an NVMe controller: {Waiver.EMULATED_DISK.reason}"
        raise RequestError(message, f"to accept this, add --accept {Waiver.EMULATED_DISK} to the request, or to [host] accept")


def find_free(request: GuestRequest, host: PlanningInput) -> tuple[list[NvmeController], list[str]]:
    """The controllers that the guest can get, and the reasons if these are not enough for the request."""
    wanted = [disk for disk in request.disks if disk.kind is DiskKind.NVME]
    lacks = [*_check_emulated(request, host), *_check_target(request, host)]
    if not wanted:
        return [], lacks
    free, refused = [], []
    named = request.placement.disks if request.placement else None
    for controller in host.topology.controllers:
        is_named = named is None or str(controller.address) in named
        reason = _check_controller(controller, host) if is_named else "not in placement.disks"
        refused += [f"{_name(controller)}: {reason}"] if reason else []
        free += [] if reason else [controller]
    for number, disk in enumerate(request.disks, 1):
        if disk.kind is DiskKind.NVME and (lack := _find_lack(disk, free, refused, host.topology)):
            lacks.append(f"{DISK} {number}: {lack}")
    if not lacks and not _assign(wanted, free, None):
        more = f" {_list(refused)}" if refused else ""
        lacks.append(f"{DISK}: {len(wanted)} NVMe controllers of the requested sizes, but only {len(free)} are free{more}")
    return free, lacks


def count_remote(request: GuestRequest, free: Sequence[NvmeController], node: int) -> int:
    """The number of disks that would be on another node than this one."""
    return sum(disk.node not in (node, None) for disk in _assign(_list_nvme(request), free, node))


def plan_disks(
    request: GuestRequest, free: Sequence[NvmeController], node: int, folder: str, group: VolumeGroup | None
) -> tuple[DiskPlan, ...]:
    """``free`` is of ``find_free`` without reasons. ``folder``: for the files of emulated disks if there is no ``group``."""
    controllers = iter(_assign(_list_nvme(request), free, node))
    disks: list[DiskPlan] = []
    for number, disk in enumerate(request.disks, 1):
        if disk.kind is DiskKind.NVME:
            found = next(controllers)
            disks.append(DiskPlan(found.size, found.serial or "", found.address, found.node))
        elif disk.target:
            disks.append(DiskPlan(Size(0), target=disk.target))
        elif group:
            size, name = Size(_count_extents(disk, group) * group.extent.bytes), f"{VOLUME_PREFIX}{request.name}-{number}"
            disks.append(DiskPlan(size, file=f"/dev/{group.name}/{name}", group=group.name))
        else:
            disks.append(DiskPlan(Size(disk.minimum), file=f"{folder}/{request.name}-{number}.raw"))
    return tuple(disks)


def list_disk_uses(
    topology: Topology, plans: Mapping[str, Plan], states: Mapping[str, str], policy: Policy
) -> Iterator[tuple[NvmeController, str, str, str]]:
    """Each controller with its use, the guest that owns it, and why guests cannot have it; each of the last two can be empty.

    Devices of unmanaged domains are unusable by their driver. ``states`` are those of guests by name.
    """
    owners = {disk.address: name for name, plan in plans.items() for disk in plan.controllers}
    for controller in topology.controllers:
        if guest := owners.get(controller.address):
            yield controller, OWNED.get(states[guest], CLAIMED), guest, ""
        else:
            why = _check_unowned(controller, topology, policy)
            yield controller, UNUSABLE if why else FREE, "", why


def describe_disks(request: GuestRequest) -> str:
    """Empty without disks."""
    texts = []
    for disk in request.disks:
        least = f" of at least {disk.size}" if disk.size else ""
        if disk.target:
            texts.append(f", disk {disk.target}")
            continue
        kind = "an emulated disk" if disk.kind is DiskKind.EMULATED else "an NVMe controller"
        texts.append(f", NVMe controller {disk.serial}{least}" if disk.serial else f", {kind}{least}")
    return "".join(texts)


def list_targets(request: GuestRequest) -> tuple[str, ...]:
    """Words for the guest's kernel command line: the target of its root, and the number of the NIC that reaches it, from 2."""
    if not (target := request.network_disk):
        return ()
    number = find_nic(target, [nic.address for nic in request.wanted_nics])
    return (f"{TARGET_WORD}{target}", *((f"nohype.target-nic={number}",) if number > 1 else ()))


def _check_target(request: GuestRequest, host: PlanningInput) -> list[str]:
    target = request.network_disk
    taken = target is not None and target.key in host.allocated.disks
    return [f"{DISK} 1: another guest of this host owns the target {target}"] if taken else []


def _list_nvme(request: GuestRequest) -> list[DiskRequest]:
    return [disk for disk in request.disks if disk.kind is DiskKind.NVME]


def _assign(wanted: Sequence[DiskRequest], free: Sequence[NvmeController], node: int | None) -> tuple[NvmeController, ...]:
    """A controller per request, in the order of the requests; () if that is not possible. Prefers the node, then small ones.

    Largest request first: what fits a larger request fits all smaller ones, so no choice can make a later request fail.
    """
    left = {disk.serial: disk for disk in free}
    chosen: dict[int, NvmeController] = {}
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index].serial is None, -wanted[index].minimum))
    for index in order:
        request = wanted[index]
        fitting = [
            disk
            for disk in left.values()
            if request.serial in (None, disk.serial) and disk.size.bytes >= request.minimum
        ]  # fmt: skip
        if not fitting:
            return ()
        best = min(fitting, key=lambda disk: (disk.node not in (node, None), disk.size.bytes, disk.serial))
        chosen[index] = left.pop(best.serial)
    return tuple(chosen[index] for index in range(len(wanted)))


def _check_controller(controller: NvmeController, host: PlanningInput) -> str:
    """The reason why guests cannot have the controller, or empty. The first that an operator has to know."""
    address, allocated = controller.address, host.allocated
    if str(address) in allocated.disks or (controller.serial and controller.serial in allocated.disks):
        return "owned by a guest"
    if address in allocated.vfs or address in allocated.last_vfs:
        return "a device of an unmanaged domain"
    return _check_unowned(controller, host.topology, host.policy)


def _check_unowned(controller: NvmeController, topology: Topology, policy: Policy) -> str:
    if controller.fault:
        return controller.fault
    if controller.driver != _NVME:
        return f"its driver is {controller.driver or 'none'}, expected {_NVME}"
    if not controller.serial:
        return "it reports no serial number"
    if len(controller.namespaces) != 1:
        return f"it has {len(controller.namespaces)} namespaces, expected 1"
    if controller.uses:
        return f"used by the host: {'; '.join(controller.uses)}"
    if controller.signatures and controller.serial not in policy.disk_serials:
        what = "; ".join(controller.signatures)
        return f"not empty: {what} (to have its contents destroyed, add the serial to [disks] serials)"
    return _check_group(controller.address, topology)


def _check_group(address: PciAddress, topology: Topology) -> str:
    group = topology.group_of.get(address)
    if group is None:
        return "it is in no IOMMU group"
    others = ", ".join(str(device) for device in group.devices if device != address)
    return f"it shares IOMMU group {group.number} with {others}" if others else ""


def _find_lack(disk: DiskRequest, free: Sequence[NvmeController], refused: Sequence[str], topology: Topology) -> str:
    if disk.serial:
        known = next((one for one in topology.controllers if one.serial == disk.serial), None)
        if known is None:
            return f"the host has no NVMe controller with serial {disk.serial!r}, or its serial cannot be read"
        if known not in free:
            return next(reason for reason in refused if reason.startswith(f"{_name(known)}: "))
        if known.size.bytes < disk.minimum:
            return f"{_name(known)} has {known.size}, requested {disk.size}"
        return ""
    if any(one.size.bytes >= disk.minimum for one in free):
        return ""
    sizes = ", ".join(str(one.size) for one in free)
    least = f" of at least {disk.size}" if disk.size else ""
    has = f"free: {sizes}" if sizes else f"the host has {len(topology.controllers)}"
    return f"no free NVMe controller{least} ({has}){' ' + _list(refused) if refused else ''}"


def _check_emulated(request: GuestRequest, host: PlanningInput) -> list[str]:
    emulated = [disk for disk in request.disks if disk.kind is DiskKind.EMULATED]
    group = host.topology.volume_group
    if not emulated or (host.policy.disk_folder and not host.policy.disk_group):
        return []
    if not host.policy.disk_group:
        return [f"{DISK}: this host offers no emulated disks (neither [disks] emulated nor volume_group is set)"]
    if group is None or group.fault:
        return [f"{DISK}: {group.fault if group else f'volume group {host.policy.disk_group} was not read'}"]
    wanted = sum(_count_extents(disk, group) for disk in emulated) * group.extent.bytes
    if wanted > group.free.bytes:
        return [f"{DISK}: volume group {group.name} has {group.free} free, requested {Size(wanted)}"]
    return []


def _count_extents(disk: DiskRequest, group: VolumeGroup) -> int:
    return -(-disk.minimum // group.extent.bytes)


def _list(refused: Sequence[str]) -> str:
    more = [f"and {len(refused) - _MOST_REASONS} more"] if len(refused) > _MOST_REASONS else []
    return f"[{'; '.join([*refused[:_MOST_REASONS], *more])}]"


def _name(controller: NvmeController) -> str:
    return f"{controller.serial} ({controller.address})" if controller.serial else str(controller.address)
