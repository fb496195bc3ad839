"""The guests' serial consoles: what they print is in a file that goes by the guest's name, and is read as that guest's only."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.console import GET_READY, READY, tell, wait_for
from orchestrator.errors import GuestError, HostError, NotFound
from orchestrator.hypervisor import Hypervisor
from orchestrator.ledger import Claim, Ledger
from orchestrator.lifecycle.locks import Locks
from orchestrator.state import GuestState

_KEPT = 7 * 24 * 3600.0
"""Seconds for which the log of a deleted guest stays: it may say why it failed, or be what it was run for."""


def console_log(folder: Path, name: str) -> Path:
    """The file that gets all that a guest prints."""
    return folder / f"{name}.log"


class Consoles:
    """The consoles of all guests.

    Args:
        folder: where their logs are.
    """

    def __init__(self, hypervisor: Hypervisor, ledger: Ledger, folder: Path) -> None:
        self._hypervisor, self._ledger, self._folder = hypervisor, ledger, folder
        self._asking = Locks()

    def wait_ready(self, claim: Claim, timeout: float) -> str:
        """Waits for the guest's own word that it is ready; returns that line. See ``console.wait_for``.

        Raises:
            NotFound: it is gone.
            GuestError: it has not said so within ``timeout`` seconds, or has ended.
        """
        log, alive = console_log(self._folder, claim.plan.name), lambda: claim.plan.uuid in self._hypervisor.uuids()
        said = self._read(claim, lambda: wait_for(log, READY, GET_READY, timeout=timeout, alive=alive))
        return said.splitlines()[-1]

    def tell(self, name: str, find: Callable[[], Claim], line: str, timeout: float) -> str:
        """Types a line on a guest's console and returns its answer. See ``console.tell``.

        Args:
            find: gives the claim of the guest ``name`` as it is now, if the caller may type on it; raises if not.

        Raises:
            NotFound: no such guest runs.
            GuestError: it does not answer.
        """
        find()
        # One question at a time: answers do not say which line they answer.
        with self._asking(name):
            claim = find()  # again: it may be another's by now
            if claim.state == GuestState.STOPPED:
                raise NotFound(f"guest {name} does not run: it is stopped", f"start it: nohype guest start {name}")
            try:
                console = self._hypervisor.guest(claim.plan.uuid).console
            except NotFound:
                raise _gone(claim) from None
            if console is None:
                raise GuestError(f"guest {name} has no serial console")
            return self._read(claim, lambda: tell(console, console_log(self._folder, name), line, timeout=timeout))

    def tidy(self) -> None:
        """Removes what guests have printed that were deleted long ago.

        Raises:
            HostError: a file can't be removed.
        """
        oldest, claimed = time.time() - _KEPT, {claim.plan.name for claim in self._ledger.read().claims}
        for file in self._folder.glob("*.log*"):  # NAME.log, and NAME.log.N that virtlogd has put aside
            try:
                if file.name.partition(".log")[0] not in claimed and file.stat().st_mtime < oldest:
                    file.unlink()
            except FileNotFoundError:
                continue  # a guest of this name is just being started
            except OSError as error:
                raise HostError(f"cannot remove {file}: {error.strerror}", "see `mount` and `lsattr`") from None

    def _read(self, claim: Claim, read: Callable[[], str]) -> str:
        """What ``read`` gives, or says in an error, if that was still the console of this guest."""
        try:
            return read()
        finally:
            now = self._ledger.find(claim.plan.name)
            if not now or now.plan.uuid != claim.plan.uuid:
                raise _gone(claim)


def _gone(claim: Claim) -> NotFound:
    return NotFound(f"the guest {claim.plan.name} that was asked is gone", "`nohype guest list` shows if there is a new one")
