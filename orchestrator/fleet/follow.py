"""Waits for a guest of the fleet, and tells what happened to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from orchestrator.errors import GuestError, NotFound, OrchestratorError
from orchestrator.fleet import slurm
from orchestrator.fleet.job import Job
from orchestrator.fleet.journal import Entry, What
from orchestrator.fleet.slurm import CONTROLLER_SECONDS

_POLL_SECONDS = 1.0
_READY = (What.READY, What.READY_BY_SSH)


def wait_ready(name: str, guest_id: str, seconds: float | None = None) -> Job:
    """Waits until the guest has reported ready; an image that does so only by SSH is accepted when its guest runs.

    Args:
        seconds: None to wait indefinitely.

    Raises:
        GuestError: the guest ended without success, or was not ready in time; it stays in the fleet.
        NotFound: the controller does not know the guest any more.
    """
    return _wait(name, guest_id, _is_ready, "to report ready", _Limit(seconds))


def wait_all_ready(guests: Iterable[tuple[str, str]], seconds: float | None = None) -> tuple[Job | OrchestratorError, ...]:
    """As `wait_ready` for several guests, each with name and id. ``seconds`` is for all; an error of one is its result."""
    limit = _Limit(seconds)

    def wait(name: str, guest_id: str) -> Job | OrchestratorError:
        try:
            return _wait(name, guest_id, _is_ready, "to report ready", limit)
        except (GuestError, NotFound) as error:
            return error

    return tuple(wait(name, guest_id) for name, guest_id in guests)


def wait_ended(jobs: Sequence[Job], seconds: float | None = None) -> tuple[Job, ...]:
    """Waits until the guests have ended and their hosts have released their resources; returns their jobs as they are then.

    Args:
        seconds: for all of them; None to wait indefinitely.

    Raises:
        GuestError: a guest did not end in time, or its host could not release its resources.
        NotFound: the controller does not know one of the guests any more.
    """
    limit = _Limit(seconds)
    ended = tuple(_wait(job.name, job.guest_id, lambda job: job.has_ended, "to end", limit) for job in jobs)
    nodes = slurm.read_nodes()
    for job in ended:
        if node := _find_failed_epilog(job, nodes):
            what = f"the resources of guest {job.name} were not released: {node.reason}"
            raise GuestError(what, f"repair {node.name}; {_see(job.name)}")
    return ended


def read_log(job: Job) -> tuple[Entry, ...]:
    """What Slurm and the guest's host reported, oldest first."""
    return tuple(sorted(_collect(job), key=lambda entry: entry.time))


def _collect(job: Job) -> Iterator[Entry]:
    yield Entry(job.submitted, What.SUBMITTED, f"as job {job.number}")
    if job.started:
        yield Entry(job.started, What.ALLOCATED, f"resources on {job.node}")
    yield from job.entries
    if job.ended:
        yield Entry(job.ended, What.ENDED, f"job {job.number}: {_describe(job)}")
    if node := _find_failed_epilog(job, slurm.read_nodes()):
        yield Entry(node.since, What.DRAINED, f"{node.name}: {node.reason}")


def _find_failed_epilog(job: Job, nodes: Iterable[slurm.NodeState]) -> slurm.NodeState | None:
    """The node of the job, if it was drained because the Epilog failed; the reason is that of `cli.fleet_step`."""
    reason = f"epilog of job {job.number}:"
    return next((node for node in nodes if node.name == job.node and node.reason.startswith(reason)), None)


class _Limit:
    """Time for one or several waits; None for an indefinite one."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end


def _is_ready(job: Job) -> bool:
    """Raises GuestError if the guest ended without success."""
    reported = any(entry.what in _READY for entry in job.entries)
    if job.has_ended and not (reported and job.state == "COMPLETED"):
        raise GuestError(f"guest {job.name} has ended ({_describe(job)})", _see(job.name))
    return reported and job.state != "COMPLETING"


def _wait(name: str, guest_id: str, accept: Callable[[Job], bool], what: str, limit: _Limit) -> Job:
    while True:
        jobs = slurm.retry(lambda: slurm.read_jobs(name), CONTROLLER_SECONDS)
        job = next((job for job in jobs if job.guest_id == guest_id), None)
        if job is None:
            raise NotFound(f"the controller does not know guest {name} ({guest_id}) any more", "see `nohype fleet list`")
        if accept(job):
            return job
        if limit.is_over:
            raise GuestError(
                f"timed out after {limit.seconds:g} s waiting for guest {name} {what} ({_describe(job)})", _see(name)
            )
        time.sleep(_POLL_SECONDS)


def _describe(job: Job) -> str:
    return ": ".join(filter(None, (job.state.lower(), job.explanation)))


def _see(name: str) -> str:
    return f"see `nohype fleet logs {name}`"
