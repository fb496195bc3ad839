"""Waits for a guest of the fleet, and tells what happened to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from orchestrator.errors import GuestError, NotFound
from orchestrator.fleet import slurm
from orchestrator.fleet.journal import Entry, What
from orchestrator.fleet.slurm import CONTROLLER_SECONDS

_POLL_SECONDS = 1.0
_READY = (What.READY, What.READY_BY_SSH)


def wait_ready(name: str, guest_id: str, seconds: float | None = None) -> slurm.Job:
    """Waits until the guest has reported ready; an image that does so only by SSH is accepted when its guest runs.

    Args:
        seconds: None to wait indefinitely.

    Raises:
        GuestError: the guest ended without success, or was not ready in time; it stays in the fleet.
        NotFound: the controller does not know the guest any more.
    """

    def is_ready(job: slurm.Job) -> bool:
        reported = any(entry.what in _READY for entry in job.entries)
        if job.has_ended and not (reported and job.state == "COMPLETED"):
            raise GuestError(f"guest {name} has ended ({_describe(job)})", _see(name))
        return reported and job.state != "COMPLETING"

    return _wait(name, guest_id, is_ready, "to report ready", seconds)


def wait_ended(name: str, guest_id: str, seconds: float | None = None) -> slurm.Job:
    """Waits until the guest has ended and its host has released its resources.

    Args:
        seconds: None to wait indefinitely.

    Raises:
        GuestError: the guest did not end in time, or its host could not release its resources.
        NotFound: the controller does not know the guest any more.
    """
    job = _wait(name, guest_id, lambda job: job.has_ended, "to end", seconds)
    if node := _find_failed_epilog(job):
        raise GuestError(f"the resources of guest {name} were not released: {node.reason}", f"repair {node.name}; {_see(name)}")
    return job


def read_log(job: slurm.Job) -> tuple[Entry, ...]:
    """What Slurm and the guest's host reported, oldest first."""
    return tuple(sorted(_collect(job), key=lambda entry: entry.time))


def _collect(job: slurm.Job) -> Iterator[Entry]:
    yield Entry(job.submitted, What.SUBMITTED, f"as job {job.number}")
    if job.started:
        yield Entry(job.started, What.ALLOCATED, f"resources on {job.node}")
    yield from job.entries
    if job.ended:
        yield Entry(job.ended, What.ENDED, f"job {job.number}: {_describe(job)}")
    if node := _find_failed_epilog(job):
        yield Entry(node.since, What.DRAINED, f"{node.name}: {node.reason}")


def _find_failed_epilog(job: slurm.Job) -> slurm.NodeState | None:
    """The node of the job, if it was drained because the Epilog failed; the reason is that of `cli.fleet_step`."""
    reason = f"epilog of job {job.number}:"
    return next((node for node in slurm.read_nodes() if node.name == job.node and node.reason.startswith(reason)), None)


def _wait(name: str, guest_id: str, accept: Callable[[slurm.Job], bool], what: str, seconds: float | None) -> slurm.Job:
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        jobs = slurm.retry(lambda: slurm.read_jobs(name), CONTROLLER_SECONDS)
        job = next((job for job in jobs if job.guest_id == guest_id), None)
        if job is None:
            raise NotFound(f"the controller does not know guest {name} ({guest_id}) any more", "see `nohype fleet list`")
        if accept(job):
            return job
        if deadline is not None and time.monotonic() > deadline:
            raise GuestError(f"timed out after {seconds:g} s waiting for guest {name} {what} ({_describe(job)})", _see(name))
        time.sleep(_POLL_SECONDS)


def _describe(job: slurm.Job) -> str:
    return ": ".join(filter(None, (job.state.lower(), job.explanation)))


def _see(name: str) -> str:
    return f"see `nohype fleet logs {name}`"
