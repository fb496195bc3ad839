"""Submits a guest so that it runs once or never, whatever happens to the controller: the guest's own id decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from orchestrator.errors import Conflict, NotFound, OrchestratorError, QuotaExceeded
from orchestrator.fleet import slurm
from orchestrator.fleet.job import Job
from orchestrator.fleet.quota import Quota, check_quota
from orchestrator.fleet.saved import is_saved
from orchestrator.fleet.slurm import CONTROLLER_SECONDS, SAVE_SECONDS, Value
from orchestrator.fleet.wish import Wish, build_options, build_script, check_deadline, check_room

ORPHAN_SECONDS = 90.0
"""After a restart, the controller has jobs ended that it has forgotten: KillWait, and the time for the Epilog."""
_ATTEMPTS = 3
NO_QUOTA = Quota()


def submit(wish: Wish, quota: Quota = NO_QUOTA) -> Job:
    """Submits a guest, and returns its job when the controller cannot forget it any more. A repeated call changes nothing.

    Raises:
        NoRoom: no node can ever have the guest; ``reasons`` has one sentence per node.
        QuotaExceeded: the guest and the other guests of its tenant exceed the quota; the guest is not in the fleet.
        Conflict: the fleet has another guest of this name, or of this id.
        OrchestratorError: the controller does not respond, or it is not known whether the guest runs; the message says which.
    """
    slurm.check_version()
    for _ in range(_ATTEMPTS):
        if (job := _find(wish)) and is_saved(job):
            return _release(wish, quota, job)
        if not job:
            check_ids((wish,), slurm.read_jobs())
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


def find_job(name: str) -> Job:
    """Returns the guest's job that has not ended. If all have ended, returns the newest. Raises NotFound without a job."""
    return choose_job(name, slurm.read_jobs(name))


def choose_job(name: str, jobs: Sequence[Job]) -> Job:
    """As `find_job`, from jobs that were read before, oldest first."""
    own = [job for job in jobs if job.name == name]
    for job in (*(job for job in own if not job.has_ended), *reversed(own)):
        return job
    raise NotFound(f"the fleet does not have guest {name}", "`nohype fleet list` shows all guests")


def cancel(*names: str) -> tuple[Job, ...]:
    """Ends all jobs of these names that have not ended, and returns when the controller cannot forget it any more.

    Returns one job per name, the newest that had not ended, as it is then. Raises NotFound if the fleet does not have one of the
    guests, and then ends none; OrchestratorError if the controller forgot the request several times.
    """
    jobs = slurm.read_jobs()
    numbers = [choose_job(name, jobs).number for name in names]
    for attempt in range(_ATTEMPTS + 1):
        running = [job for job in jobs if job.name in names and not job.is_ending]
        if not running:
            known = {job.number: job for job in jobs}
            return tuple(known.get(number) or choose_job(name, jobs) for number, name in zip(numbers, names, strict=True))
        if attempt < _ATTEMPTS:
            slurm.cancel_jobs([job.number for job in running])
            time.sleep(SAVE_SECONDS)
            jobs = slurm.retry(slurm.read_jobs, CONTROLLER_SECONDS)
    left = ", ".join(sorted({job.name for job in running}))
    raise OrchestratorError(f"the controller forgot {_ATTEMPTS} times that guest {left} is to be ended", "repeat the command")


def _find(wish: Wish) -> Job | None:
    return select_job(wish, slurm.read_jobs(wish.request.name))


def select_job(wish: Wish, jobs: Sequence[Job]) -> Job | None:
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


def check_ids(wishes: Iterable[Wish], jobs: Iterable[Job]) -> None:
    """Raises Conflict if a guest of another name has one of the ids: the controller would refuse it at its start only.

    See `configuration.build_start`.
    """
    names = {job.guest_id: job.name for job in jobs}
    for wish in wishes:
        if (other := names.get(wish.guest_id, wish.request.name)) != wish.request.name:
            raise Conflict(f"id {wish.guest_id} of guest {wish.request.name} is that of guest {other}", "choose another id")


def _release(wish: Wish, quota: Quota, job: Job) -> Job:
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


def _release_once(wish: Wish, quota: Quota, job: Job) -> None:
    uses = _ask(wish, lambda: slurm.read_tenant_uses(wish.tenant))
    try:
        check_quota(wish.tenant, quota, wish.use, [use for use in uses if use.number < job.number])
    except QuotaExceeded:
        slurm.cancel_jobs([job.number])
        raise
    slurm.release_jobs([job.number])
    time.sleep(SAVE_SECONDS)


def _cancel_waiting(jobs: Sequence[Job]) -> None:
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
