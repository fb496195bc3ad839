"""The operator's command: what it asks of the manager, and how it shows the answer. The manager is a fake here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import guest as guest_module
from orchestrator.cli import watch as watch_module
from orchestrator.cli.main import nohype
from orchestrator.request import parse_guest_request

GUEST: dict[str, Any] = {
    "name": "web", "state": "running", "owner": "", "version": 3, "restarts": 1, "cores": ["2-3"], "cpus": [2, 3], "node": 0,
    "memory": 256 << 20, "huge_pages": 128, "page_size": 2 << 20, "housekeeping": "0-1", "image": "minimal", "cmdline": "quiet",
    "vf": {"pf": "0000:41:00.0", "interface": "nic0", "index": 0, "address": "0000:41:10.0", "mac": "02:4e:48:00:00:01"},
    "cpu_features": [], "restart": "on-failure", "id": "job-17",
}  # fmt: skip


def build_event(number: int, subject: str = "web", **fields: Any) -> dict[str, Any]:
    event = {"id": number, "time": "2026-01-01T00:00:00.000+00:00", "kind": "started", "subject": subject, "who": "root"}
    return {**event, "detail": "on CPUs 2-3", "tenant": "", "took": None, **fields}


class FakeClient:
    """Remembers what was asked."""

    asked: list[tuple[Any, ...]] = []
    log: list[dict[str, Any]] = []

    def __init__(self, path: object) -> None:
        del path

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            self.asked.append((name, *arguments))
            return {**GUEST, "state": "stopped"} if name in ("stop", "kill") else GUEST

        return ask

    def quarantined(self) -> list[dict[str, Any]]:
        return [{"name": "db", "since": "2026-01-01T00:00:00+00:00", "reasons": ["VF 0000:41:10.2 is still bound to vfio-pci"]}]

    def events(self, after: int | None, limit: int) -> list[dict[str, Any]]:
        self.asked.append(("events", after, limit))
        return self.log[-limit:] if after is None else [event for event in self.log if event["id"] > after][:limit]

    def follow(self, after: int | None) -> Iterator[dict[str, Any]]:
        self.asked.append(("follow", after))
        yield build_event(9001)
        yield build_event(9002, "db")

    def metrics(self) -> str:
        return '# HELP nohype_guests Guests.\n# TYPE nohype_guests gauge\nnohype_guests{state="running"} 1.0\n'


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_module, "Client", FakeClient)
    monkeypatch.setattr(watch_module, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "asked", [])
    monkeypatch.setattr(FakeClient, "log", [])


def run(*words: str, status: int = 0) -> Result:
    done = CliRunner().invoke(nohype, list(words))
    assert done.exit_code == status, done.output
    return done


def test_a_request_with_everything() -> None:
    place = ("--cpus", "2-3,6-7", "--vf", "0000:41:10.0")
    more = ("--page-size", "1G", "--restart", "on-failure", "--remove", "--id", "job-17", "--address", "10.9.0.1/24")
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--cores", "2", *place, *more)
    ((name, request),) = FakeClient.asked
    assert name == "create"
    assert request["placement"] == {"cpus": "2-3,6-7", "vf": "0000:41:10.0"}
    found = parse_guest_request(request)
    assert (found.page_size, found.restart, found.id, found.cores, found.remove) == ("1G", "on-failure", "job-17", 2, True)


def test_what_is_not_said_is_not_asked() -> None:
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--plan")
    assert FakeClient.asked == [("plan", {"name": "web", "memory": "1G", "image": "minimal", "cores": 1, "cmdline": ""})]


def test_a_vf_alone_is_no_place() -> None:
    assert "--cpus too" in run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--vf", "0:0", status=2).output
    assert FakeClient.asked == []


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        (("start", "web"), ("start", "web"), "web running"),
        (("stop", "web"), ("stop", "web", 60), "web stopped"),
        (("stop", "web", "--timeout", "5"), ("stop", "web", 5), "web stopped"),
        (("restart", "web", "--timeout", "5"), ("restart", "web", 5), "web running"),
        (("kill", "web"), ("kill", "web"), "web stopped"),
        (("delete", "web"), ("delete", "web"), "web deleted"),
    ],
)
def test_each_verb(words: tuple[str, ...], asked: tuple[Any, ...], said: str) -> None:
    assert run("guest", *words).output == said + "\n"
    assert FakeClient.asked == [asked]
    assert json.loads(run("guest", *words, "--json").output)["name"] == "web"


@pytest.mark.parametrize("seconds", ["0", "-1", "3601", "soon"])
def test_a_patience_that_makes_no_sense(seconds: str) -> None:
    run("guest", "stop", "web", "--timeout", seconds, status=2)


def test_a_guest_is_shown_with_its_restarts() -> None:
    shown = run("guest", "show", "web").output
    assert "1 (on-failure)" in shown
    assert "tenant" not in shown


def test_quarantine() -> None:
    shown = run("quarantine", "list").output
    assert shown.splitlines() == ["db, since 2026-01-01T00:00:00+00:00", "  VF 0000:41:10.2 is still bound to vfio-pci"]
    assert json.loads(run("quarantine", "list", "--json").output)[0]["name"] == "db"
    assert run("quarantine", "clear", "db").output == "db cleared\n"
    assert FakeClient.asked == [("clear_quarantine", "db")]


def test_events_are_a_line_each() -> None:
    FakeClient.log = [build_event(1, detail="no room\n  - node 0: full", took=0.0123), build_event(2)]
    lines = run("events").output.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("started      web              by root: no room - node 0: full (0.012 s)")


def test_events_of_one_guest_as_json() -> None:
    FakeClient.log = [build_event(1), build_event(2, "db")]
    assert [event["id"] for event in json.loads(run("events", "--guest", "db", "--json").output)] == [2]


def test_all_events_after_one_are_fetched_page_by_page() -> None:
    FakeClient.log = [build_event(number) for number in range(1, 2501)]
    assert len(json.loads(run("events", "--after", "10", "--json").output)) == 2490
    assert FakeClient.asked == [("events", 10, 1000), ("events", 1010, 1000), ("events", 2010, 1000)]


def test_following_begins_after_the_last_event_whoever_it_was_about() -> None:
    FakeClient.log = [build_event(1), build_event(2, "db")]
    lines = [json.loads(line) for line in run("events", "--follow", "--guest", "web", "--json").output.splitlines()]
    assert [event["id"] for event in lines] == [1, 9001]
    assert FakeClient.asked[-1] == ("follow", 2)


def test_metrics() -> None:
    assert run("metrics").output == FakeClient(None).metrics()
    assert json.loads(run("metrics", "--json").output) == [{"series": 'nohype_guests{state="running"}', "value": "1.0"}]
