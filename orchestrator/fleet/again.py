"""Which guests of a batch are submitted again, because they have ended, and which stay as they are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from orchestrator.errors import Conflict, NotFound
from orchestrator.fleet import slurm
from orchestrator.fleet.job import Job
from orchestrator.fleet.outcome import Outcome
from orchestrator.fleet.submit import ORPHAN_SECONDS
from orchestrator.fleet.wish import Wish

_FORMER_START = re.compile(r"\balready started on ([a-z0-9-]+);")
"""In the note of a guest that the controller refused, see `configuration.build_start`."""


def find_unchanged(wishes: Iterable[Wish], jobs: Sequence[Job]) -> dict[str, Outcome]:
    """Returns what is known of the guests that wait, run or are being ended, by the ids of the wishes.

    The guests of all other wishes have ended, and do not run on any host. A guest belongs to a wish if name and tenant are the
    same; its id can be another one.

    Args:
        jobs: all jobs that the controller knows, oldest first.

    Raises:
        NotFound: the fleet does not know one of the guests: the controller can have forgotten that it runs.
        Conflict: the id of a guest that has ended is used again, or a guest may still run on a host that does not respond.
    """
    left: dict[str, Outcome] = {}
    ended: list[Job] = []
    for wish in wishes:
        own = [job for job in jobs if (job.name, job.tenant) == (wish.request.name, wish.tenant) and job.guest_id]
        if not own:
            hint = "submit it without --only-ended; after a failure, repeat the command that submitted it, with the same --id"
            raise NotFound(f"the fleet does not know guest {wish.request.name}", hint)
        if job := next((job for job in own if not job.has_ended), None):
            error = "it is being ended: repeat the command" if job.is_ending else ""
            left[wish.guest_id] = Outcome(job.name, job.guest_id, job.number, job.state, error)
        elif wish.guest_id in (job.guest_id for job in own):
            hint = "choose another --id, and omit the id in the file"
            raise Conflict(f"guest {wish.request.name} has ended, and its id {wish.guest_id} cannot be used again", hint)
        else:
            ended += own
    _wait_for_former_starts(ended)
    return left


def _wait_for_former_starts(ended: Sequence[Job]) -> None:
    """A guest that has ended for the controller runs on if its host is cut off, or if the controller forgot where it started it.

    In the second case, the guest was refused when it was to be started again, and the host ends the former start.
    """
    starts = {job: match[1] for job in ended if (match := _FORMER_START.search(job.note))}
    places = [(job, node) for job in ended for node in (job.node, starts.get(job, "")) if node]
    silent = {node.name for node in slurm.read_nodes() if not node.responds} if places else set()
    for job, node in places:
        if node in silent:
            hint = "repeat the command when the host responds; if it is off, use `nohype fleet submit` with a new id"
            raise Conflict(f"guest {job.name} may still run on {node}, which does not respond", hint)
    now = datetime.now(UTC)
    ages = [(now - datetime.fromisoformat(job.ended)).total_seconds() for job in starts if job.ended]
    time.sleep(max([0.0, *(ORPHAN_SECONDS - max(0.0, age) for age in ages)]))
