"""Jobs whose end the controller has forgotten: it was killed within 5 s of the end, and shows a guest that no longer runs.

Slurm may notice that the script of a job is missing when the node registers again, but did not within minutes (measured). Until
then the place of the guest is not given to another.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from orchestrator.errors import CommandError
from orchestrator.fleet import slurm
from orchestrator.fleet.journal import What, make_entry
from orchestrator.fleet.records import forget_ended, read_ended, renew_ended

KEEP_SECONDS = 60.0
"""After which the controller has saved the end of a job."""


def end_forgotten_jobs(folder: Path, node_name: str) -> tuple[int, ...]:
    """Ends the jobs of a node that run for the controller, but whose Epilog has ended their guest. Returns their numbers.

    Args:
        folder: of the records of this host.

    Raises OrchestratorError if the controller does not respond.
    """
    found = []
    for record, seconds in read_ended(folder, node_name):
        job = slurm.read_job(record.job)
        if job and job.state == "RUNNING" and (job.guest_id, job.node) == (record.guest_id, record.node):
            note = make_entry(What.FAILED, f"the guest has ended on {job.node}; the controller was killed and forgot that")
            with suppress(CommandError):  # it has learned of the end
                slurm.write_entries(job.number, job.guest_id, [*job.entries, note])
            slurm.cancel_jobs([job.number])
            renew_ended(folder, record)
            found.append(job.number)
        elif seconds > KEEP_SECONDS:
            forget_ended(folder, record)
    return tuple(found)
