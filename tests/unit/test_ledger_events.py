"""The event log has bounds: of each tenant the newest events stay, and those of trouble for longer."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.ledger import EventKind, Ledger
from orchestrator.ledger.retention import LONGEST, STEP
from orchestrator.model.event import Visibility
from tests.harness.crash import Tell, in_child
from tests.unit.test_ledger import claim, query

KEEP = 100
TROUBLE = tuple(kind for kind in EventKind if kind.is_trouble)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, keep=KEEP) as opened:
        yield opened


def count(ledger: Ledger) -> Counter[tuple[str, bool]]:
    return Counter((event.tenant, event.kind in TROUBLE) for event in ledger.events(limit=1_000_000))


def test_events_of_a_tenant_are_bounded(ledger: Ledger, path: Path) -> None:
    """With what it may do as often as it likes: starts, kills, and guests that fail."""
    sizes = []
    for number in range(6000):
        ledger.append_event(("started", "stopped", "failed")[number % 3], "web", "x" * 300, tenant="acme")
        if number in (3000, 5999):
            sizes.append(query(path, "PRAGMA page_count"))
    assert sizes[0] == sizes[1], "the file does not grow any more"
    kept = count(ledger)
    assert KEEP <= kept["acme", False] < KEEP + STEP
    assert KEEP <= kept["acme", True] < KEEP + STEP


def test_events_of_a_tenant_displace_no_others(ledger: Ledger) -> None:
    rare = [ledger.append_event(kind, "db", "", tenant=tenant) for tenant in ("bolt", "") for kind in ("claimed", *TROUBLE)]
    rare += [ledger.append_event(kind, "web", "", tenant="acme") for kind in TROUBLE]
    last = [ledger.append_event("started", "web", str(number), tenant="acme") for number in range(KEEP + 3 * STEP)][-KEEP:]
    found = ledger.events(limit=1_000_000)
    assert set(rare) <= set(found)
    assert set(last) <= set(found), "of its own the newest stay"
    assert len(found) < len(rare) + KEEP + STEP


@pytest.mark.parametrize("kind", [kind for kind in EventKind if kind.visibility is Visibility.HIDDEN])
def test_hidden_kinds_are_stored_without_a_tenant(ledger: Ledger, kind: EventKind) -> None:
    assert ledger.append_event(kind, "web", "", tenant="acme").tenant == ""
    assert ledger.events(tenant="acme") == ()


def test_unknown_kind_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="drited"):
        ledger.append_event("drited", "web", "")  # type: ignore[arg-type]
    assert ledger.events() == ()


def test_ids_continue_after_removal_of_old_events(ledger: Ledger) -> None:
    first = ledger.append_event("started", "web", "")
    for _ in range(KEEP + STEP):
        ledger.append_event("started", "web", "")
    kept = ledger.events(after=first.id, limit=1_000_000)
    assert [event.id for event in kept] == list(range(kept[0].id, ledger.last_event() + 1)), "a gap at the beginning only"
    assert kept[0].id == first.id + STEP
    assert ledger.append_event("cleared", "web", "").id == kept[-1].id + 1


def test_existing_events_count_after_a_start(path: Path) -> None:
    """A log that has grown without bounds comes within them, step by step."""
    with Ledger(path) as ledger:
        for _ in range(KEEP + 4 * STEP):
            ledger.append_event("started", "web", "", tenant="acme")
            ledger.append_event("drifted", "web", "", tenant="acme")
    with Ledger(path, keep=KEEP) as ledger:
        for _ in range(5):
            ledger.append_event("started", "web", "", tenant="acme")
        assert count(ledger) == {("acme", False): KEEP + 5, ("acme", True): KEEP + 4 * STEP}


def test_other_programs_cannot_remove_events(ledger: Ledger, path: Path) -> None:
    for _ in range(KEEP + STEP):
        ledger.append_event("started", "web", "")
    with sqlite3.connect(path) as other, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute("DELETE FROM event")
    other.close()


def test_kill_during_removal_removes_nothing(path: Path) -> None:
    """The event with which the removal begins is then not logged, nor has its caller continued."""
    for statement in ("BEGIN", "DROP", "DELETE", "CREATE", "COMMIT"):
        path.unlink(missing_ok=True)
        with Ledger(path, keep=KEEP) as ledger:
            for _ in range(KEEP + STEP - 1):
                ledger.append_event("started", "web", "")

        def work(tell: Tell, statement: str = statement) -> None:
            opened = threading.Event()

            def trace(text: str) -> None:
                if opened.is_set() and text.strip().startswith(statement):
                    os.kill(os.getpid(), signal.SIGKILL)

            ledger = Ledger(path, keep=KEEP, trace=trace)
            opened.set()
            ledger.append_event("started", "web", "the last")
            tell(left="alive")

        assert in_child(work) == (-signal.SIGKILL, ""), statement
        with Ledger(path, keep=KEEP) as ledger:
            events = ledger.events(limit=10_000)
            assert len(events) == KEEP + STEP - 1, statement
            assert not ledger.event_chain().faults
            last = ledger.append_event("started", "web", "the next")
            assert ledger.event_chain() == replace(ledger.event_chain(), events=KEEP, last=last.id, removed=STEP, faults=())
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                query(path, "DELETE FROM event")


def test_event_is_stored_though_old_ones_cannot_be_removed(ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(KEEP + STEP - 1):
        ledger.append_event("started", "web", "")
    ((trigger,),) = query(path, "SELECT sql FROM sqlite_schema WHERE name = 'event_no_delete'")
    query(path, "DROP TRIGGER event_no_delete")
    with caplog.at_level(logging.ERROR):
        event = ledger.append_event("started", "web", "the last")
    assert ledger.events(None, 1) == (event,)
    assert "cannot remove old events" in caplog.text
    query(path, str(trigger))
    ledger.append_event("started", "web", "")
    assert count(ledger) == {("", False): KEEP + 1}


def test_long_detail_is_cut(ledger: Ledger) -> None:
    event = ledger.append_event("failed", "web", "ä" * 100_000)
    assert ledger.events() == (event,)
    assert len(event.detail) == LONGEST + 3


def test_claims_and_undo_records_are_not_bounded(ledger: Ledger) -> None:
    claim(ledger, 1)
    for number in range(KEEP + STEP + 1):
        ledger.add_undo_record("g1", "move", {"number": number})
        ledger.append_event("started", "g1", "")
    assert len(ledger.undo_records("g1")) == KEEP + STEP + 1
    assert len(ledger.read().claims) == 1
