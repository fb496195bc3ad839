"""Submits a guest so that it runs once or never, whatever happens to the controller: the guest's own id decides."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from orchestrator.errors import Conflict, NoRoom, NotFound, OrchestratorError, QuotaExceeded, RequestError
from orchestrator.fleet import slurm
from orchestrator.fleet.apart import build_gres, find_slot
from orchestrator.fleet.configuration import FOLDER
from orchestrator.fleet.disks import check_disks, count_nvme, has_emulated
from orchestrator.fleet.gres import NVME
from orchestrator.fleet.node import EDGE, EMULATED_DISK, NETWORK, SRIOV
from orchestrator.fleet.quota import Quota, check_quota
from orchestrator.fleet.saved import is_saved
from orchestrator.fleet.slurm import CONTROLLER_SECONDS, SAVE_SECONDS, Use, Value
from orchestrator.model.request import GuestRequest, Restart, parse_guest_request
from orchestrator.model.waiver import Waiver

ORPHAN_SECONDS = 90.0
"""After a restart, the controller has jobs ended that it has forgotten: KillWait, and the time for the Epilog."""
MAX_MINUTES = 525_600
_ATTEMPTS = 3
_UNSUPPORTED = {
    "placement": "Slurm chooses the CPUs and VFs",
    "cache_ways": "Slurm does not know the caches of the hosts",
    "bandwidth": "Slurm does not know the memory bandwidth of the hosts",
    "user_data": "the controller would store the secret",
    "network_config": "the controller would store the secret",
}
_FOREVER = "UNLIMITED"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
NO_QUOTA = Quota()
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
        if not feature.replace("-", "").replace("_", "").isalnum():
            raise RequestError(
                f"{feature!r} is not a feature", "use letters, digits, - and _; `nohype fleet hosts` shows the features"
            )
    if minutes is not None and not 1 <= minutes <= MAX_MINUTES:
        raise RequestError(f"minutes is {str(minutes)[:20]}", f"use 1 to {MAX_MINUTES}")
    if group is not None:
        find_slot(group)  # checks the name
    limit = parse_deadline(deadline) if deadline is not None else None
    return Wish(request, complete, tuple(features), minutes, group, limit, tenant, requeue)


def submit(wish: Wish, quota: Quota = NO_QUOTA) -> slurm.Job:
    """Submits a guest, and returns its job when the controller cannot forget it any more. A repeated call changes nothing.

    Raises:
        NoRoom: no node can ever have the guest; ``reasons`` has one sentence per node.
        QuotaExceeded: the guest and the other guests of its tenant exceed the quota; the guest is not in the fleet.
        Conflict: the fleet has another guest of this name.
        OrchestratorError: the controller does not respond, or it is not known whether the guest runs; the message says which.
    """
    slurm.check_version()
    for _ in range(_ATTEMPTS):
        if (job := _find(wish)) and is_saved(job):
            return _release(wish, quota, job)
        if not job:
            if wish.tenant:
                check_quota(wish.tenant, quota, wish.use, slurm.read_tenant_uses(wish.tenant))
            check_room(wish, slurm.read_nodes())
            check_deadline(wish)
            submit_once(wish)
        time.sleep(SAVE_SECONDS)
        if job := _ask(wish, lambda: _find(wish)):
            return _release(wish, quota, job)
        wait_until_orphans_ended(wish)
    raise OrchestratorError(f"the controller forgot guest {wish.request.name} {_ATTEMPTS} times", _repeat(wish))


def find_job(name: str) -> slurm.Job:
    """Returns the guest's job that has not ended. If all have ended, returns the newest. Raises NotFound without a job."""
    return choose_job(name, slurm.read_jobs(name))


def choose_job(name: str, jobs: Sequence[slurm.Job]) -> slurm.Job:
    """As `find_job`, from jobs that were read before, oldest first."""
    own = [job for job in jobs if job.name == name]
    for job in (*(job for job in own if not job.has_ended), *reversed(own)):
        return job
    raise NotFound(f"the fleet does not have guest {name}", "`nohype fleet list` shows all guests")


def cancel(*names: str) -> tuple[slurm.Job, ...]:
    """Ends all jobs of these names that have not ended, and returns when the controller cannot forget it any more.

    Returns one job per name, the newest that had not ended, as it is then. Raises NotFound if the fleet does not have one of the
    guests, and then ends none; OrchestratorError if the controller forgot the request several times.
    """
    jobs = slurm.read_jobs()
    numbers = [choose_job(name, jobs).number for name in names]
    for attempt in range(_ATTEMPTS + 1):
        jobs = slurm.retry(slurm.read_jobs, CONTROLLER_SECONDS)
        running = [job for job in jobs if job.name in names and not job.is_ending]
        if not running:
            known = {job.number: job for job in jobs}
            return tuple(known.get(number) or choose_job(name, jobs) for number, name in zip(numbers, names, strict=True))
        if attempt < _ATTEMPTS:
            slurm.cancel_jobs([job.number for job in running])
            time.sleep(SAVE_SECONDS)
    left = ", ".join(sorted({job.name for job in running}))
    raise OrchestratorError(f"the controller forgot {_ATTEMPTS} times that guest {left} is to be ended", "repeat the command")


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


def _find(wish: Wish) -> slurm.Job | None:
    return select_job(wish, slurm.read_jobs(wish.request.name))


def select_job(wish: Wish, jobs: Sequence[slurm.Job]) -> slurm.Job | None:
    """The job of the guest, from those of its name, oldest first; withdraws others of the same guest that wait.

    Raises Conflict if the name belongs to another guest that has not ended.
    """
    own = [job for job in jobs if job.guest_id == wish.guest_id]
    others = [job for job in jobs if job not in own and not job.has_ended]
    if others and not (own and own[0].number < others[0].number):  # of two that came at the same time the first is the guest
        _cancel_waiting(own)
        raise Conflict(f"the fleet has another guest {wish.request.name}, job {others[0].number}", "choose another name")
    if own:
        _cancel_waiting(own[1:])
        return own[0]
    return None


def _release(wish: Wish, quota: Quota, job: slurm.Job) -> slurm.Job:
    """Releases a guest of a tenant if it is within the quota, and returns when the controller has saved it.

    Raises QuotaExceeded if not, and Conflict if the guest is held for another reason or another tenant.
    """
    for attempt in range(_ATTEMPTS + 1):
        if not job.is_held or job.state != "PENDING":
            return job
        if not wish.tenant or job.tenant != wish.tenant:
            owner = f"tenant {job.tenant}" if job.tenant else "the operators"
            raise Conflict(f"guest {wish.request.name} of {owner} is held", f"run `scontrol release {job.number}`")
        if attempt < _ATTEMPTS:
            _release_once(wish, quota, job)
            job = _ask(wish, lambda: find_job(wish.request.name))
    raise OrchestratorError(f"the controller forgot {_ATTEMPTS} times that guest {wish.request.name} may start", _repeat(wish))


def _release_once(wish: Wish, quota: Quota, job: slurm.Job) -> None:
    uses = _ask(wish, lambda: slurm.read_tenant_uses(wish.tenant))
    try:
        check_quota(wish.tenant, quota, wish.use, [use for use in uses if use.number < job.number])
    except QuotaExceeded:
        slurm.cancel_jobs([job.number])
        raise
    slurm.release_jobs([job.number])
    time.sleep(SAVE_SECONDS)


def _cancel_waiting(jobs: Sequence[slurm.Job]) -> None:
    """Of two callers that submit the same name or id at the same time; none of these has started (singleton)."""
    if waiting := [job.number for job in jobs if job.state == "PENDING"]:
        slurm.cancel_jobs(waiting)


def submit_once(wish: Wish) -> None:
    """Raises Unreachable if it is not known whether the controller has the guest."""
    try:
        slurm.submit_job(build_options(wish), build_script(wish))
    except slurm.Unreachable:  # the controller may have accepted the job before the connection was lost
        _ask(wish, lambda: slurm.read_jobs(wish.request.name))


def _ask(wish: Wish, call: Callable[[], Value]) -> Value:
    """Asks about a guest that may have been submitted. Raises Unreachable, which says that this is not known."""
    try:
        return slurm.retry(call, CONTROLLER_SECONDS)
    except slurm.Unreachable as error:
        what = f"it is not known whether guest {wish.request.name} was submitted: {error.message}"
        raise slurm.Unreachable(what, _repeat(wish)) from None


def wait_until_orphans_ended(*wishes: Wish) -> None:
    """Jobs that were acknowledged and are forgotten may have been started. Returns when no host can still have their guests.

    Raises OrchestratorError if a node does not respond: a guest could run there.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        known = {job.guest_id for job in slurm.retry(slurm.read_jobs, CONTROLLER_SECONDS)}
        if not (left := [wish for wish in wishes if wish.guest_id not in known]):
            return
        time.sleep(SAVE_SECONDS)
    if silent := [node.name for node in slurm.read_nodes() if not node.responds]:
        names, hosts = ", ".join(wish.request.name for wish in left), ", ".join(silent)
        what = f"the controller forgot guest {names}, which may run on {hosts}: no response from there"
        raise OrchestratorError(what, f"check these hosts; then {_repeat(*left)}")


def _repeat(*wishes: Wish) -> str:
    ids = ", ".join(wish.guest_id for wish in wishes)
    return f"repeat the command with --id {ids}: the guest is not started twice"
