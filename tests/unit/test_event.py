"""One list of event kinds and one of event fields: what shows them elsewhere agrees with it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from orchestrator.client import shapes
from orchestrator.daemon.journal import build_fields
from orchestrator.model.event import EVENT_FIELDS, Event, EventKind, Visibility

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
EVENT = Event(7, "2026-01-01T00:00:00+00:00", "started", "web", "on CPUs 2-3", "alice", "acme", 0.5)


def test_json_has_the_documented_shape() -> None:
    assert EVENT.to_json().keys() == shapes.Event.__annotations__.keys()


def test_journal_entry_has_a_field_for_each_attribute() -> None:
    """The time is the journal's own, and the detail is in the message."""
    record = logging.makeLogRecord({"levelno": logging.INFO, "event": EVENT})
    own = {value for name, value in build_fields(record, "").items() if name.startswith("NOHYPE_")}
    assert own == {str(getattr(EVENT, name)) for name in EVENT_FIELDS if name not in ("time", "detail")}


def test_each_kind_is_documented() -> None:
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", API[API.index("## Events") :], re.MULTILINE)
    assert {kind for row in rows for kind in re.findall(r"`([a-z-]+)`", row)} >= set(EventKind)


def test_documented_trouble_is_the_trouble_that_is_kept_longer() -> None:
    (listed,) = re.findall(r"separately [0-9,]+ of the kinds (.*?)\. A client", API, re.DOTALL)
    assert set(re.findall(r"`([a-z-]+)`", listed)) == {kind for kind in EventKind if kind.is_trouble}


@pytest.mark.parametrize("kind", EventKind)
def test_a_tenant_sees_the_detail_of_visible_kinds_only(kind: EventKind) -> None:
    event = Event(1, "", kind, "web", "VF 0000:41:10.0 is in use by guest db", "manager", "acme", None)
    assert ("db" in event.redacted().detail) == (kind.visibility is Visibility.FULL)


def test_an_unknown_kind_is_not_trouble_and_its_detail_is_not_shown() -> None:
    event = Event(1, "", "reserved", "web", "secret", "manager", "acme", None)
    assert event.severity == logging.INFO
    assert "secret" not in event.redacted().detail
