"""The guests' serial consoles: what is waited for on one is waited for on that of this guest, in the life that it is in now."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from orchestrator.errors import GuestError, NotFound
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.console_watch import ConsoleWatch, guest_replaced_error
from orchestrator.hypervisor.connection import Hypervisor, SerialConsole
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.state import GuestState

_TYPED_ON = (GuestState.RUNNING, GuestState.STOPPING, GuestState.QUARANTINED)
"""States in which a guest may run that has been let run."""


class Consoles:
    """The consoles of all guests."""

    def __init__(self, hypervisor: Hypervisor, ledger: Ledger, logs: ConsoleLogs) -> None:
        self._hypervisor, self._ledger, self._logs = hypervisor, ledger, logs
        self._watch = ConsoleWatch(ledger, hypervisor.uuids)

    def begin_ready(self, claim: Claim, timeout: float) -> Future[str]:
        """Waits for the guest's own word that it is ready, since its last start.

        Returns:
            That line; may be cancelled. Its errors: NotFound if the guest is deleted meanwhile; GuestError if it has not said so
            within ``timeout`` seconds, or ends before.

        Raises:
            NotFound: it is gone, or does not run.
            GuestError: it is being started or stopped.
        """
        console = self._find(claim, (GuestState.RUNNING,))
        if console.log is None:
            raise GuestError(f"the console of guest {claim.plan.name} has no log")
        return self._watch.wait_ready(claim, console.log, timeout, backups=self._has_own_backups(claim, console.log))

    def begin_tell(self, claim: Claim, line: str, timeout: float) -> Future[str]:
        """Types a line on the guest's console once it is ready, and has answered earlier ones.

        Returns:
            What it has printed from then on, up to the end of its answer, or the last of that; may be cancelled. Its errors: as
            of ``begin_ready``.

        Raises:
            NotFound: it is gone, or does not run.
            GuestError: it is being started, or has no console.
        """
        console = self._find(claim, _TYPED_ON)
        if console.pty is None or console.log is None:
            raise GuestError(f"guest {claim.plan.name} has no serial console")
        own = self._has_own_backups(claim, console.log)
        return self._watch.ask(claim, console.log, console.pty, line, timeout, backups=own)

    def tidy(self) -> None:
        """Removes what deleted guests have printed. Raises as ``ConsoleLogs.tidy``."""
        self._logs.tidy(self._is_in_use)

    def close(self) -> None:
        """Ends all waits."""
        self._watch.close()

    def _find(self, claim: Claim, states: tuple[GuestState, ...]) -> SerialConsole:
        """The console of a guest in one of these states, as it was started last."""
        name = claim.plan.name
        if claim.state == GuestState.STOPPED:
            raise NotFound(f"guest {name} does not run: it is stopped", f"start it: nohype guest start {name}")
        if claim.state not in states:
            raise GuestError(f"guest {name} is not running: it is {claim.state}", "wait until it runs, then ask again")
        try:
            console = self._hypervisor.console(claim.plan.uuid)
        except NotFound:
            console = None
        now = self._ledger.find(name)
        if not now or now.plan.uuid != claim.plan.uuid:
            raise guest_replaced_error(name)
        if console is None:
            raise NotFound(f"guest {name} does not run: it has ended", "`nohype events` says why")
        return console

    def _has_own_backups(self, claim: Claim, log: Path) -> bool:
        """Earlier versions named logs by the guest's name alone: those that were put aside may be another guest's."""
        return log == self._logs.find(claim.plan, claim.owner)

    def _is_in_use(self, log: Path, name: str) -> bool:
        claim = self._ledger.find(name)
        try:
            return claim is not None and self._hypervisor.console(claim.plan.uuid).log == log
        except NotFound:
            return False
