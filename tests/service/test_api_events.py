"""Events as they happen: to several watchers, each seeing what it may, over lost connections, until the manager ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from orchestrator.api.event_stream import EventStream
from orchestrator.api.identity import hash_token
from orchestrator.api.workers import Workers
from orchestrator.client import shapes
from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.ledger import Event
from orchestrator.model.access import MANAGER, OPERATOR, Identity
from tests.harness.api_server import Authority, Served, serve
from tests.harness.crash import World

GOOD = {"name": "one", "memory": "64M", "image": "minimal"}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


class Watcher:
    """Follows events in a thread."""

    def __init__(self, client: Client, after: int | None = None) -> None:
        self.seen: queue.Queue[shapes.Event] = queue.Queue()
        self._client, self._after = client, after
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            for event in self._client.follow(self._after):
                self.seen.put(event)
        except OrchestratorError:
            pass  # the manager has ended

    def until(self, kind: str, seconds: float = 60) -> list[shapes.Event]:
        """All events up to the first of a kind."""
        found = [self.seen.get(timeout=seconds)]
        while found[-1]["kind"] != kind:
            found.append(self.seen.get(timeout=seconds))
        return found


@contextmanager
def stream(path: Path, **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(10)
    connection.sock.connect(str(path))
    connection.request("GET", "/v1/events/stream", headers=headers)
    yield connection.getresponse()
    connection.close()


def test_stream_reports_a_creation_while_it_runs(served: Served) -> None:
    watcher = Watcher(served.client, 0)
    served.client.create(GOOD)
    told = watcher.until("started")
    assert [(event["subject"], event["who"]) for event in told] == [("one", "root")] * len(told)
    assert [event["id"] for event in told] == sorted({event["id"] for event in told})
    assert told == served.client.events(0)[: len(told)]


def test_stream_without_last_event_id_starts_with_new_events(served: Served) -> None:
    served.client.create(GOOD)
    with stream(served.path) as response:
        assert response.readline().startswith(b":")
        served.client.delete("one")
        while not (line := response.readline()).startswith(b"data:"):
            pass
        assert json.loads(line[5:])["id"] > 2


def test_stream_continues_after_the_last_event_id(served: Served) -> None:
    served.client.create(GOOD)
    newest = served.client.events()[-1]["id"]
    with stream(served.path, **{"Last-Event-ID": str(newest - 1)}) as response:
        assert response.getheader("Content-Type", "").startswith("text/event-stream")
        lines = [response.readline() for _ in range(3)]
    assert f"id: {newest}\n".encode() in lines
    with stream(served.path, **{"Last-Event-ID": "nix"}) as response:
        assert (response.status, json.loads(response.read())["code"]) == (400, "bad-request")


def test_client_continues_the_stream_after_a_restart_of_the_manager(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    with serve(tmp_path, world=world) as served:
        watcher = Watcher(served.client, 0)
        served.client.create(GOOD)
        before = watcher.until("started")
    with serve(tmp_path, world=world) as served:
        served.client.kill("one")
        after = watcher.until("stopped")
    assert not {event["id"] for event in before} & {event["id"] for event in after}


def test_client_without_an_event_yet_misses_none_after_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    with serve(tmp_path, world=world) as served:
        served.client.create(GOOD)
        watcher = Watcher(served.client)
        while not served.stream.watchers:
            time.sleep(0.02)
    with serve(tmp_path, world=world) as served:
        served.client.kill("one")  # before the watcher has come back
        assert watcher.until("stopped")[-1]["subject"] == "one"


def test_stream_of_a_tenant_has_only_its_own_events(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "tenants": {"acme": {}},
        "tokens": {"acme": {"hash": f"sha256:{hash_token('secret').hex()}", "role": "tenant", "tenant": "acme"}},
    }
    with serve(tmp_path, settings) as served:
        acme = Client(served.url, token="secret", ca=authority.file)
        watcher, everything = Watcher(acme, 0), Watcher(served.client, 0)
        served.client.create(GOOD)
        acme.create({**GOOD, "name": "hers"})
        assert {event["subject"] for event in watcher.until("started")} == {"hers"}
        assert {event["tenant"] for event in acme.events(0)} == {"acme"}
        acme.delete("hers")
        assert {event["subject"] for event in everything.until("deleted")} == {"one", "hers"}


def test_many_streams_need_no_threads(served: Served) -> None:
    before = threading.active_count()
    watchers = [Watcher(served.client) for _ in range(50)]
    time.sleep(1)
    deadline = time.monotonic() + 60
    while threading.active_count() - before > 50 + 3:  # the watchers' own threads, in this process
        assert time.monotonic() < deadline, "idle threads end"
        time.sleep(0.02)
    served.client.create(GOOD)
    for watcher in watchers:
        assert watcher.until("started")[-1]["subject"] == "one"


def test_stream_ends_when_its_client_disconnects(served: Served) -> None:
    with stream(served.path) as response:
        response.readline()
        assert served.stream.watchers == 1
    deadline = time.monotonic() + 60
    while served.stream.watchers:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_idle_stream_sends_heartbeats(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.stream, "heartbeat", 0.2)
    with stream(served.path) as response:
        lines = [response.readline() for _ in range(6)]
    assert lines.count(b": still here\n") >= 2


def test_streams_end_when_the_manager_stops(served: Served) -> None:
    with stream(served.path) as response:
        response.readline()
        begin = time.monotonic()
        served.server.should_exit = True
        response.read()  # to its proper end: an unfinished one raises IncompleteRead
        assert time.monotonic() - begin < 3


def test_events_are_returned_in_pages(served: Served) -> None:
    served.client.create(GOOD)
    served.client.delete("one")
    all_of_them = served.client.events(0)
    assert served.client.events(0, limit=2) == all_of_them[:2]
    assert served.client.events(all_of_them[1]["id"]) == all_of_them[2:]
    assert served.client.events(limit=2) == all_of_them[-2:]
    assert served.client.events(10**9) == []
    with pytest.raises(RequestError):
        served.client.events(0, limit=1001)


def test_many_events_are_sent_in_few_writes(served: Served) -> None:
    """The event loop has some work with each, and serves nobody else between those of one reading."""

    def read(_who: Identity, after: int | None, limit: int) -> list[Event]:
        first = (after or 0) + 1
        event = Event(0, time="", kind="started", subject="one", who="", detail="x" * 100, tenant="", took=None)
        return [replace(event, id=id) for id in range(first, min(first + limit, 1001))]

    async def collect() -> list[bytes]:
        pieces: list[bytes] = []
        log_stream = EventStream(served.manager.last_event, partial(served.manager.wait_events, MANAGER), read, Workers(1))
        async for piece in log_stream.follow(OPERATOR, 0):
            pieces.append(piece)
            if b"id: 1000\n" in piece:
                log_stream.close()
        return pieces

    pieces = asyncio.run(collect())
    ids = [int(line[4:]) for line in b"".join(pieces).splitlines() if line.startswith(b"id: ")]
    assert ids == list(range(1, 1001))
    assert len(pieces) < 20
    assert max(map(len, pieces)) < 64 << 10
