"""Slurm's health check of a host, run when slurmd starts and every minute, and guests of the host that have no job.

The result is stored as comment of the node, where `nohype fleet hosts` and `resume` read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.client import Client
from orchestrator.client.transport import Unreachable as ManagerUnreachable
from orchestrator.errors import Conflict, OrchestratorError
from orchestrator.fleet import slurm
from orchestrator.fleet.journal import MAX_COMMENT
from orchestrator.fleet.manager import WIPING, retry_manager
from orchestrator.fleet.records import Record, read_records, remove_record
from orchestrator.fleet.steps import (
    CHECK_SECONDS,
    PROLOG_SECONDS,
    Site,
    check_configuration,
    end_guest,
    find_abandoned_records,
    find_records_without_job,
)  # fmt: skip


@dataclass(frozen=True)
class Orphan:
    """A guest of this host whose job the controller does not know, or has ended.

    Attributes:
        guest_id: empty if it has none.
        job: number of the job for which the Prolog has admitted it; None if it was not started by the fleet.
        node: the node of this job; empty without one.
    """

    name: str
    state: str
    guest_id: str
    job: int | None
    node: str


@dataclass(frozen=True)
class Checked:
    """What a check has done and found.

    Attributes:
        ended: records of the guests that were ended.
        findings: what prevents guests on this host, one sentence each.
    """

    ended: tuple[Record, ...]
    findings: tuple[str, ...]


def check_host(site: Site, node_name: str) -> Checked:
    """Ends guests that the controller has forgotten, and reports what prevents guests on this host.

    Ended are guests with a record, whose job the controller does not know. Reported are a manager that does not respond, another
    configuration, guests that could not be ended, and guests without a record. Stores the findings as comment of the node.

    Raises OrchestratorError if the controller does not respond; all guests keep running.
    """
    ended: list[Record] = []
    findings = tuple(_check(site, ended))
    text = slurm.CHECK_FAILED + "; ".join(findings) if findings else slurm.CHECK_PASSED
    slurm.write_comment(node_name, text.encode()[:MAX_COMMENT].decode(errors="ignore"))
    return Checked(tuple(ended), findings)


def find_orphans(client: Client, folder: Path) -> tuple[Orphan, ...]:
    """Guests of this host that belong to no job that runs or is being ended. Raises OrchestratorError.

    Guests that were created at the host are among them: they have resources that Slurm gives to jobs.

    Args:
        folder: of the records of this host.
    """
    return tuple(_find_orphans(client, folder, find_records_without_job(folder)))


def _find_orphans(client: Client, folder: Path, forgotten: Iterable[Record]) -> Iterator[Orphan]:
    """Guests without a record, and those of the forgotten records, except those of which only the disks are left."""
    # Each guest of a job has a record from before its start until after its end.
    before = read_records(folder)
    guests = retry_manager(client.guests, PROLOG_SECONDS)
    known = {(record.name, record.guest_id): record for record in (*before, *read_records(folder))}
    without_job = set(forgotten)
    for guest in guests:
        if guest["state"] == WIPING:
            continue
        guest_id = guest["id"] or ""
        record = known.get((guest["name"], guest_id))
        if record is None:
            yield Orphan(guest["name"], guest["state"], guest_id, None, "")
        elif record in without_job:
            yield Orphan(guest["name"], guest["state"], guest_id, record.job, record.node)


def end_orphan(client: Client, folder: Path, name: str) -> Orphan:
    """Deletes a guest without a job, and its record.

    Raises:
        NotFound: the host does not have the guest.
        Conflict: the guest has a job.
        OrchestratorError: the manager cannot delete the guest, or does not respond.
    """
    guest = client.guest(name)
    orphan = next(
        (orphan for orphan in find_orphans(client, folder) if (orphan.name, orphan.guest_id) == (name, guest["id"] or "")), None
    )
    if orphan is None:
        raise Conflict(f"guest {name} has a job", f"run `nohype fleet cancel {name}`")
    client.delete(name, version=guest["version"])
    if orphan.job is not None:
        remove_record(folder, Record(orphan.node, orphan.job, name, orphan.guest_id))
    return orphan


def _check(site: Site, ended: list[Record]) -> Iterator[str]:
    """Yields the findings; adds the records of the guests that it has ended to ``ended``."""
    try:
        check_configuration(site, retry_manager(site.read_nodes, PROLOG_SECONDS)[1])
    except ManagerUnreachable as error:
        yield error.message
        return
    except OrchestratorError as error:
        yield error.message
    try:
        for record in find_abandoned_records(site.records):
            try:
                end_guest(site, record, CHECK_SECONDS)
                ended.append(record)
            except OrchestratorError as error:
                yield f"a guest without a job was not ended: {error.message}"
        for orphan in _find_orphans(site.client, site.records, ()):
            yield f"guest {orphan.name} ({orphan.state}) has no job: see `nohype fleet orphans` there"
    except slurm.Unreachable:
        raise
    except OrchestratorError as error:  # such as a damaged record
        yield error.message
