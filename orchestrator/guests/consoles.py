"""The guests' serial consoles. A wait ends with the run of the guest in which it was started."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import GuestError, ImageError, NotFound
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.console_watch import ConsoleWatch, guest_replaced_error
from orchestrator.hypervisor.connection import Hypervisor, SerialConsole
from orchestrator.images.description import CONSOLE_PROTOCOL
from orchestrator.images.store import find_image
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.state import GuestState

_TYPED_ON = (GuestState.RUNNING, GuestState.STOPPING, GuestState.QUARANTINED)
"""States in which a guest that was resumed can run."""


class Consoles:
    def __init__(self, hypervisor: Hypervisor, ledger: Ledger, logs: ConsoleLogs, images: Path) -> None:
        self._hypervisor, self._ledger, self._logs, self._images = hypervisor, ledger, logs, images
        self._watch = ConsoleWatch(ledger, lambda: hypervisor.running_uuids())

    def begin_ready(self, claim: Claim, timeout: float) -> Future[str]:
        """The future returns the line with which the guest reports ready after its last start. It raises NotFound if the guest is
        deleted, GuestError after ``timeout`` seconds or if the guest ends. It can be cancelled.

        Raises NotFound if the guest does not run, GuestError if it is being started or stopped, or without a console protocol.
        """
        console = self._find(claim, (GuestState.RUNNING,))
        self._check_protocol(claim, "omit --wait, or use an image that speaks it, such as minimal")
        if console.log is None:
            raise GuestError(f"the console of guest {claim.plan.name} has no log")
        return self._watch.wait_ready(claim, console.log, timeout, backups=self._has_own_backups(claim, console.log))

    def begin_command(self, claim: Claim, line: str, timeout: float) -> Future[str]:
        """The future returns the output from the command to the end of its reply, or the last part of it. It is typed after
        the guest is ready and has replied to earlier commands. Errors as of ``begin_ready``.
        """
        console = self._find(claim, _TYPED_ON)
        self._check_protocol(claim, "use an image that speaks it, such as minimal")
        if console.pty is None or console.log is None:
            raise GuestError(f"guest {claim.plan.name} has no serial console")
        own = self._has_own_backups(claim, console.log)
        return self._watch.ask(claim, console.log, console.pty, line, timeout, backups=own)

    def remove_old_logs(self) -> None:
        self._logs.remove_old(self._is_in_use)

    def close(self) -> None:
        self._watch.close()

    def _find(self, claim: Claim, states: tuple[GuestState, ...]) -> SerialConsole:
        name = claim.plan.name
        if claim.state == GuestState.STOPPED:
            raise NotFound(f"guest {name} is stopped", f"start it: nohype guest start {name}")
        if claim.state not in states:
            raise GuestError(f"guest {name} is {claim.state}, not running", "wait until it runs, then retry")
        try:
            console = self._hypervisor.console(claim.plan.uuid)
        except NotFound:
            console = None
        now = self._ledger.find(name)
        if not now or now.plan.uuid != claim.plan.uuid:
            raise guest_replaced_error(name)
        if console is None:
            raise NotFound(f"guest {name} has ended", "see `nohype events`")
        return console

    def _check_protocol(self, claim: Claim, hint: str) -> None:
        """Raises GuestError now instead of after a time-out. An image that was removed since the start is not checked."""
        plan = claim.plan
        with suppress(NotFound, ImageError):
            if not find_image(self._images, plan.image.name).speaks_protocol:
                raise GuestError(
                    f"guest {plan.name}: image {plan.image.name} does not speak the protocol {CONSOLE_PROTOCOL}", hint
                )

    def _has_own_backups(self, claim: Claim, log: Path) -> bool:
        """Earlier versions named logs without the guest's id: their backups can belong to another guest."""
        return log == self._logs.find(claim.plan, claim.owner)

    def _is_in_use(self, log: Path, name: str) -> bool:
        claim = self._ledger.find(name)
        try:
            return claim is not None and self._hypervisor.console(claim.plan.uuid).log == log
        except NotFound:
            return False
