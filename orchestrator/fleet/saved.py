"""Whether the controller can forget a job: it saves its state at intervals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from orchestrator.fleet.job import Job

_CERTAIN = timedelta(seconds=60)
"""More than `slurm.SAVE_SECONDS`: the clocks of the caller and of the controller differ."""


def is_saved(job: Job) -> bool:
    """False for a job that was submitted just now, such as by a command that was interrupted, or runs at the same time."""
    return not job.submitted or datetime.now(UTC) - datetime.fromisoformat(job.submitted) > _CERTAIN
