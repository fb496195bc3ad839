"""Stages of a long piece of work: each is timed, and told to whoever shows it. Knows nothing of terminals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an event says."""

    BEGIN = "begin"
    NOTE = "note"
    END = "end"
    FAILED = "failed"


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        stage: name of the stage; empty for a note outside of any.
        text: one line, for notes.
        seconds: how long the stage took, at its end.
    """

    kind: Kind
    stage: str
    text: str = ""
    seconds: float = 0


class Timeline:
    """The stages of one piece of work, in order.

    Args:
        report: is called with each event, in the thread that does the work.
    """

    def __init__(self, report: Callable[[Event], None] = lambda event: None) -> None:
        self._report = report
        self._stages: list[str] = []
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is done inside; the time of a stage that fails is kept too. A name that comes again is added up."""
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

    def note(self, text: str) -> None:
        """One line that is worth to be seen, within the stage or outside."""
        self._report(Event(Kind.NOTE, self._stages[-1] if self._stages else "", text))
