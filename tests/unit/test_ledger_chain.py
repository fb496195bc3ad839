"""The hash chain of the event log: each change of the file that the manager did not make is found."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.ledger import Ledger, schema
from orchestrator.ledger.chain import START
from orchestrator.ledger.retention import STEP

KEEP = 100
GUARDS = ("event_no_update", "event_no_delete", "event_no_replace")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def fill(ledger: Ledger, count: int, tenant: str = "acme") -> None:
    for number in range(count):
        took = None if number % 3 else number / 7
        ledger.append_event(("started", "stopped")[number % 2], "web", f"event {number}, ä", tenant=tenant, took=took)


def tamper(path: Path, *statements: str) -> None:
    """What another program with write access can do: it removes the triggers first, and creates them again."""
    with closing(sqlite3.connect(path)) as other, other:
        triggers = {name: sql for name, sql in other.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")}
        for name in GUARDS:
            other.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            other.execute(statement)
        for name in GUARDS:
            other.execute(triggers[name])


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed log with gaps in the middle: retention has removed events of one tenant between those of another."""
    path = tmp_path_factory.mktemp("chain") / "ledger.sqlite"
    with Ledger(path, keep=KEEP) as ledger:
        for _ in range(6):
            fill(ledger, 3, "bolt")
            fill(ledger, 70)
        assert not ledger.event_chain().faults
    return path


@pytest.fixture
def copy(filled: Path, path: Path) -> Path:
    shutil.copy(filled, path)
    return path


def faults(path: Path) -> tuple[str, ...]:
    with Ledger(path, keep=KEEP) as ledger:
        return ledger.event_chain().faults


def test_empty_log_is_intact(path: Path) -> None:
    with Ledger(path) as ledger:
        report = ledger.event_chain()
        assert (report.events, report.last, report.hash, report.faults) == (0, 0, START, ())
        assert ledger.event_head().hash == START


def test_log_with_removed_events_is_intact(copy: Path) -> None:
    with Ledger(copy, keep=KEEP) as ledger:
        report, head = ledger.event_chain(), ledger.event_head()
        assert (report.faults, report.removed, report.first) == ((), STEP, 1)
        assert report.events == 6 * 73 - STEP
        assert (head.id, head.hash, head.removed) == (report.last, report.hash, report.removed)
        ids = [event.id for event in ledger.events(limit=10_000)]
        assert len(set(range(1, 6 * 73 + 1)) - set(ids)) == STEP, "the gaps are not at the beginning"
        fill(ledger, 3 * STEP)
        assert not ledger.event_chain().faults
        assert len(query(copy, "SELECT 1 FROM event_gap")) <= 20, "neighbouring gaps become one"


def test_chain_continues_after_a_start_and_with_another_writer(path: Path) -> None:
    with Ledger(path) as first:
        fill(first, 3)
    with Ledger(path) as second:
        fill(second, 3)
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("INSERT INTO event (time, kind, subject, detail) VALUES ('t', 'started', 'web', 'forged')")
        fill(second, 2)
        report = second.event_chain()
    assert report.events == 9
    assert report.faults == ("event 7 (t started web) does not match its hash",), "events after it are linked to what is there"


def test_hash_at_an_event_is_returned(copy: Path) -> None:
    with Ledger(copy, keep=KEEP) as ledger:
        head = ledger.event_head()
        (gap,) = query(copy, "SELECT first, last, hash FROM event_gap ORDER BY first LIMIT 1")
        fill(ledger, 2)
        assert ledger.event_chain(head.id).at == head.hash
        assert ledger.event_chain(gap[1]).at == gap[2], "that of the last event of a gap is kept"
        assert ledger.event_chain(gap[0]).at is None
        assert ledger.event_chain(head.id + 3).at is None


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as other:
        return other.execute(statement).fetchall()


@pytest.mark.parametrize("column", ["time", "kind", "subject", "detail", "who", "tenant", "took", "removed", "hash"])
def test_change_of_any_column_is_found(copy: Path, column: str) -> None:
    value = "removed + 1" if column == "removed" else "coalesce(took, 0) + 1" if column == "took" else f"{column} || 'x'"
    tamper(copy, f"UPDATE event SET {column} = {value} WHERE id = 430")
    assert any("event 430 (" in fault and "does not match its hash" in fault for fault in faults(copy))


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("DELETE FROM event WHERE id = 2", "event 2 is missing, and not removed by the manager"),
        ("DELETE FROM event WHERE id <= 3", "events 1 to 73 are missing, and not removed by the manager"),
        ("DELETE FROM event WHERE id > 430", "events 431 to 438 are missing: no newer event exists"),
        ("DELETE FROM event", "events 1 to 438 are missing: no newer event exists"),
        ("DELETE FROM event_gap WHERE first = (SELECT min(first) FROM event_gap)", "not removed by the manager"),
        ("UPDATE event_gap SET hash = hash || '0' WHERE first = (SELECT min(first) FROM event_gap)", "does not match its hash"),
        ("UPDATE event_gap SET last = last - 1 WHERE first = (SELECT min(first) FROM event_gap)", "not removed by"),
        ("INSERT INTO event_gap VALUES (1000, 1001, 'x')", "258 events are recorded as removed"),
        ("UPDATE event SET id = 9999 WHERE id = 438", "events 438 to 9998 are missing"),
    ],
)  # fmt: skip
def test_loss_of_events_is_found(copy: Path, statement: str, fault: str) -> None:
    tamper(copy, statement)
    assert any(fault in found for found in faults(copy)), faults(copy)


def test_deletion_that_looks_like_retention_is_found(copy: Path) -> None:
    ((digest,),) = query(copy, "SELECT hash FROM event WHERE id = 2")
    tamper(copy, "DELETE FROM event WHERE id = 2", f"INSERT INTO event_gap VALUES (2, 2, '{digest}')")
    assert faults(copy) == ("257 events are recorded as removed, but the newest event confirms 256",)


def test_exchanged_events_are_found(copy: Path) -> None:
    tamper(
        copy, "UPDATE event SET id = -1 WHERE id = 430", "UPDATE event SET id = 430 WHERE id = 431",
        "UPDATE event SET id = 431 WHERE id = -1",
    )  # fmt: skip
    assert len(faults(copy)) >= 2


def test_many_faults_are_counted(copy: Path) -> None:
    tamper(copy, "UPDATE event SET detail = 'x' WHERE tenant = 'acme'")
    found = faults(copy)
    assert len(found) == 9
    assert found[-1].endswith(" further faults")


def test_events_are_logged_after_the_newest_were_lost(copy: Path) -> None:
    tamper(copy, "DELETE FROM event WHERE id > 430")
    with Ledger(copy, keep=KEEP) as ledger:
        event = ledger.append_event("started", "web", "")
        assert event.id == 439, "no id is used again"
        assert ledger.event_chain().faults == ("events 431 to 438 are missing, and not removed by the manager",)


@pytest.mark.parametrize("version", [10, 11])
@pytest.mark.parametrize("holes", ["none", "id IN (1, 2, 7)"])
def test_existing_events_are_linked_by_the_migration(path: Path, version: int, holes: str) -> None:
    insert = "INSERT INTO event (time, kind, subject, detail, took) VALUES (?, 'started', 'web', 'ä', ?)"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        schema.migrate(other, version)
        other.executemany(insert, [(f"2026-11-26T00:00:{n % 60:02}", n / 3 if n % 2 else None) for n in range(2500)])
        if holes != "none":
            other.execute("DROP TRIGGER event_no_delete")
            other.execute(f"DELETE FROM event WHERE {holes}")
            other.execute(schema.EVENT_NO_DELETE)
    with Ledger(path) as ledger:
        report = ledger.event_chain()
        missing = 0 if holes == "none" else 3
        assert report == replace(report, events=2500 - missing, last=2500, removed=missing, faults=())
        fill(ledger, 2)
        assert not ledger.event_chain().faults
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        query(path, "UPDATE event SET detail = ''")


ACTIONS = st.lists(st.tuples(st.sampled_from(["acme", "bolt", ""]), st.integers(1, 150)), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ACTIONS)
def test_chain_stays_intact_whatever_is_removed(tmp_path: Path, actions: list[tuple[str, int]]) -> None:
    path = tmp_path / "ledger.sqlite"
    path.unlink(missing_ok=True)
    total = 0
    with Ledger(path, keep=2) as ledger:
        for tenant, count in actions:
            fill(ledger, count, tenant)
            total += count
        report = ledger.event_chain()
    assert report == replace(report, faults=(), last=total, events=total - report.removed)
