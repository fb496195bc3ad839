"""A guest for the fleet: its request with the constraints, and what it becomes for Slurm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from orchestrator.errors import NoRoom, RequestError
from orchestrator.fleet import slurm
from orchestrator.fleet.apart import build_gres, find_slot
from orchestrator.fleet.configuration import FOLDER
from orchestrator.fleet.disks import check_disks, count_nvme, has_emulated
from orchestrator.fleet.gres import NVME
from orchestrator.fleet.node import EDGE, EMULATED_DISK, NETWORK, SRIOV, check_feature
from orchestrator.fleet.slurm import Use
from orchestrator.model.request import GuestRequest, Restart, parse_guest_request
from orchestrator.model.waiver import Waiver

MAX_MINUTES = 525_600
_UNSUPPORTED = {
    "placement": "Slurm chooses the CPUs and VFs",
    "cache_ways": "Slurm does not know the caches of the hosts",
    "bandwidth": "Slurm does not know the memory bandwidth of the hosts",
    "user_data": "the controller would store the secret",
    "network_config": "the controller would store the secret",
}
_FOREVER = "UNLIMITED"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
HEADER = "# nohype: "
"""Begins the line of a job script with what the guest's request does not have."""


@dataclass(frozen=True)
class Wish:
    """A guest for the fleet: its request, and what its host must have.

    Attributes:
        features: of its node.
        minutes: after which Slurm ends the guest; None for never.
        group: no two guests of a group run on the same host; None for no group.
        deadline: at which Slurm ends the guest, or withdraws it if it could not start in time (UTC, ISO 8601); None for none.
        tenant: whose quota it is counted against; empty for a guest of the operators.
        requeue: whether it may be started on another host, once an operator has stated that its host is off.
    """

    request: GuestRequest
    fields: Mapping[str, Any]
    features: tuple[str, ...] = ()
    minutes: int | None = None
    group: str | None = None
    deadline: str | None = None
    tenant: str = ""
    requeue: bool = False

    @property
    def guest_id(self) -> str:
        return str(self.fields["id"])

    @property
    def vfs(self) -> int:
        return 0 if Waiver.SOFTWARE_EDGE in self.request.accept else len(self.request.wanted_nics)

    @property
    def disks(self) -> int:
        """NVMe controllers."""
        return count_nvme(self.request.disks)

    @property
    def memory(self) -> int:
        """MiB, rounded up."""
        return -(-self.request.size.bytes >> 20)

    @property
    def needed(self) -> tuple[str, ...]:
        """Features of the node. A guest with a software edge must not take a VF that Slurm counts as free."""
        pages = [f"pages-{self.request.page_size}"] if self.request.page_size else []
        networks = [f"{NETWORK}{nic.network}" for nic in self.request.nics or () if nic.network]
        disks = [EMULATED_DISK] if has_emulated(self.request.disks) else []
        return tuple(dict.fromkeys([SRIOV if self.vfs else EDGE, *pages, *networks, *disks, *self.features]))

    @property
    def use(self) -> Use:
        return Use(0, self.request.cores, self.memory, self.vfs)

    @property
    def slot(self) -> int | None:
        return find_slot(self.group) if self.group is not None else None


def parse_deadline(text: str) -> str:
    """UTC, from ISO 8601; local time if it has no offset. Raises RequestError."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):{_TIME}}"
    except (ValueError, OverflowError):
        raise RequestError(f"{text!r} is not a time", "use the form 2030-01-31T18:00, or 2030-01-31T18:00Z for UTC") from None


def read_wish(
    fields: Mapping[str, Any], features: Sequence[str] = (), minutes: int | None = None, *, group: str | None = None,
    deadline: str | None = None, tenant: str = "", requeue: bool = False,
) -> Wish:  # fmt: skip
    """Checks the fields of a request; adds a guest id if it has none. Raises RequestError."""
    complete = {**fields, "id": str(uuid4()) if fields.get("id") is None else fields["id"]}
    request = parse_guest_request(complete)
    for name, reason in _UNSUPPORTED.items():
        if complete.get(name):
            raise RequestError(f"{name} cannot be requested for a guest of the fleet: {reason}", f"omit {name}")
    check_disks(request.disks)
    if request.restart is not Restart.NEVER:
        raise RequestError("a guest of the fleet cannot be restarted by its host", "omit restart")
    for nic in request.nics or ():
        if nic.uplink or nic.vf:
            raise RequestError(
                "uplink and vf of a network interface cannot be requested in the fleet", "omit them: Slurm chooses the VF"
            )
    for feature in features:
        check_feature(feature)
    if minutes is not None and not 1 <= minutes <= MAX_MINUTES:
        raise RequestError(f"minutes is {str(minutes)[:20]}", f"use 1 to {MAX_MINUTES}")
    if group is not None:
        find_slot(group)  # checks the name
    limit = parse_deadline(deadline) if deadline is not None else None
    return Wish(request, complete, tuple(features), minutes, group, limit, tenant, requeue)


def build_options(wish: Wish) -> list[str]:
    """Options of sbatch. Two jobs of one name never run at the same time (singleton)."""
    resources = [*([f"vf:{wish.vfs}"] if wish.vfs else []), *([f"{NVME}:{wish.disks}"] if wish.disks else [])]
    resources += build_gres([wish.slot]) if wish.slot is not None else []
    # With a deadline and no time, Slurm ends the job at the deadline; with an unlimited time, it would ignore the deadline.
    times = [f"--deadline={wish.deadline.removesuffix('Z')}"] if wish.deadline else []
    if wish.minutes is not None or not wish.deadline:
        times.append(f"--time={wish.minutes or _FOREVER}")
    return [
        f"--job-name={wish.request.name}", f"--comment={wish.guest_id}", f"--partition={slurm.PARTITION}",
        "--dependency=singleton", "--nodes=1", *([f"--account={wish.tenant}", "--hold"] if wish.tenant else []),
        f"--ntasks={wish.request.cores}", "--cpus-per-task=1", "--ntasks-per-core=1", f"--mem={wish.memory}M",
        *([f"--gres={','.join(resources)}"] if resources else []), f"--constraint={'&'.join(wish.needed)}", "--no-requeue",
        *times, "--output=/dev/null", "--chdir=/",
    ]  # fmt: skip


def build_script(wish: Wish) -> str:
    """The request is the input of the job step; JSON has no line breaks, so no line of it ends the input early."""
    text = json.dumps(wish.fields)
    more = {field.name: getattr(wish, field.name) for field in fields(wish) if field.name not in ("request", "fields")}
    return f"#!/bin/sh\n{HEADER}{json.dumps(more)}\nexec {FOLDER}/nohype-job <<'REQUEST'\n{text}\nREQUEST\n"


def find_reasons(wish: Wish, nodes: Sequence[slurm.NodeState]) -> tuple[str, ...]:
    """Why no node can ever have the guest, one sentence per node; empty if a node can."""
    reasons = []
    for node in nodes:
        if not (found := list(_explain(wish, node))):
            return ()
        reasons.append(f"{node.name}: {', '.join(found)}")
    return tuple(reasons)


def _explain(wish: Wish, node: slurm.NodeState) -> Iterator[str]:
    if wish.request.cores > node.cores:
        yield f"{node.cores} cores, {wish.request.cores} requested"
    if wish.memory > node.memory:
        yield f"{node.memory} MiB of huge pages, {wish.memory} requested"
    if wish.vfs > node.vfs:
        yield f"{node.vfs} VFs, {wish.vfs} requested"
    if wish.disks > node.disks:
        yield f"{node.disks} NVMe controllers, {wish.disks} requested"
    if missing := [feature for feature in wish.needed if feature not in node.features]:
        yield f"lacks the feature {' and '.join(missing)}"
    if wish.slot is not None and wish.slot not in node.slots:
        yield f"does not have slot {wish.slot} of group {wish.group}"


def check_deadline(wish: Wish) -> None:
    """Raises RequestError if the guest cannot end by its deadline even if it starts now. Slurm plans with whole minutes."""
    if wish.deadline is None:
        return
    earliest = datetime.now(UTC) + timedelta(minutes=wish.minutes or 1)
    if datetime.fromisoformat(wish.deadline) < earliest:
        what = f"guest {wish.request.name} cannot end by {wish.deadline}: the earliest end is {earliest:{_TIME}}"
        raise RequestError(what, "choose a later --deadline, or fewer --minutes")


def check_room(wish: Wish, nodes: Sequence[slurm.NodeState]) -> None:
    """Raises NoRoom if no node can ever have the guest."""
    if not nodes:
        raise NoRoom("the fleet has no nodes", (), f"add the hosts to the partition {slurm.PARTITION}, see docs/fleet.md")
    if reasons := find_reasons(wish, nodes):
        raise NoRoom(
            f"no host of the fleet can have guest {wish.request.name}", reasons, "`nohype fleet hosts` shows what they have"
        )
