"""One reader of a guest's console: output is read from the log only as fast as the reader takes it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from orchestrator.console import LogReader
from orchestrator.errors import OrchestratorError, RequestError

HELD_BYTES = 64 << 10
"""Output that is read but not taken: above this a reader's log is not read further."""
HISTORY_BYTES = 1 << 20

_POSITION = re.compile(r"([0-9a-f-]{36})((?:\.[0-9a-f]{1,16}){3})")


@dataclass(frozen=True)
class Position:
    """Where a reader is in the log of a guest, so that it can continue after a lost connection."""

    uuid: UUID
    place: tuple[int, int, int]  # as LogReader.position

    def __str__(self) -> str:
        return ".".join((str(self.uuid), *(f"{number:x}" for number in self.place)))


def parse_position(text: str) -> Position:
    """Raises RequestError."""
    match = _POSITION.fullmatch(text)
    try:
        if match:
            device, inode, offset = (int(part, 16) for part in match[2][1:].split("."))
            if offset < 1 << 63:
                return Position(UUID(match[1]), (device, inode, offset))
    except ValueError:
        pass  # of UUID
    raise RequestError(f"invalid console position {text[:80]!r}", "send the position of an earlier part unchanged")


@dataclass(frozen=True)
class Part:
    """Output of a guest.

    Attributes:
        position: after this output.
        may_have_skipped: the log was rotated faster than it was read, so output before this may be missing.
        is_last: nothing follows, because of ``error``, or because only output so far was requested (None).
    """

    position: Position
    output: bytes
    may_have_skipped: bool = False
    is_last: bool = False
    error: OrchestratorError | None = None


class ConsoleStream:
    """One thread reads, another takes. ``notify`` is called by the reading thread when `take` has something new to return.

    Nothing is read before `start`, so that a stream whose client has gone before is only garbage. After it, `cancel` is required.
    """

    def __init__(self, uuid: UUID, reader: LogReader) -> None:
        self.notify: Callable[[], object] = lambda: None
        self._reader, self._position = reader, Position(uuid, reader.position)
        self._lock = threading.Lock()
        self._held: list[bytes] = []
        self._size = 0
        self._skipped = self._finishing = self._finished = self._cancelled = False
        self._error: OrchestratorError | None = None
        self._taken: Callable[[], object] = lambda: None
        self._begin: Callable[[], object] = lambda: None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be read for it."""
        return self._cancelled or self._finished

    def on_taken(self, call: Callable[[], object]) -> None:
        """``call`` is called when output was taken, or the reader has gone."""
        self._taken = call

    def on_start(self, call: Callable[[], object]) -> None:
        self._begin = call

    # For the thread that reads.

    def read(self, limit: int) -> bool:
        """Reads up to ``limit`` bytes unless enough is held; returns whether more may be read now. Raises OSError."""
        if self.is_over or self._size >= HELD_BYTES:
            return False
        data = self._reader.read(limit)
        with self._lock:
            if data:
                self._held.append(data)
                self._size += len(data)
            self._position = Position(self._position.uuid, self._reader.position)
            self._skipped |= self._reader.may_have_skipped
            self._reader.may_have_skipped = False
            self._finished = self._finished or (self._finishing and not data)
        if data or self._finished:
            self.notify()
        return bool(data)

    def finish(self, error: OrchestratorError | None, *, immediately: bool = False) -> None:
        """The guest's output ends with ``error``: after the rest of the log, or ``immediately``. The first error counts."""
        with self._lock:
            if not self._finishing:
                self._finishing, self._error = True, error
            self._finished = self._finished or immediately
        if self._finished:
            self.notify()

    def close_if_over(self) -> bool:
        if self.is_over:
            self._reader.close()
        return self.is_over

    # For the reader.

    def start(self) -> None:
        self._begin()

    @property
    def position(self) -> Position:
        """After all output that was taken or is held."""
        return self._position

    def take(self) -> Part | None:
        """All output that is held; None if there is none yet."""
        with self._lock:
            data, is_last = b"".join(self._held), self._finished
            if not data and not is_last:
                return None
            part = Part(self._position, data, self._skipped, is_last, self._error if is_last else None)
            self._held, self._size, self._skipped = [], 0, False
        self._taken()
        return part

    def cancel(self) -> None:
        """The reader has gone."""
        self._cancelled = True
        self._taken()
