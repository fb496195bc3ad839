"""Reports the stages of long work, with their durations, to a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    BEGIN = "begin"
    NOTE = "note"
    END = "end"
    FAILED = "failed"
    PAUSE = "pause"  # another program writes to the terminal, until the next event


@dataclass(frozen=True)
class Event:
    kind: Kind
    stage: str  # empty for a note outside of all stages
    text: str = ""  # of a note, one line
    seconds: float = 0  # of an end: the duration of the stage


class Timeline:
    """Calls ``report`` with each event, in the working thread."""

    def __init__(self, report: Callable[[Event], None] = lambda event: None) -> None:
        self._report = report
        self._stages: list[str] = []
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the duration of the block, also if it fails. Durations of stages with the same name are added."""
        self._stages.append(name)
        self._report(Event(Kind.BEGIN, name))
        start = time.monotonic()
        kind = Kind.FAILED
        try:
            yield
            kind = Kind.END
        finally:
            seconds = time.monotonic() - start
            self.timings[name] = round(self.timings.get(name, 0) + seconds, 2)
            self._stages.pop()
            self._report(Event(kind, name, seconds=seconds))

    def pause(self) -> None:
        """Another program writes to the terminal until the next stage or note. To be called outside of all stages."""
        self._report(Event(Kind.PAUSE, ""))

    def note(self, text: str) -> None:
        self._report(Event(Kind.NOTE, self._stages[-1] if self._stages else "", text))
