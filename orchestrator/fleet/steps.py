"""The three steps of a job on its host: the Prolog admits it, the job script has its guest started, the Epilog ends the guest.

The Epilog is the authority: Slurm gives cores and VFs of a job to another one only after the Epilog has succeeded, also if the
job script was killed. It does not wait until the guest's disks are wiped: see `creation`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.client import Client
from orchestrator.client.host_shapes import Host
from orchestrator.client.shapes import Guest
from orchestrator.client.transport import Unreachable as ManagerUnreachable
from orchestrator.errors import Conflict, HostError, NotFound, OrchestratorError, ReadyBySsh, TooMany
from orchestrator.fleet import slurm
from orchestrator.fleet.configuration import GRES_FILE, NODES_FILE, find_differences
from orchestrator.fleet.creation import create_guest
from orchestrator.fleet.journal import Entry, What, make_entry
from orchestrator.fleet.manager import RETRY_SECONDS, WIPING, find_guest, retry_manager
from orchestrator.fleet.node import NETWORK, FleetNode, build_nodes
from orchestrator.fleet.place import build_request, check_place
from orchestrator.fleet.processes import find_job_scripts
from orchestrator.fleet.records import Record, read_record, read_records, remove_record, write_record
from orchestrator.fleet.report import Report
from orchestrator.fleet.slurm import CONTROLLER_SECONDS
from orchestrator.values import CpuSet, Size

PROLOG_SECONDS, EPILOG_SECONDS = 20.0, 600.0
"""Time for a manager that restarts. A host without a manager must not get another job, and keeps the place of this one."""
CHECK_SECONDS = 20.0
"""slurmd waits for the check when it starts. What is left is ended by the next check."""
SETTLE_SECONDS = 10.0
"""A request that a killed job script has sent can still wait in the manager. After its first response the manager has read it."""
POLL_SECONDS = 5.0
READY_SECONDS = 3600.0
"""The manager is asked this long whether the guest has reported ready."""
_ENDED = ("stopped",)


@dataclass(frozen=True)
class Site:
    """Where a step runs.

    Attributes:
        host: the name under which the configuration was written.
        page_size: of the huge pages that the fleet uses.
        configuration: folder of Slurm's configuration.
        records: folder of `records`.
    """

    client: Client
    host: str
    page_size: Size
    configuration: Path
    records: Path

    def read_nodes(self) -> tuple[Host, tuple[FleetNode, ...]]:
        found = self.client.host()
        return found, build_nodes(found, self.host, self.page_size)


def read_allocation(node_name: str, job: int) -> slurm.Allocation | None:
    """What the controller gave the job on this node; None if it forgot that, and may have started the job on another node."""
    with suppress(NotFound):
        allocation = slurm.retry(lambda: slurm.read_allocation(job), CONTROLLER_SECONDS)
        return allocation if allocation.node == node_name else None
    return None


def run_prolog(site: Site, node_name: str, job: int) -> Record | None:
    """Admits a job: the configuration is that of the host, the place is free in the manager, and pages and VFs exist.

    A guest that the controller has forgotten is ended if it has the place.

    Returns None, and records nothing, for a job that the controller forgot to have started here: it would end the job if this
    failed, also where it runs now. Its job script starts no guest.

    Raises OrchestratorError if the job is not admitted. Slurm then takes the node out of use, and ends the job.
    """
    allocation = read_allocation(node_name, job)
    if allocation is None:
        return None
    host, nodes = retry_manager(site.read_nodes, PROLOG_SECONDS)
    check_configuration(site, nodes)
    node = next((node for node in nodes if node.name == node_name), None)
    if node is None:
        raise HostError(f"node {node_name} is not a node of host {site.host}", "check --host in nohype-prolog")
    record = Record(node_name, job, allocation.name, allocation.guest_id)
    try:
        check_record(site, record)
        check_place(host, retry_manager(site.client.guests, PROLOG_SECONDS), node, allocation)
    except Conflict:
        if not end_guests_without_job(site):
            raise
        check_record(site, record)
        host = retry_manager(site.client.host, PROLOG_SECONDS)
        check_place(host, retry_manager(site.client.guests, PROLOG_SECONDS), node, allocation)
    write_record(site.records, record)
    return record


def check_record(site: Site, record: Record) -> None:
    """Raises Conflict if this host has another guest under the number of the job."""
    known = read_record(site.records, record.node, record.job)
    if known and known != record:
        hint = "run `nohype-epilog` with its SLURM_JOB_ID, or end the guest by hand"
        raise Conflict(f"job {record.job} still has guest {known.name} ({known.guest_id}) on this host", hint)


def check_configuration(site: Site, nodes: tuple[FleetNode, ...]) -> None:
    """Raises HostError with the first difference between Slurm's files and the host."""
    try:
        files = [(site.configuration / name).read_text(errors="replace") for name in (NODES_FILE, GRES_FILE)]
    except OSError as error:
        raise HostError(f"cannot read {error.filename}", errno=error.errno or 0) from None
    networks = [network["name"] for network in site.client.networks()] if NETWORK in files[0] else []
    if found := find_differences(nodes, site.host, files[0], files[1], networks):
        more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
        raise HostError(
            f"Slurm's configuration differs from host {site.host}: {found[0]}{more}", "run `nohype fleet config` again"
        )


def run_job(site: Site, node_name: str, job: int, fields: Mapping[str, Any]) -> None:
    """Has the guest started, reports with the job that it runs and is ready, and returns when it has ended.

    Raises OrchestratorError if it cannot be started, or is quarantined.
    """
    _, nodes = retry_manager(site.read_nodes, EPILOG_SECONDS)
    allocation = read_allocation(node_name, job)
    node = next((node for node in nodes if node.name == node_name), None)
    name, guest_id = str(fields["name"]), str(fields["id"])
    if node is None or allocation is None or (name, guest_id) != (allocation.name, allocation.guest_id):
        raise HostError(f"the controller did not start guest {name} ({guest_id}) as job {job} on {node_name}, or forgot it")
    request = build_request(fields, node, allocation)
    report = Report(job, guest_id, allocation.entries)
    guest = create_guest(site.client, request, lambda why: report.add(make_entry(What.WAITING, why)))
    report.add(make_entry(What.STARTED, f"guest {name} runs on CPUs {CpuSet.of(guest['cpus'])} of {site.host}"))
    asks_until = time.monotonic() + READY_SECONDS
    while (found := retry_manager(lambda: find_guest(site.client, name, guest_id), EPILOG_SECONDS)) is not None:
        if found["state"] == "quarantined":
            raise HostError(f"guest {name} is quarantined", f"run `nohype quarantine list` on {site.host}")
        if found["state"] in (*_ENDED, WIPING):
            break
        report.repeat()
        if time.monotonic() > asks_until:
            time.sleep(POLL_SECONDS)
        elif entry := _wait_ready(site.client, name):
            report.add(entry)
            asks_until = 0.0
    report.add(make_entry(What.ENDED, _read_end(site.client, name) if found else "deleted"))


def _wait_ready(client: Client, name: str) -> Entry | None:
    """None after `POLL_SECONDS` if the guest has not reported ready."""
    until = time.monotonic() + POLL_SECONDS
    try:
        return make_entry(What.READY, client.wait_ready(name, POLL_SECONDS))
    except ReadyBySsh as error:
        return make_entry(What.READY_BY_SSH, error.message)
    except OrchestratorError:  # the guest may have ended: the caller reads its state
        time.sleep(max(0.0, until - time.monotonic()))
        return None


def _read_end(client: Client, name: str) -> str:
    """What the manager reported of the guest's end."""
    with suppress(OrchestratorError):
        for event in reversed(client.events(limit=100)):
            if event["subject"] == name:
                return f"{event['kind']}: {event['detail']}"
    return "stopped"


def stop_guest(client: Client, name: str, guest_id: str, seconds: float) -> None:
    """Shuts the guest down if it runs; another guest of the same name stays as it is."""
    guest = find_guest(client, name, guest_id)
    if guest and guest["state"] == "running":
        client.stop(name, seconds, version=guest["version"])


def run_epilog(site: Site, node_name: str, job: int) -> None:
    """Ends the guest of the job, and returns when the manager has released its place. Can be repeated.

    Raises OrchestratorError if the guest is not verified to be gone: Slurm then takes the node out of use.
    """
    if record := read_record(site.records, node_name, job):
        end_guest(site, record, EPILOG_SECONDS)


def end_guest(site: Site, record: Record, seconds: float) -> None:
    """As `run_epilog`, for the guest of a record, for at most this long."""
    deadline = time.monotonic() + seconds
    settled: float | None = None
    while settled is None or time.monotonic() < settled:
        guest = retry_manager(lambda: find_guest(site.client, record.name, record.guest_id), deadline - time.monotonic())
        if guest is not None and guest["state"] != WIPING:
            if _delete(site.client, guest) and guest["state"] in ("running", *_ENDED):
                # Its creation is over, and the job script, which sends one request at a time, no longer exists.
                settled = time.monotonic()
        elif settled is None:
            settled = time.monotonic() + SETTLE_SECONDS
        if time.monotonic() > deadline:
            raise HostError(f"guest {record.name} of job {record.job} is still {guest['state'] if guest else 'absent'}")
        time.sleep(RETRY_SECONDS)
    left = retry_manager(lambda: find_guest(site.client, record.name, record.guest_id), deadline - time.monotonic())
    if left and left["state"] != WIPING:
        hint = f"run `nohype quarantine list` on {site.host}"
        raise HostError(f"guest {record.name} of job {record.job} is {left['state']}", hint)
    remove_record(site.records, record)


def _delete(client: Client, guest: Guest) -> bool:
    """False if the guest has changed in the meantime, or the manager does not respond: the caller reads it again.

    Raises HostError for a guest in quarantine.
    """
    if guest["state"] == "quarantined":
        raise HostError(f"guest {guest['name']} is quarantined", "run `nohype quarantine list`, and clear it there")
    try:
        client.delete(guest["name"], version=guest["version"])
    except (NotFound, Conflict, ManagerUnreachable, TooMany):
        return False
    return True


def end_guests_without_job(site: Site) -> tuple[Record, ...]:
    """Ends the guests of this host that the controller does not know any more; returns their records.

    slurmd ends a forgotten job that still runs. After a reboot, or if all of Slurm was killed, only the records are left.
    Raises OrchestratorError if the controller or the manager does not respond; then the guests keep running.
    """
    records = find_abandoned_records(site.records)
    for record in records:
        end_guest(site, record, CHECK_SECONDS)
    return records


def find_records_without_job(folder: Path) -> tuple[Record, ...]:
    """Records of this host without a job that has not ended, under the guest's id and on the node of the record.

    The controller is asked for the single jobs. Raises OrchestratorError if it does not respond.
    """
    records = read_records(folder)  # before the jobs: a record is written after its job was started
    jobs = {record: slurm.read_job(record.job) for record in records}
    return tuple(
        record for record, job in jobs.items()
        if not job or job.has_ended or (job.guest_id, job.node) != (record.guest_id, record.node)
    )  # fmt: skip


def find_abandoned_records(folder: Path) -> tuple[Record, ...]:
    """As `find_records_without_job`, without those whose job script still runs here: slurmd ends it, and runs the Epilog.

    The Epilog needs the record. A script that is started later learns from the controller that the job is forgotten.
    """
    records = find_records_without_job(folder)
    jobs = set(find_job_scripts()) if records else set()
    return tuple(record for record in records if (record.node, record.job) not in jobs)


def summarize(error: OrchestratorError) -> str:
    """One line for Slurm's log and the note of the job."""
    return "; ".join(" ".join(text.split()) for text in (error.message, error.hint) if text)


def drain(node_name: str, reason: str) -> None:
    """Takes the node out of use. Slurm does so itself, but with a reason that says only which step has failed."""
    with suppress(OrchestratorError):
        slurm.update_node(node_name, "State=DRAIN", f"Reason={reason}"[:200])


def report_error(node_name: str, job: int, what: What, error: OrchestratorError) -> None:
    """Stores the reason with the job, where `nohype fleet show` reads it; repeats this for a controller that restarts."""
    with suppress(OrchestratorError):
        if allocation := read_allocation(node_name, job):
            entries = [*allocation.entries, make_entry(what, summarize(error))]
            slurm.retry(lambda: slurm.write_entries(job, allocation.guest_id, entries), CONTROLLER_SECONDS)
