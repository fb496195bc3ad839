"""One thread reads the consoles of all guests with waits or readers. A wait is a future that can be cancelled. Without waits and
readers no thread runs and no file is open. The thread reads a piece of each log in turn for some milliseconds, then pauses for
longer than that.
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

from orchestrator.console import (
    ANSWER,
    KEYS,
    KEYS_END,
    PRINTED_KEY,
    READY,
    LineScanner,
    LogReader,
    clean,
    find_host_key,
    format_tail,
    read_tail,
)
from orchestrator.errors import GuestError, HostError, NotFound, OrchestratorError
from orchestrator.guests.console_stream import ConsoleStream
from orchestrator.guests.question import REPORT_READY, Question, settle
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.state import GuestState

_log = logging.getLogger(__name__)

_PIECE = 16 << 10
# CPU seconds for reading in one round; the pause after it is at least this many times as long.
_WORK, _REST = 0.002, 4
# Seconds between rounds; and while there is more to read, or a reply is due and the pty must be emptied (see Question).
_PAUSE, _SHORT_PAUSE = 0.2, 0.05
_LIST_SECONDS = 2.0
_LIVELY_SECONDS = 5.0


class Ready:
    """``what`` completes "waiting for the guest to"."""

    def __init__(self, timeout: float, what: str) -> None:
        self.what = what
        self.future: Future[str] = Future()
        self.timeout, self.deadline = timeout, time.monotonic() + timeout


class Console:
    """The console of one run of a guest; each run has another version in the ledger. ``backups``: read virtlogd's backups too."""

    def __init__(self, claim: Claim, log: Path, *, backups: bool) -> None:
        self.name, self.uuid, self.version, self.log = claim.plan.name, claim.plan.uuid, claim.version, log
        self.since = time.monotonic()
        self.waits: list[Ready] = []
        self.questions: deque[Question] = deque()
        self.streams: list[ConsoleStream] = []
        self.typed_at = 0.0  # time.monotonic() of the last input: its echo is shown soon
        # The time of the last read; whether the log was read to its end; whether the guest has ended.
        self.was_read, self.is_read, self.has_ended = 0.0, False, False
        self._reader, self._scanner = LogReader(log, backups=backups), LineScanner()
        self._ready_line: str | None = None
        self._host_key: str | None = None
        self._prints_keys = False  # between the lines in which cloud-init prints the host keys
        self._is_reported = False

    @property
    def is_waited_for(self) -> bool:
        return bool(self.waits or self.questions or self.streams)

    @property
    def deadlines(self) -> list[float]:
        """``time.monotonic()`` of each wait's time-out."""
        return [*(wait.deadline for wait in self.waits), *(question.deadline for question in self.questions)]

    @property
    def is_lively(self) -> bool:
        """Whether its next output is expected soon."""
        if self.streams and time.monotonic() - self.typed_at < _LIVELY_SECONDS:
            return True
        return any(question.was_typed for question in self.questions)

    def read(self) -> bool:
        """Reads a piece for the waits, and one for each reader; returns whether more may be read now."""
        more = [stream.read(_PIECE) for stream in self.streams]
        if self.waits or self.questions:
            more.append(self._read_lines())
        else:
            self.was_read, self.is_read = time.monotonic(), True
        return any(more)

    def _read_lines(self) -> bool:
        data = self._reader.read(_PIECE)
        self.was_read, self.is_read = time.monotonic(), not data
        self._scanner.feed(data)
        if self._ready_line is None:
            self._read_report()
        if self.questions and self.questions[0].was_typed and self.questions[0].feed(data, self._scanner.find(ANSWER)):
            self.questions.popleft()
        return bool(data)

    def _read_report(self) -> None:
        ready, begin = self._scanner.find(READY), None if self._prints_keys else self._scanner.find(KEYS)
        if self._prints_keys or begin:
            # Other lines begin with keys of users.
            key, end = self._scanner.find(PRINTED_KEY, begin), self._scanner.find(KEYS_END, begin)
            if key and not self._host_key and all(key.end < last.end for last in (end, ready) if last):
                self._host_key = find_host_key(clean(key.text))
            self._prints_keys = end is None
        if ready:
            self._ready_line = clean(ready.text)
            self._host_key = find_host_key(self._ready_line) or self._host_key

    def go_on(self) -> None:
        """Completes the waits for a ready guest, and types the next command. The caller has checked that the run still lasts."""
        if self._ready_line is not None:
            for wait in self.waits:
                settle(wait.future, self._ready_line)
        # After so much output that virtlogd has rotated the log, the line can be gone with the oldest part.
        is_ready = self._ready_line is not None or (self.is_read and self._reader.was_rotated)
        if is_ready and self.questions and not self.questions[0].was_typed:
            self._scanner = LineScanner(begins_line=self._reader.skip_to_end())
            self.questions[0].type()

    def take_host_key(self) -> str | None:
        """The SSH host key that this run has reported, once it is ready; only once."""
        if self._is_reported or self._ready_line is None:
            return None
        self._is_reported = True
        return self._host_key

    def expire(self, now: float) -> None:
        output = cache(lambda: format_tail(read_tail(self.log)))
        for wait in self.waits:
            if now >= wait.deadline:
                what = f"timed out after {wait.timeout:g} s waiting for the guest to {wait.what}"
                settle(wait.future, error=GuestError(f"{what}; console output:{output()}"))
        for question in self.questions:
            question.expire(now, output)

    def end(self, error: OrchestratorError | None = None, *, immediately: bool = True) -> None:
        """Completes all waits with the error; None if the guest has ended. Readers get the rest of its output before, unless
        ``immediately``.
        """
        output = cache(lambda: format_tail(read_tail(self.log)))
        for wait in self.waits:
            before = "" if self._ready_line else f" before it could {wait.what}"
            settle(wait.future, error=error or GuestError(f"the guest ended{before}; console output:{output()}"))
        for question in self.questions:
            question.end(output, error)
        for stream in self.streams:
            stream.finish(error or NotFound(f"guest {self.name} has ended", "see `nohype events`"), immediately=immediately)

    def drop_settled(self) -> None:
        """Drops finished and cancelled waits and readers; without any the log is closed."""
        now = time.monotonic()
        self.waits = [wait for wait in self.waits if not wait.future.done()]
        self.questions = deque(question for question in self.questions if not question.is_over(now))
        self.streams = [stream for stream in self.streams if not stream.close_if_over()]
        if not self.is_waited_for:
            self._reader.close()


class ConsoleWatch:
    """``on_host_key`` gets the name, id and version of a guest and its SSH host key, once per run; it must not block."""

    def __init__(
        self, ledger: Ledger, list_running: Callable[[], frozenset[UUID]], on_host_key: Callable[[str, UUID, int, str], object]
    ) -> None:
        self._ledger, self._list_running, self._on_host_key = ledger, list_running, on_host_key
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._consoles: dict[tuple[UUID, int], Console] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        # When the running guests were last listed, and their ids; whether a thread is listing them.
        self._seen: tuple[float, frozenset[UUID]] = (0.0, frozenset())
        self._is_listing = False

    def wait_ready(self, claim: Claim, log: Path, timeout: float, what: str = REPORT_READY, *, backups: bool) -> Future[str]:
        wait = Ready(timeout, what)
        with self._lock:
            self._find(claim, log, backups=backups).waits.append(wait)
            return self._follow(wait.future)

    def ask(self, claim: Claim, log: Path, pty: Path, line: str, timeout: float, *, backups: bool) -> Future[str]:
        question = Question(pty, line, timeout)
        with self._lock:
            self._find(claim, log, backups=backups).questions.append(question)
            return self._follow(question.future)

    def follow(self, claim: Claim, log: Path, stream: ConsoleStream, *, backups: bool) -> None:
        """Reads for ``stream`` until it is cancelled or the guest ends."""
        stream.on_taken(self._wake.set)
        with self._lock:
            self._find(claim, log, backups=backups).streams.append(stream)
            self._start()

    def note_typed(self, claim: Claim) -> None:
        """Input was typed for the readers of the guest."""
        with self._lock:
            for console in self._consoles.values():
                if console.uuid == claim.plan.uuid:
                    console.typed_at = time.monotonic()
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _find(self, claim: Claim, log: Path, *, backups: bool) -> Console:
        key = claim.plan.uuid, claim.version
        if key not in self._consoles:
            # Ended runs without waits are dropped.
            over = [key for key, console in self._consoles.items() if not console.is_waited_for and not self._lasts(console)]
            for old in over:
                del self._consoles[old]
            self._consoles[key] = Console(claim, log, backups=backups)
        return self._consoles[key]

    def _follow(self, future: Future[str]) -> Future[str]:
        """Wakes the thread, now and when the future is cancelled; starts it if it does not run."""
        future.add_done_callback(lambda _future: self._wake.set())
        self._start()
        return future

    def _start(self) -> None:
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="consoles", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while consoles := self._list_waited_for():
            self._wake.clear()
            started_at = time.thread_time()
            more = self._read(consoles, started_at + _WORK)
            for console in consoles:
                self._guard(console, partial(self._settle, console))
            self._refresh_running()
            time.sleep((time.thread_time() - started_at) * _REST)
            self._wake.wait(self._find_pause(consoles, more=more))

    def _list_waited_for(self) -> list[Console]:
        """The consoles with waits, least recently read first. Without any, the thread exits."""
        with self._lock:
            for console in self._consoles.values():
                console.drop_settled()
            found = [console for console in self._consoles.values() if console.is_waited_for]
            if not found:
                self._thread = None
            return sorted(found, key=lambda console: console.was_read)

    def _read(self, consoles: list[Console], until: float) -> bool:
        """Reads a piece of each log in turn until `until`; returns whether more is left."""
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
        lasts = self._lasts(console)  # after the reading: what was read belongs to this run if that still lasts
        with self._lock:
            console.drop_settled()
            if self._closed:
                console.end(GuestError("the manager is being stopped; guests keep running", "retry"))
            elif lasts:
                console.go_on()
                if key := console.take_host_key():
                    self._on_host_key(console.name, console.uuid, console.version, key)
            elif console.is_read and console.has_ended:
                console.end(self._find_reason(console), immediately=False)
            # Output from its end is read first.
            console.has_ended = not lasts
            console.expire(time.monotonic())
        return True

    def _lasts(self, console: Console) -> bool:
        claim, (looked, running) = self._ledger.find(console.name), self._seen
        if claim is None or claim.plan.uuid != console.uuid:
            return False
        # A guest that is being stopped or quarantined can still run.
        is_ending = claim.previous == console.version and claim.state in (GuestState.STOPPING, GuestState.QUARANTINED)
        if claim.version != console.version and not is_ending:
            return False
        return looked < console.since or console.uuid in running

    def _find_reason(self, console: Console) -> OrchestratorError | None:
        claim = self._ledger.find(console.name)
        stays = claim and claim.plan.uuid == console.uuid and claim.state != GuestState.DELETING
        return None if stays else guest_replaced_error(console.name)

    def _guard(self, console: Console, work: Callable[[], bool]) -> bool:
        """An error of one console does not stop the others."""
        try:
            return work()
        except OSError as error:
            reason = HostError(f"cannot read the console log {console.log}", "check `mount` and `dmesg`", error.errno or 0)
        except Exception as error:
            _log.exception("internal error at the console of guest %s", console.name)
            reason = HostError(f"cannot read the console of guest {console.name}: {error}")
        with self._lock:
            console.end(reason)
        return False

    def _refresh_running(self) -> None:
        """Lists the guests in another thread: a slow libvirt must not delay the time-outs of clients."""
        if self._is_listing or time.monotonic() - self._seen[0] < _LIST_SECONDS:
            return

        def list_running() -> None:
            started_at = time.monotonic()
            with suppress(OrchestratorError):
                self._seen = started_at, self._list_running()
            self._is_listing = False

        self._is_listing = True
        threading.Thread(target=list_running, name="consoles-running", daemon=True).start()

    def _find_pause(self, consoles: list[Console], *, more: bool) -> float:
        is_short = more or any(console.is_lively for console in consoles)
        pause = _SHORT_PAUSE if is_short else _PAUSE
        with self._lock:
            deadlines = [deadline for console in consoles for deadline in console.deadlines]
        return max(0.0, min([pause, *(deadline - time.monotonic() for deadline in deadlines)]))


def guest_replaced_error(name: str) -> NotFound:
    """The guest's name can belong to another guest by now."""
    return NotFound(f"guest {name} ended or was replaced during the request", "see `nohype guest list`")
