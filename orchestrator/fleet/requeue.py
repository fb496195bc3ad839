"""Starts the guests of a lost host elsewhere, once an operator states that the host is off.

Slurm has no fencing: a host that is cut off keeps its guests. Slurm therefore never does so by itself (JobRequeue=0).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from orchestrator.errors import CommandError, Conflict, OrchestratorError, RequestError
from orchestrator.fleet import slurm
from orchestrator.fleet.drain import select_nodes
from orchestrator.fleet.job import Job
from orchestrator.fleet.node import find_host
from orchestrator.fleet.quota import read_quota
from orchestrator.fleet.steps import summarize
from orchestrator.fleet.submit import NO_QUOTA, submit
from orchestrator.fleet.wish import HEADER, Wish
from orchestrator.model.request import parse_guest_request
from orchestrator.waiting import wait_until

END_SECONDS = 120.0
"""A node that does not respond is marked down after SlurmdTimeout, which is looked at several times in this time."""
_POLL_SECONDS = 2.0
_WORKERS = 8
_LOST = "NODE_FAIL"


@dataclass(frozen=True)
class Outcome:
    """What became of a guest of the lost host. ``job`` is that of its new start, 0 without one."""

    name: str
    job: int
    outcome: str
    failed: bool = False


def requeue(host: str, quotas: Path) -> tuple[Outcome, ...]:
    """Submits the guests again that were lost with the host and may be requeued. Each once, also if it is called again.

    The caller has made sure that the host is off. An error of one guest is its outcome.

    Args:
        quotas: file with the quotas of the tenants; read for guests of tenants only.

    Raises:
        NotFound: the fleet does not have the host.
        Conflict: a node of the host responds to the controller, so it is not off.
        OrchestratorError: the controller does not respond, or has not noticed the loss within END_SECONDS.
    """
    nodes = _select_host(host, slurm.read_nodes())
    if alive := [node.name for node in nodes if not node.is_silent]:
        hint = "wait until `nohype fleet hosts` shows that it does not respond; on a host that runs, use `nohype fleet cancel`"
        raise Conflict(f"host {host} is not off: slurmd responds to the controller on {', '.join(alive)}", hint)
    names = {node.name for node in nodes}

    def find_running(jobs: Sequence[Job]) -> list[str]:
        return [job.name for job in jobs if job.node in names and not job.has_ended]

    jobs = wait_until(slurm.read_jobs, lambda jobs: not find_running(jobs), timeout=END_SECONDS, interval=_POLL_SECONDS)
    if running := find_running(jobs):
        raise OrchestratorError(f"Slurm has not noticed the loss of {host}: {', '.join(running)}", "repeat the command")
    known = {job.guest_id: job for job in jobs}
    lost = [job for job in jobs if job.node in names and job.state == _LOST]
    with ThreadPoolExecutor(_WORKERS) as pool:
        return tuple(pool.map(lambda job: _requeue_guest(job, known.get(derive_id(job.guest_id)), quotas), lost))


def _select_host(name: str, nodes: Sequence[slurm.NodeState]) -> tuple[slurm.NodeState, ...]:
    """All nodes of a host, also if the name is that of one of its nodes: slurmd of one can be down while the host runs."""
    return select_nodes(find_host(select_nodes(name, nodes)[0].name), nodes)


def derive_id(guest_id: str) -> str:
    """The id of the guest's next start. It follows from the former, so that a repeated requeue finds the job of the first."""
    return str(uuid5(NAMESPACE_OID, f"nohype fleet requeue {guest_id}"))


def parse_script(text: str) -> Wish:
    """Reads what `wish.build_script` has written. Raises CommandError if the script is not of this kind."""
    try:
        header, request = (line for line in text.splitlines() if line.startswith((HEADER, "{")))
        fields: dict[str, Any] = json.loads(request)
        more: dict[str, Any] = json.loads(header.removeprefix(HEADER))
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in more.items()}
        return Wish(parse_guest_request(fields), fields, **values)
    except (ValueError, TypeError, RequestError):
        hint = "submit guests with `nohype fleet submit`, of the same version"
        raise CommandError("the job script is not that of a guest of the fleet", hint) from None


def _requeue_guest(lost: Job, again: Job | None, quotas: Path) -> Outcome:
    if again and (again.has_ended or not again.is_held):  # `submit` releases a job that an interrupted call has left held
        ended = f", which has ended ({again.state.lower()})" if again.has_ended else ""
        return Outcome(lost.name, again.number, f"already requeued as job {again.number}{ended}")
    try:
        wish = parse_script(slurm.read_script(lost.number))
        if not wish.requeue:
            return Outcome(lost.name, 0, "not requeued: submitted without --requeue")
        quota = read_quota(quotas, wish.tenant) if wish.tenant else NO_QUOTA
        job = submit(replace(wish, fields={**wish.fields, "id": derive_id(lost.guest_id)}), quota)
    except OrchestratorError as error:
        return Outcome(lost.name, 0, f"not requeued: {summarize(error)}", failed=True)
    return Outcome(lost.name, job.number, f"requeued as job {job.number}")
