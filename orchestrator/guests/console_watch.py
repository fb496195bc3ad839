"""One thread that reads the consoles of all guests on which something is waited for. A wait is a future: it costs no thread, and
may be cancelled at any time. Without waits there is no thread, and no file is open.

However much guests print, and however many clients wait, the thread reads a piece of each log in turn, for some milliseconds, and
then pauses for longer than it has worked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from uuid import UUID

from orchestrator.console import ANSWER, READY, LineScanner, LogReader, clean, format_tail, read_tail
from orchestrator.errors import GuestError, HostError, NotFound, OrchestratorError
from orchestrator.guests.question import GET_READY, Question, settle
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.state import GuestState

_log = logging.getLogger(__name__)

_PIECE = 16 << 10
# Seconds of the processor for reading in one round; and how many times as long the pause after it is at least.
_WORK, _REST = 0.002, 4
# Seconds between rounds; and while there is more to read, or an answer is due: then the pty is to be emptied, see Question.
_PAUSE, _SHORT_PAUSE = 0.2, 0.05
_LOOK = 2.0


class Ready:
    """A client waits for a guest's own word that it is ready."""

    def __init__(self, timeout: float) -> None:
        self.future: Future[str] = Future()
        self.timeout, self.deadline = timeout, time.monotonic() + timeout


class Console:
    """The console of one life of a guest, from a start to the end: each has another version in the ledger.

    Args:
        claim: the guest as it is in this life.
        log: the file that it prints into.
        backups: whether files that virtlogd has put aside are of this life too.
    """

    def __init__(self, claim: Claim, log: Path, *, backups: bool) -> None:
        self.name, self.uuid, self.version, self.log = claim.plan.name, claim.plan.uuid, claim.version, log
        self.since = time.monotonic()
        self.waits: list[Ready] = []
        self.questions: deque[Question] = deque()
        # When it was read last; whether all that there was is read; whether it was seen that the guest has ended.
        self.was_read, self.is_read, self.has_ended = 0.0, False, False
        self._reader, self._scanner = LogReader(log, backups=backups), LineScanner()
        self._ready_line: str | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waits or self.questions)

    @property
    def deadlines(self) -> list[float]:
        """When the time of each wait is up (time.monotonic())."""
        return [*(wait.deadline for wait in self.waits), *(question.deadline for question in self.questions)]

    def read(self) -> bool:
        """Reads one piece; returns whether there was one."""
        data = self._reader.read(_PIECE)
        self.was_read, self.is_read = time.monotonic(), not data
        self._scanner.feed(data)
        if self._ready_line is None and (line := self._scanner.find(READY)):
            self._ready_line = clean(line.text)
        if self.questions and self.questions[0].was_typed and self.questions[0].hear(data, self._scanner.find(ANSWER)):
            self.questions.popleft()
        return bool(data)

    def go_on(self) -> None:
        """Tells clients that the guest is ready, and types the next question; the caller has seen that this life still lasts."""
        if self._ready_line is not None:
            for wait in self.waits:
                settle(wait.future, self._ready_line)
        # If a guest has printed so much that its log was put aside, its word may be gone with the oldest part: it has run long.
        is_ready = self._ready_line is not None or (self.is_read and self._reader.was_rotated)
        if is_ready and self.questions and not self.questions[0].was_typed:
            self._scanner = LineScanner(begins_line=self._reader.skip_to_end())
            self.questions[0].type()

    def expire(self, now: float) -> None:
        """Tells the clients whose time is up."""
        said = cache(lambda: format_tail(read_tail(self.log)))
        for wait in self.waits:
            if now >= wait.deadline:
                what = f"the guest did not {GET_READY} within {wait.timeout:g} s"
                settle(wait.future, error=GuestError(f"{what}; its console shows:{said()}"))
        for question in self.questions:
            question.expire(now, said)

    def end(self, error: OrchestratorError | None = None) -> None:
        """Tells all clients that the guest has ended, or another reason why waiting is no use."""
        said = cache(lambda: format_tail(read_tail(self.log)))
        for wait in self.waits:
            before = "" if self._ready_line else f" before it could {GET_READY}"
            settle(wait.future, error=error or GuestError(f"the guest has ended{before}; its console shows:{said()}"))
        for question in self.questions:
            question.end(said, error)

    def drop_settled(self) -> None:
        """Forgets the waits that are over, or were given up; without any the log is closed."""
        now = time.monotonic()
        self.waits = [wait for wait in self.waits if not wait.future.done()]
        self.questions = deque(question for question in self.questions if not question.is_over(now))
        if not self.is_waited_for:
            self._reader.close()


class ConsoleWatch:
    """Watches consoles. For several threads.

    Args:
        ledger: says in which life a guest is.
        list_running: gives the ids of all guests that run.
    """

    def __init__(self, ledger: Ledger, list_running: Callable[[], frozenset[UUID]]) -> None:
        self._ledger, self._list_running = ledger, list_running
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._consoles: dict[tuple[UUID, int], Console] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        # What runs: when that was last looked at, and what was found; and whether it is being looked at.
        self._seen: tuple[float, frozenset[UUID]] = (0.0, frozenset())
        self._looking = False

    def wait_ready(self, claim: Claim, log: Path, timeout: float, *, backups: bool) -> Future[str]:
        """The line with which a running guest says that it is ready. See ``Console``, and ``Consoles.begin_ready``."""
        wait = Ready(timeout)
        with self._lock:
            self._find(claim, log, backups=backups).waits.append(wait)
            return self._follow(wait.future)

    def ask(self, claim: Claim, log: Path, pty: Path, line: str, timeout: float, *, backups: bool) -> Future[str]:
        """Types a line, once the guest is ready and has answered those before. See ``Console``, and ``Consoles.begin_tell``."""
        question = Question(pty, line, timeout)
        with self._lock:
            self._find(claim, log, backups=backups).questions.append(question)
            return self._follow(question.future)

    def close(self) -> None:
        """Ends all waits."""
        self._closed = True
        self._wake.set()

    def _find(self, claim: Claim, log: Path, *, backups: bool) -> Console:
        key = claim.plan.uuid, claim.version
        if key not in self._consoles:
            # What is known of lives that are over is dropped; clients that still wait for one are told soon.
            over = [key for key, console in self._consoles.items() if not console.is_waited_for and not self._lasts(console)]
            for old in over:
                del self._consoles[old]
            self._consoles[key] = Console(claim, log, backups=backups)
        return self._consoles[key]

    def _follow(self, future: Future[str]) -> Future[str]:
        """Has the thread look at it, now and when it is cancelled."""
        future.add_done_callback(lambda _future: self._wake.set())
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="consoles", daemon=True)
            self._thread.start()
        return future

    def _run(self) -> None:
        while consoles := self._list_waited_for():
            self._wake.clear()
            began = time.thread_time()
            more = self._read(consoles, began + _WORK)
            for console in consoles:
                self._guard(console, partial(self._settle, console))
            self._look_now_and_then()
            time.sleep((time.thread_time() - began) * _REST)
            self._wake.wait(self._find_pause(consoles, more=more))

    def _list_waited_for(self) -> list[Console]:
        """The consoles with waits, those first that were not read for longest. Without any the thread is given up."""
        with self._lock:
            for console in self._consoles.values():
                console.drop_settled()
            found = [console for console in self._consoles.values() if console.is_waited_for]
            if not found:
                self._thread = None
            return sorted(found, key=lambda console: console.was_read)

    def _read(self, consoles: list[Console], until: float) -> bool:
        """A piece of each log in turn, until all is read or the time is used up; returns whether there is more."""
        for console in consoles:
            console.is_read = False
        left = deque(consoles)
        while left:
            console = left.popleft()
            if self._guard(console, partial(self._read_piece, console)):
                left.append(console)
            if time.thread_time() >= until:
                break
        return bool(left)

    def _read_piece(self, console: Console) -> bool:
        with self._lock:
            return console.read()

    def _settle(self, console: Console) -> bool:
        lasts = self._lasts(console)  # after it was read: what was read is of this life if that still lasts
        with self._lock:
            console.drop_settled()
            if self._closed:
                console.end(GuestError("the manager is being stopped; guests run on", "ask again"))
            elif lasts:
                console.go_on()
            elif console.is_read and console.has_ended:
                console.end(self._find_reason(console))
            # What it has printed at its end is read first.
            console.has_ended = not lasts
            console.expire(time.monotonic())
        return True

    def _lasts(self, console: Console) -> bool:
        """Whether the guest is still in this life."""
        claim, (looked, running) = self._ledger.find(console.name), self._seen
        if claim is None or claim.plan.uuid != console.uuid:
            return False
        # While it is being stopped, or is put into quarantine, it may still run.
        is_ending = claim.previous == console.version and claim.state in (GuestState.STOPPING, GuestState.QUARANTINED)
        if claim.version != console.version and not is_ending:
            return False
        return looked < console.since or console.uuid in running

    def _find_reason(self, console: Console) -> OrchestratorError | None:
        claim = self._ledger.find(console.name)
        return None if claim and claim.plan.uuid == console.uuid else guest_replaced_error(console.name)

    def _guard(self, console: Console, work: Callable[[], bool]) -> bool:
        """Whatever is wrong with one console, the others go on."""
        try:
            return work()
        except OSError as error:
            reason = HostError(f"cannot read the console log {console.log}", "see `mount` and `dmesg`", error.errno or 0)
        except Exception as error:
            _log.exception("a fault of ours at the console of guest %s", console.name)
            reason = HostError(f"cannot read the console of guest {console.name}: {error}")
        with self._lock:
            console.end(reason)
        return False

    def _look_now_and_then(self) -> None:
        """At what runs, by a thread of its own: a libvirt that does not answer must not delay clients whose time is up."""
        if self._looking or time.monotonic() - self._seen[0] < _LOOK:
            return

        def look() -> None:
            began = time.monotonic()
            with suppress(OrchestratorError):
                self._seen = began, self._list_running()
            self._looking = False

        self._looking = True
        threading.Thread(target=look, name="consoles-look", daemon=True).start()

    def _find_pause(self, consoles: list[Console], *, more: bool) -> float:
        hurries = more or any(question.was_typed for console in consoles for question in console.questions)
        pause = _SHORT_PAUSE if hurries else _PAUSE
        with self._lock:
            deadlines = [deadline for console in consoles for deadline in console.deadlines]
        return max(0.0, min([pause, *(deadline - time.monotonic() for deadline in deadlines)]))


def guest_replaced_error(name: str) -> NotFound:
    """Another guest can have the name by now."""
    return NotFound(f"guest {name} ended or was replaced during the request", "see `nohype guest list`")
