"""Stores the journal of a guest with its job."""

from __future__ import annotations

import time
from collections.abc import Iterable

from orchestrator.errors import OrchestratorError
from orchestrator.fleet import slurm
from orchestrator.fleet.journal import Entry
from orchestrator.fleet.slurm import SAVE_SECONDS


class Report:
    """The entries of a job. The guest does not depend on them: a controller that does not respond is ignored."""

    def __init__(self, job: int, guest_id: str, entries: Iterable[Entry]) -> None:
        self._job, self._guest_id, self._entries = job, guest_id, list(entries)
        self._due: float | None = None

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)
        now = time.monotonic()
        self._due = now + SAVE_SECONDS if self._write() else now

    def repeat(self) -> None:
        """To be called from time to time: writes again what the controller did not store, or may have forgotten."""
        if self._due is not None and time.monotonic() >= self._due and self._write():
            self._due = None

    def _write(self) -> bool:
        try:
            slurm.write_entries(self._job, self._guest_id, self._entries)
        except OrchestratorError:
            return False
        return True
