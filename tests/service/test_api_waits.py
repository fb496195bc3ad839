"""Clients that wait, hang up, or do not read their answers: they take no place from others, and none from themselves for long."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.identity import hash_token
from orchestrator.api.limits import Kind
from orchestrator.client.client import Client
from orchestrator.guests.service import GuestService
from tests.harness.api_server import PROOF, Authority, Served, build_unverified_context, serve
from tests.harness.guests import until

PLACES = 4
TENANTS = ("acme", "bolt", "coil", "dent", "eels")
REQUEST = {"memory": "64M", "image": "minimal"}
WAITS = {
    "ready": ("GET", "/v1/guests/acme/ready?timeout=3600", None),
    "tell": ("POST", "/v1/guests/acme/tell", {"line": "mac", "timeout": 3600}),
    "stream": ("GET", "/v1/events/stream", None),
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Files of the CA, and of the manager's certificate and key."""
    made = Authority(tmp_path_factory.mktemp("ca"))
    return (made.file, *made.issue("manager", addresses=("127.0.0.1",)))


def settings(files: tuple[Path, Path, Path], places: int = PLACES) -> dict[str, Any]:
    tokens = {name: {"hash": f"sha256:{hash_token(name).hex()}", "role": "tenant", "tenant": name} for name in TENANTS}
    tokens["viewer"] = {"hash": f"sha256:{hash_token('viewer').hex()}", "role": "viewer"}
    return {
        "api": {"listen": "127.0.0.1:0", "certificate": str(files[1]), "key": str(files[2])},
        "tenants": {name: {} for name in TENANTS}, "tokens": tokens,
        "limits": {"rate": 1e6, "burst": 1_000_000, "concurrent": places},
    }  # fmt: skip


@pytest.fixture
def served(tmp_path: Path, authority: tuple[Path, Path, Path]) -> Iterator[Served]:
    with serve(tmp_path, settings(authority)) as served:
        yield served
        served.world.hypervisor.deaf.clear()


class Connection:
    """A connection of a tenant or viewer over TLS, or of root over the Unix socket."""

    def __init__(self, served: Served, who: str = "") -> None:
        self._who = who
        self._served = served
        if who:
            port = int(served.url.rpartition(":")[2])
            # An address of its own, as the connections of each are limited.
            source = f"127.0.0.{2 + len(who) + sum(who.encode()) % 200}"
            raw = socket.create_connection(("127.0.0.1", port), 20, source_address=(source, 0))
            self.socket: socket.socket = build_unverified_context().wrap_socket(raw)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(20)
            self.socket.connect(str(served.path))

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, method: str, target: str, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        fields = [f"{method} {target} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}"]
        fields += ["Content-Type: application/json"] if content else []
        fields += [f"Authorization: Bearer {self._who}"] if self._who else []
        self.socket.sendall("\r\n".join([*fields, "", ""]).encode() + content)

    def read(self) -> tuple[int, Any, dict[str, str]]:
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        content = response.read()
        return response.status, json.loads(content) if content else None, dict(response.getheaders())

    def ask(self, method: str, target: str, body: object = None) -> tuple[int, Any, dict[str, str]]:
        self.send(method, target, body)
        return self.read()


def ask(served: Served, who: str, method: str, target: str, body: object = None) -> tuple[int, Any, dict[str, str]]:
    with Connection(served, who) as connection:
        return connection.ask(method, target, body)


def make(served: Served, who: str) -> None:
    """A guest of the tenant, of the same name."""
    assert ask(served, who, "POST", "/v1/guests", {"name": who, **REQUEST})[0] == 201


def running(served: Served, client: str, kind: str) -> int:
    """Requests of the client that are in progress."""
    return served.server.config.app.limiter.count(client, Kind(kind))  # type: ignore[union-attr]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Future[str]]:
    """All waits at consoles that were begun."""
    begun: list[Future[str]] = []

    def record(begin: Callable[..., Future[str]]) -> Callable[..., Future[str]]:
        def begin_and_record(*arguments: Any) -> Future[str]:
            begun.append(future := begin(*arguments))
            return future

        return begin_and_record

    for name in ("begin_ready", "begin_command"):
        monkeypatch.setattr(GuestService, name, record(getattr(GuestService, name)))
    return begun


def count_waits(waits: list[Future[str]]) -> int:
    """Waits that have not ended."""
    return sum(not wait.done() for wait in waits)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("who", ["acme", ""])
def test_wait_ends_when_its_client_disconnects(served: Served, wait: str, who: str, waits: list[Future[str]]) -> None:
    """The tenant that the places are counted for, and root, whose are not."""
    make(served, "acme")
    for _ in range(3):
        with ExitStack() as held:
            for _ in range(PLACES):
                held.enter_context(Connection(served, who)).send(*WAITS[wait])
            if who:
                until(lambda: running(served, "tenant acme", "wait") == PLACES)
            if wait == "stream":
                until(lambda: served.stream.watchers == PLACES)
            else:
                until(lambda: count_waits(waits) == PLACES)
        until(lambda: running(served, "tenant acme", "wait") == 0)
        until(lambda: served.stream.watchers == 0 and count_waits(waits) == 0)
    until(lambda: "consoles" not in [thread.name for thread in threading.enumerate()])


@pytest.mark.parametrize("wait", WAITS)
def test_waits_at_the_limit_block_only_further_waits(served: Served, wait: str) -> None:
    make(served, "acme")
    with ExitStack() as held:
        waiting = [held.enter_context(Connection(served, "acme")) for _ in range(PLACES)]
        for one in waiting:
            one.send(*WAITS[wait])
        until(lambda: running(served, "tenant acme", "wait") == PLACES)
        for other in WAITS.values():
            status, problem, fields = ask(served, "acme", *other)
            assert (status, problem["code"]) == (429, "too-many")
            assert f"tenant acme has {PLACES} waiting requests, the limit" in problem["detail"]
            assert 3500 < problem["wait"] <= 3600, "the truth: they may wait an hour"
            assert int(fields["Retry-After".lower()]) >= 3500
        assert ask(served, "acme", "GET", "/v1/guests")[0] == 200
        waiting[0].socket.close()
        until(lambda: running(served, "tenant acme", "wait") < PLACES)
        assert ask(served, "acme", "GET", "/v1/guests/acme/ready?timeout=0.01")[0] == 409
        for method, target in (("POST", "stop"), ("POST", "start"), ("POST", "restart"), ("POST", "kill"), ("DELETE", "")):
            assert ask(served, "acme", method, f"/v1/guests/acme/{target}".rstrip("/"))[0] in (200, 204), target


def test_kill_is_accepted_while_other_requests_are_at_the_limit(served: Served) -> None:
    """Stops of a guest that does not hear its power button take as long as they are given, also without their clients."""
    make(served, "acme")
    served.world.hypervisor.deaf.add("acme")
    with ExitStack() as held:
        stops = [held.enter_context(Connection(served, "acme")) for _ in range(PLACES)]
        for one in stops:
            one.send("POST", "/v1/guests/acme/stop", {"timeout": 3000})
        until(lambda: running(served, "tenant acme", "other") == PLACES)
        status, problem, _ = ask(served, "acme", "GET", "/v1/guests")
        assert (status, problem["code"]) == (429, "too-many")
        assert 2900 < problem["wait"] <= 3030
        assert "kill and delete" in problem["hint"]
        assert ask(served, "", "GET", "/v1/guests/acme")[1]["state"] == "stopping"
        assert ask(served, "acme", "POST", "/v1/guests/acme/kill")[1]["state"] == "stopped"
        assert [one.read()[0] for one in stops] == [200] * PLACES
    assert ask(served, "acme", "DELETE", "/v1/guests/acme")[0] == 204


def test_kills_of_a_tenant_are_limited(
    tmp_path: Path, authority: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, settings(authority)) as served, ExitStack() as held:
        make(served, "acme")
        hangs = threading.Event()
        monkeypatch.setattr(served.manager, "kill", lambda *_: hangs.wait(30))
        for _ in range(PLACES):
            held.enter_context(Connection(served, "acme")).send("POST", "/v1/guests/acme/kill")
        until(lambda: running(served, "tenant acme", "end") == PLACES)
        status, problem, _ = ask(served, "acme", "DELETE", "/v1/guests/acme")
        assert (status, problem["code"], problem["wait"]) == (429, "too-many", 1.0)
        assert ask(served, "acme", "GET", "/v1/guests")[0] == 200
        hangs.set()


def test_tenant_at_its_limits_blocks_no_other_caller(tmp_path: Path, authority: tuple[Path, Path, Path]) -> None:
    """However many places they have: four tenants, 16 waits and 16 stops each, were all there was."""
    four, fifth = TENANTS[:4], TENANTS[4]
    with serve(tmp_path, settings(authority, 16)) as served, ExitStack() as held:
        for name in (*four, fifth):
            make(served, name)
        assert ask(served, "", "POST", "/v1/guests", {"name": "ours", **REQUEST})[0] == 201
        served.world.hypervisor.deaf.update(four)
        for name in four:
            for _ in range(16):
                held.enter_context(Connection(served, name)).send("GET", f"/v1/guests/{name}/ready?timeout=3600")
            until(lambda: running(served, f"tenant {name}", "wait") == 16)  # noqa: B023
            for _ in range(16):
                held.enter_context(Connection(served, name)).send("POST", f"/v1/guests/{name}/stop", {"timeout": 3600})
            until(lambda: running(served, f"tenant {name}", "other") == 16)  # noqa: B023
        for who, name in ((fifth, fifth), ("", "ours")):
            for method, target in (("POST", "restart"), ("POST", "stop"), ("POST", "start"), ("POST", "kill"), ("DELETE", "")):
                status, answer, _ = ask(served, who, method, f"/v1/guests/{name}/{target}".rstrip("/"))
                assert status in (200, 204), (who, target, answer)
        assert ask(served, "", "GET", "/v1/audit")[0] == 200
        for name in four:
            assert ask(served, "", "DELETE", f"/v1/guests/{name}")[0] == 204


def test_waits_of_root_block_no_other_request_of_root(served: Served, waits: list[Future[str]]) -> None:
    """It polls, and gives up after a while, again and again."""
    assert ask(served, "", "POST", "/v1/guests", {"name": "web", **REQUEST})[0] == 201
    with ExitStack() as held:
        for _ in range(100):
            held.enter_context(Connection(served)).send("GET", "/v1/guests/web/ready?timeout=3600")
        until(lambda: count_waits(waits) == 100)
        assert ask(served, "", "POST", "/v1/guests/web/stop", {"timeout": 5})[1]["state"] == "stopped"


def test_audit_without_its_client_holds_no_place(tmp_path: Path, authority: tuple[Path, Path, Path]) -> None:
    """It is measured to its end; and no more than two of a client at a time."""
    hangs, begun = threading.Event(), []

    def audit(_frames: int, **_: object) -> tuple[Any, ...]:
        begun.append(1)
        hangs.wait(30)
        return (PROOF,)

    with serve(tmp_path, settings(authority), audit=audit) as served:
        for _ in range(3):
            with ExitStack() as held:
                for _ in range(PLACES):
                    held.enter_context(Connection(served, "viewer")).send("GET", "/v1/audit")
                until(lambda: running(served, "viewer", "wait") == PLACES or running(served, "token viewer", "wait") == PLACES)
            until(lambda: not running(served, "viewer", "wait") and not running(served, "token viewer", "wait"))
        assert len(begun) == 2
        hangs.set()
        assert ask(served, "viewer", "GET", "/v1/audit")[0] == 200
        assert len(begun) == 3


def test_unread_responses_are_short(served: Served) -> None:
    make(served, "acme")
    served.world.hypervisor.write("acme", b"\xff" * (2 << 20))
    with ExitStack() as held:
        waiting = [held.enter_context(Connection(served, "acme")) for _ in range(50)]
        for one in waiting:
            one.send("GET", "/v1/guests/acme/ready?timeout=0.001")
            until(lambda: running(served, "tenant acme", "wait") == 0)
        for one in waiting:
            status, problem, fields = one.read()
            assert status in (409, 429)
            assert int(fields["content-length"]) < 6000
            assert "console output:" in problem["detail"] or status == 429


def test_wait_for_a_stopped_guest_is_refused(served: Served) -> None:
    client = Client(served.path)
    client.create({"name": "web", **REQUEST})
    served.world.hypervisor.write("web", b"nohype: ready name=web\n")
    assert client.wait_ready("web", 5) == "nohype: ready name=web"
    client.kill("web")
    status, problem, _ = ask(served, "", "GET", "/v1/guests/web/ready")
    assert (status, problem["code"]) == (404, "not-found")
    assert "is stopped" in problem["detail"]


def test_waits_end_when_the_manager_stops(tmp_path: Path, authority: tuple[Path, Path, Path], waits: list[Future[str]]) -> None:
    with ExitStack() as held:
        with serve(tmp_path, settings(authority)) as served:
            make(served, "acme")
            connection = held.enter_context(Connection(served, "acme"))
            connection.send("GET", "/v1/guests/acme/ready?timeout=3600")
            until(lambda: count_waits(waits) == 1)
            served.manager.close()
            status, problem, _ = connection.read()
            assert (status, problem["code"]) == (409, "guest")
            assert "the manager is being stopped" in problem["detail"]
