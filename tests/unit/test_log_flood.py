"""What clients do does not fill the log."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from orchestrator.daemon import flood
from orchestrator.daemon.flood import FloodFilter
from orchestrator.daemon.journal import set_up_logging

JOURNALD = 10_000


class Log:
    """A handler's filter with a clock of its own."""

    def __init__(self) -> None:
        self.now, self.written, self.timers = 0.0, [], []
        self.filter = FloodFilter(
            lambda record: self.written.append(record.getMessage()), lambda *timer: self.timers.append(timer), lambda: self.now
        )

    def write(self, text: str, line: int = 1, level: int = logging.WARNING, **event: str) -> bool:
        record = logging.LogRecord("a", level, "file.py", line, text, (), None)
        if event:
            record.event = SimpleNamespace(**event)
        if passed := self.filter.filter(record):
            self.written.append(text)
        return passed

    def run_timers(self) -> None:
        timers, self.timers = self.timers, []
        for seconds, work in timers:
            self.now += seconds
            work()


@pytest.fixture
def log() -> Log:
    return Log()


def test_messages_of_one_place_are_limited_and_counted(log: Log) -> None:
    for number in range(1000):
        log.write(f"refused {number}")
    assert log.write("another place", line=2)
    assert len(log.written) == flood.EACH + 1
    [(seconds, _)] = log.timers
    assert 0 < seconds <= flood.PERIOD
    log.run_timers()
    assert log.written[-1] == f"{1000 - flood.EACH} more messages like this one were suppressed within 30 s: refused 999"
    assert log.write("again")


def test_ordinary_rate_is_not_limited_and_sets_no_timer(log: Log) -> None:
    for number in range(1000):
        log.now += 1
        assert log.write(f"one {number}")
    assert log.timers == []


def test_each_kind_and_tenant_of_events_has_its_own(log: Log) -> None:
    """A tenant that starts and kills a guest all the time hides no one's quarantine."""
    for _ in range(1000):
        log.write("started", level=logging.INFO, kind="started", tenant="acme")
    assert log.write("web quarantined", kind="quarantined", tenant="acme")
    assert log.write("started", level=logging.INFO, kind="started", tenant="bolt")


def test_all_places_together_stay_below_what_the_journal_takes(log: Log) -> None:
    for tenant in range(100):
        for kind in ("claimed", "started", "stopped", "deleted", "refused"):
            for _ in range(150):
                log.write(kind, level=logging.INFO, kind=kind, tenant=f"t{tenant}")
    assert len(log.written) <= flood.ALL
    assert log.write("a warning"), "a warning is written all the same"
    log.run_timers()
    assert len(log.written) < JOURNALD / 2


def test_two_floods_in_a_row_are_counted_apart(log: Log) -> None:
    for _ in range(3):
        for _ in range(250):
            log.write("x")
        log.run_timers()
    assert [text for text in log.written if text != "x"] == ["150 more messages like this one were suppressed within 30 s: x"] * 3
    assert log.written.count("x") == 3 * flood.EACH


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.usefixtures("_logging_as_before")
def test_the_managers_log_is_filtered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[tuple[float, Callable[[], None]]] = []

    class Timer(threading.Thread):
        def __init__(self, seconds: float, work: Callable[[], None]) -> None:
            super().__init__()
            timers.append((seconds, work))

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    set_up_logging()
    for number in range(500):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("other").warning("%d", number)
    timers[0][1]()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * (flood.EACH + 1)
    assert (
        lines[-2]
        == "<4>uvicorn.error: 400 more messages like this one were suppressed within 30 s: Invalid HTTP request received."
    )
    assert lines[-1].startswith("<4>other: 400 more")
