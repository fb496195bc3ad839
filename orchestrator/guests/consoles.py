"""The guests' serial consoles. A wait ends with the run of the guest in which it was started."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from orchestrator.console import LogReader
from orchestrator.errors import Conflict, GuestError, HostError, ImageError, NotFound, ReadyBySsh
from orchestrator.guests.console_input import ConsoleInput
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.console_stream import HISTORY_BYTES, ConsoleStream, Position
from orchestrator.guests.console_watch import ConsoleWatch, guest_replaced_error
from orchestrator.guests.outcome import log_errors
from orchestrator.guests.question import REPORT_READY
from orchestrator.hypervisor.connection import Hypervisor, SerialConsole
from orchestrator.images.description import CONSOLE_PROTOCOL
from orchestrator.images.store import Image, find_build
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.state import GuestState

_TYPED_ON = (GuestState.RUNNING, GuestState.STOPPING, GuestState.QUARANTINED)
"""States in which a guest that was resumed can run."""

_LEARN_SECONDS = 1800.0
_REPORTS = {
    "console": REPORT_READY,
    "notify": f"{REPORT_READY} on its console when its SSH server runs",
    "cloud-init": f"{REPORT_READY} on its console at the end of cloud-init",
}
"""What a guest is waited for, by `ready` of its image."""


class Consoles:
    def __init__(self, hypervisor: Hypervisor, ledger: Ledger, logs: ConsoleLogs, images: Path) -> None:
        self._hypervisor, self._ledger, self._logs, self._images = hypervisor, ledger, logs, images
        self._watch = ConsoleWatch(ledger, lambda: hypervisor.running_uuids(), self._learn_host_key)
        self._input = ConsoleInput()

    def begin_ready(self, claim: Claim, timeout: float) -> Future[str]:
        """The future returns the line with which the guest reports ready after its last start. It raises NotFound if the guest is
        deleted, GuestError after ``timeout`` seconds or if the guest ends. It can be cancelled.

        Raises NotFound if the guest does not run, GuestError if it is being started or stopped, or if its image does not report
        ready, and ReadyBySsh if the image does so only by answering SSH: the manager does not connect to addresses that a tenant
        chose.
        """
        console = self._find(claim, (GuestState.RUNNING,))
        what = self._find_report(claim)
        if console.log is None:
            raise GuestError(f"the console of guest {claim.plan.name} has no log")
        return self._watch.wait_ready(claim, console.log, timeout, what, backups=self._has_own_backups(claim, console.log))

    def begin_learning(self, claim: Claim, on_ready: Callable[[Claim], object], *, counts_calls: bool) -> None:
        """Records the SSH host key of a running guest when it reports ready, if its image does that when its SSH server runs.

        Calls ``on_ready``, which must not block, when the report ends the guest's boot: its image does not end it by a call,
        or the kernel does not count calls.
        """
        image = self._find_image(claim) if claim.state == GuestState.RUNNING else None
        if not image or image.ready not in _REPORTS:
            return
        has_key = image.ready != "console" and not claim.host_key
        ends_boot = not ((image.disengages and counts_calls) or claim.disengaged or claim.request.disengage_after is not None)
        log = self._logs.find(claim.plan, claim.owner)
        if not (has_key or ends_boot) or not log.exists():  # earlier versions named logs without the guest's id
            return
        wait = self._watch.wait_ready(claim, log, _LEARN_SECONDS, backups=True)
        if ends_boot:
            wait.add_done_callback(lambda done: None if done.cancelled() or done.exception() else on_ready(claim))

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

    def begin_reading(self, claim: Claim, lines: int, *, follow: bool, after: Position | None) -> ConsoleStream:
        """Starts with the last ``lines`` lines, at most 1 MB, or ``after`` an earlier reader's position. Without ``follow`` the
        stream ends with the output so far, otherwise with the run of the guest. A guest that has ended has its last output.

        Raises GuestError if the guest is being created, started or deleted, NotFound if ``after`` is of another guest.
        """
        plan, over = claim.plan, None
        if after and after.uuid != plan.uuid:
            raise guest_replaced_error(plan.name)
        log: Path | None = self._logs.find(plan, claim.owner)
        try:
            log = self._find(claim, _TYPED_ON).log
        except NotFound as error:
            over = error
        now = self._ledger.find(plan.name)
        if not now or now.plan.uuid != plan.uuid:
            raise guest_replaced_error(plan.name)
        if log is None:
            raise GuestError(f"the console of guest {plan.name} has no log")
        backups = self._has_own_backups(claim, log)
        reader = LogReader(log, backups=backups)
        try:
            if after:
                reader.seek(after.place)
            else:
                reader.skip_to_last(lines, HISTORY_BYTES)
        except OSError as error:
            raise HostError(f"cannot read the console log {log}", "check `mount` and `dmesg`", error.errno or 0) from None
        stream = ConsoleStream(plan.uuid, reader)
        if over or not follow:
            stream.finish(over if follow else None)
        stream.on_start(lambda: self._watch.follow(claim, log, stream, backups=backups))
        return stream

    def type(self, claim: Claim, data: bytes) -> int:
        """Returns how many bytes the guest's console took. Raises NotFound if the guest does not run, and GuestError."""

        def find_pty() -> Path | None:
            return self._find(claim, _TYPED_ON).pty

        if claim.state not in _TYPED_ON:
            find_pty()  # raises the error
        count = self._input.type(claim.plan.uuid, claim.plan.name, data, find_pty)
        self._watch.note_typed(claim)
        return count

    def remove_old_logs(self) -> None:
        self._logs.remove_old(self._is_in_use)

    def close(self) -> None:
        self._watch.close()
        self._input.close()

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

    def _learn_host_key(self, name: str, uuid: UUID, version: int, key: str) -> None:
        claim = self._ledger.find(name)
        if claim and (claim.plan.uuid, claim.version) == (uuid, version) and claim.host_key != key:

            def record() -> None:
                log_errors(lambda: self._ledger.record_host_key(claim, key))

            # In a thread: a write to the disk must not delay the other consoles.
            threading.Thread(target=record, name="host-key", daemon=True).start()

    def _find_report(self, claim: Claim) -> str:
        """What the guest is waited for. An image that was removed since the start is not checked."""
        plan, image = claim.plan, self._find_image(claim)
        ready = image.ready if image else "console"
        if ready == "ssh":
            what = f"guest {plan.name}: image {plan.image.name} reports ready by answering SSH, which the manager does not check"
            raise ReadyBySsh(what, f"run `nohype guest ssh {plan.name} -- true` on a machine that reaches the guest")
        if ready is None:
            what = (
                f"guest {plan.name}: image {plan.image.name} does not report when it is ready (`ready` is null in its image.json)"
            )
            raise GuestError(what, "omit --wait, or use an image that reports it, such as minimal")
        return _REPORTS[ready]

    def _check_protocol(self, claim: Claim, hint: str) -> None:
        """Raises GuestError now instead of after a time-out. An image that was removed since the start is not checked."""
        plan, image = claim.plan, self._find_image(claim)
        if image and not image.speaks_protocol:
            raise GuestError(f"guest {plan.name}: image {plan.image.name} does not speak the protocol {CONSOLE_PROTOCOL}", hint)

    def _find_image(self, claim: Claim) -> Image | None:
        with suppress(NotFound, ImageError, Conflict):
            return find_build(self._images, claim.plan.image)
        return None

    def _has_own_backups(self, claim: Claim, log: Path) -> bool:
        """Earlier versions named logs without the guest's id: their backups can belong to another guest."""
        return log == self._logs.find(claim.plan, claim.owner)

    def _is_in_use(self, log: Path, name: str) -> bool:
        claim = self._ledger.find(name)
        try:
            return claim is not None and self._hypervisor.console(claim.plan.uuid).log == log
        except NotFound:
            return False
