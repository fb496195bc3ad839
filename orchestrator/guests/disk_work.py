"""The progress of work on disks, and the threads that wipe the disks of deleted guests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol
from uuid import UUID

from orchestrator import serving_cpu
from orchestrator.errors import GuestError, LedgerError, OrchestratorError
from orchestrator.ledger import Claim
from orchestrator.model.disk import DiskProgress

_log = logging.getLogger(__name__)

PARALLEL_WIPES = 4
"""Reading a disk back is work for the housekeeping cores."""
_CLOSE_SECONDS = 2.0


class CountWipe(Protocol):
    """Gets the bytes of a guest's disks, and whether all of them are verified clean."""

    def __call__(self, size: int, *, is_clean: bool) -> object: ...


def ignore_wipe(size: int, *, is_clean: bool) -> None:
    pass


class DiskWork:
    """What is done with the disks of each guest now. After ``close`` all work stops with its next report."""

    def __init__(self) -> None:
        self._progress: dict[UUID, DiskProgress] = {}
        self._deleted: set[UUID] = set()
        self._closed = threading.Event()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def find(self, uuid: UUID) -> DiskProgress | None:
        return self._progress.get(uuid)

    def reporter(self, uuid: UUID, *, prepares: bool = False) -> Callable[[DiskProgress], None]:
        """A function that notes progress. It raises GuestError once the manager exits.

        ``prepares``: the work is for a guest that is being created, and also stops if the guest is to be deleted.
        """

        def report(progress: DiskProgress) -> None:
            self.check()
            if prepares and uuid in self._deleted:
                raise GuestError("the guest was deleted while its disks were being prepared", "create it again if it is needed")
            self._progress[uuid] = progress

        return report

    def check(self) -> None:
        if self.closed:
            raise GuestError("the manager exits: the work on the disk was stopped", "repeat the request when the manager runs")

    def stop_preparing(self, uuid: UUID) -> None:
        """No-op if the disks of the guest are not being prepared. Needs no lock."""
        self._deleted.add(uuid)

    def forget(self, uuid: UUID) -> None:
        self._progress.pop(uuid, None)
        self._deleted.discard(uuid)

    def close(self) -> None:
        self._closed.set()


class Wiper:
    """One thread per guest in the state WIPING. It holds no lock while it wipes.

    Args:
        wipe: wipes the disks of a guest. Raises OrchestratorError if one is not verified clean.
        finish: called with the same claim, and the error's sentence if there was one; takes the guest's lock.
    """

    def __init__(
        self, work: DiskWork, wipe: Callable[[Claim], object], finish: Callable[[Claim, tuple[str, ...]], object]
    ) -> None:
        self._work, self._wipe, self._finish = work, wipe, finish
        self._slots = threading.BoundedSemaphore(PARALLEL_WIPES)
        self._lock = threading.Lock()
        self._threads: dict[UUID, threading.Thread] = {}

    def begin(self, claim: Claim) -> bool:
        """False if a thread is wiping already, or the manager exits: the next manager begins again."""
        uuid = claim.plan.uuid
        with self._lock:
            if uuid in self._threads or self._work.closed:
                return False
            thread = threading.Thread(target=self._run, args=(claim,), name=f"wipe-{claim.plan.name}", daemon=True)
            self._threads[uuid] = thread
        thread.start()
        return True

    def close(self) -> None:
        """Waits a moment for the threads; ``DiskWork.close`` has told them to stop."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in list(self._threads.values()):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, claim: Claim) -> None:
        serving_cpu.leave()
        try:
            with self._slots:
                findings = self._try(claim)
            if not self._work.closed:
                self._finish(claim, findings)
        except OrchestratorError as error:
            # The reconciliation begins again.
            _log.error("%s: the end of wiping was not recorded: %s", claim.plan.name, error)
        finally:
            self._work.forget(claim.plan.uuid)
            with self._lock:
                self._threads.pop(claim.plan.uuid, None)

    def _try(self, claim: Claim) -> tuple[str, ...]:
        try:
            self._wipe(claim)
        except LedgerError:
            raise
        except OrchestratorError as error:
            return (error.message,)
        except Exception as error:
            _log.exception("%s: internal error while its disks were wiped", claim.plan.name)
            return (f"internal error while the disks were wiped: {type(error).__name__}: {error}",)
        return ()
