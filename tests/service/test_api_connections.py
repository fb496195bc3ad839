"""Connections: fair shares of them, what a client may send on one, and answers that are read late or not at all."""

from __future__ import annotations

import asyncio.sslproto
import contextlib
import gc
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.api import accept, guard, outgoing
from orchestrator.api import connection as api_connection
from orchestrator.api import server as api_server
from orchestrator.api import shares as api_shares
from orchestrator.api.identity import hash_token
from orchestrator.client.client import Client
from tests.harness.api_server import Authority, Served, open_to_all, send, serve

GOOD = {"name": "one", "memory": "64M", "image": "minimal"}
TOKEN = "viewer-token"
HOLD = """
import os, socket, sys
uid, path, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
os.chdir(os.path.dirname(path))
os.setgroups([]), os.setgid(uid), os.setuid(uid)
held = []
for _ in range(count):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(os.path.basename(path))
print("held", flush=True)
sys.stdin.read()
"""
ASK = """
import os, socket, sys
uid, path = int(sys.argv[1]), sys.argv[2]
os.chdir(os.path.dirname(path))
os.setgroups([]), os.setgid(uid), os.setuid(uid)
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(20)
    connection.connect(os.path.basename(path))
    connection.sendall(b"GET /v1/version HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    print(connection.recv(100).split()[1].decode())
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, metrics=lambda: (b"x" * 6_000_000, "text/plain; version=0.0.4; charset=utf-8")) as served:
        yield served


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[Served, ssl.SSLContext]]:
    """With a TLS port and a viewer's token; and what a client needs."""
    certificate, key = (authority := Authority(tmp_path)).issue("manager", addresses=("127.0.0.1",))
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "tokens": {"look": {"hash": f"sha256:{hash_token(TOKEN).hex()}", "role": "viewer"}},
        "limits": {"rate": 1e6, "burst": 1_000_000},
    }
    with serve(
        tmp_path, settings, metrics=lambda: (b"x" * 100_000 + b"end", "text/plain; version=0.0.4; charset=utf-8")
    ) as served:
        yield served, ssl.create_default_context(cafile=authority.file)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dial(served: Served, *, source: str = "127.0.0.1", room: int = 0) -> socket.socket:
    raw = socket.socket()
    if room:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    raw.settimeout(20)
    raw.bind((source, 0))
    raw.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
    return raw


def connections(served: Served) -> int:
    return len(served.server.server_state.connections)


def count_places(served: Served, listener: int) -> int:
    return len(served.server.servers[listener].shares)  # type: ignore[attr-defined]


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 20):
            answer += part
    return answer


# Shares.


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
@pytest.mark.parametrize("holders", [{11: 1, 12: 9, 13: 9, 14: 9, 15: 9}, {0: 40}, {0: 40, 11: 40, 12: 40}], ids=str)
def test_idle_connections_lock_out_no_other_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holders: dict[int, int]
) -> None:
    """Nor do those of users without a role, who need only reach the socket."""
    monkeypatch.setattr(api_server, "MAX_CONNECTIONS_PER_CLIENT", 8)
    monkeypatch.setattr(api_server, "MAX_CONNECTIONS", 24)
    monkeypatch.setattr(api_shares, "SETTLED_SECONDS", 0.0)
    settings = {
        "tenants": {"acme": {"users": ["12", "21"]}, "bolt": {"users": ["22"]}},
        "access": {"operators": {"users": ["23"]}},
    }
    with serve(tmp_path, settings) as served, ExitStack() as held:
        open_to_all(served.path)
        for uid, count in holders.items():
            words = [sys.executable, "-c", HOLD, str(uid), str(served.path), str(count)]
            process = held.enter_context(
                subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
        wait_for(lambda: count_places(served, 0) == min(24, sum(min(8, count) for count in holders.values())))
        for uid, status in ((21, "200"), (22, "200"), (23, "200"), (0, "200"), (24, "403")):
            for _ in range(3):
                done = subprocess.run(
                    [sys.executable, "-c", ASK, str(uid), str(served.path)], capture_output=True, text=True, cwd="/"
                )
                assert done.stdout == f"{status}\n", done.stderr
        assert count_places(served, 0) <= 24


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes before the fixture that starts the server."""
    monkeypatch.setattr(api_server, "MAX_CONNECTIONS_PER_CLIENT", 4)
    monkeypatch.setattr(api_server, "MAX_CONNECTIONS", 12)


@pytest.mark.usefixtures("few_places")
def test_unfinished_handshakes_are_counted_and_closed_first(tls: tuple[Served, ssl.SSLContext]) -> None:
    """Connections on which nothing was sent yet, of many addresses, with none that is through its handshake."""
    served, context = tls
    with ExitStack() as held:
        for number in range(40):
            held.enter_context(dial(served, source=f"127.0.0.{2 + number % 5}"))
        wait_for(lambda: count_places(served, 1) == 12)
        assert connections(served) == 0
        for source in ("127.0.0.2", "127.0.0.9"):
            with context.wrap_socket(dial(served, source=source), server_hostname="127.0.0.1") as one:
                one.sendall(b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert one.recv(100).startswith(b"HTTP/1.1 401")
        assert served.client.version()
    wait_for(lambda: count_places(served, 1) == 0)


def test_failed_handshake_frees_its_place_and_logs_nothing(
    tls: tuple[Served, ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    served, _ = tls
    with caplog.at_level(logging.INFO):
        for first in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x80" * 5000):
            for _ in range(20):
                with dial(served) as raw:
                    raw.sendall(first)
                    if first:
                        read_all(raw)
        wait_for(lambda: count_places(served, 1) == 0)
    assert caplog.records == []


def test_request_sent_with_the_end_of_the_handshake_is_answered(tls: tuple[Served, ssl.SSLContext]) -> None:
    """Before the manager has made a protocol for the connection."""
    served, context = tls
    incoming, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, out, server_hostname="127.0.0.1")
    with dial(served) as raw:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.sendall(out.read())
                incoming.write(raw.recv(65536))
        client.write(b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        raw.sendall(out.read())  # the end of the handshake and the request, in one
        answer = b""
        while not answer:
            incoming.write(raw.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = client.read(65536)
    assert answer.startswith(b"HTTP/1.1 401")


def test_place_is_released_however_the_connection_ends(served: Served) -> None:
    for request in (b"", b"GET", b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n", b"nix\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(served.path))
            connection.sendall(request)
    wait_for(lambda: count_places(served, 0) == 0)


# What a client may send.


def test_upgrade_is_answered_as_a_plain_request(tls: tuple[Served, ssl.SSLContext], caplog: pytest.LogCaptureFixture) -> None:
    served, context = tls
    fields = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    with caplog.at_level(logging.INFO), context.wrap_socket(dial(served), server_hostname="127.0.0.1") as one:
        for path in (b"/v1/version", b"/"):
            for upgrade in (fields, fields.replace(b"websocket", b"h2c"), fields.replace(b"websocket", b"TLS/1.0, x")):
                one.sendall(b"GET " + path + b" HTTP/1.1\r\n" + upgrade + b"\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    assert (part := one.recv(65536))
                    answer += part
                assert answer.startswith(b"HTTP/1.1 401")
    assert caplog.records == []


TOO_MUCH = {
    "many fields": b"GET /v1/version HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 40_000 + b"\r\n",
    "102 fields": b"GET /v1/version HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n",
    "a long field": b"GET /v1/version HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000 + b"\r\n\r\n",
    "a long field in many lines": b"GET /v1/version HTTP/1.1\r\nHost: x\r\nX: " + b"\r\n a" * 1000 + b"\r\n\r\n",
    "a long target": b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a head that never ends": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000,
}


@pytest.mark.parametrize("request_", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_head_above_a_limit_is_refused(served: Served, request_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, which h11 itself does not bound; none of it is parsed."""
    answer = send(served.path, request_)
    problem = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert answer.startswith(b"HTTP/1.1 400")
    assert (problem["code"], "request refused: its head" in problem["detail"]) == ("bad-request", True)


def test_head_with_90_fields_is_accepted(served: Served) -> None:
    head = b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + b"a: b\r\n" * 90 + b"\r\n"
    assert send(served.path, head).startswith(b"HTTP/1.1 200")


def test_body_of_too_many_chunks_is_refused(served: Served) -> None:
    head = b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    text = json.dumps(GOOD).encode()

    def chunked(size: int, spaces: int) -> bytes:
        body = b" " * spaces + text
        return b"".join(b"%x\r\n%b\r\n" % (len(part := body[at : at + size]), part) for at in range(0, len(body), size))

    def ask(body: bytes) -> bytes:
        return send(served.path, head.replace(b"Host: x", b"Host: x\r\nConnection: close") + body)

    assert ask(chunked(1, 800) + b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert b"more than 1000 chunks" in ask(chunked(1, 1000) + b"0\r\n\r\n")
    assert ask(chunked(100, 50_000) + b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert ask(chunked(10, 0) + b"0\r\n" + b"a: b\r\n" * 20_000).startswith(b"HTTP/1.1 400"), "trailers"
    # One connection after the other request: each counts anew.
    twice = head + chunked(1, 800) + b"0\r\n\r\n"
    assert send(served.path, twice + twice.replace(b"Host: x", b"Host: x\r\nConnection: close")).count(b"HTTP/1.1 200") == 2


def test_parser_gets_at_most_a_slice_at_a_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second of two requests that come together would be parsed in one go, however long it is."""
    longest = 0
    receive = api_connection.Parser.receive_data

    def watch(parser: api_connection.Parser, data: bytes) -> None:
        nonlocal longest
        receive(parser, data)
        longest = max(longest, len(parser.trailing_data[0]))

    monkeypatch.setattr(api_connection.Parser, "receive_data", watch)
    one = b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = send(served.path, one * 3000 + one.replace(b"Host: x", b"Host: x\r\nConnection: close"))
    assert answer.count(b"HTTP/1.1 200") == 3001
    assert longest <= 3 * (16 << 10)


@pytest.mark.parametrize("body", [b"x" * 70_000, b""])
def test_rest_of_a_refused_body_is_read_until_a_timeout(served: Served, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(api_connection, "LINGER_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(served.path))
        connection.sendall(b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n" + body)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert len(answer) < 1000


def test_too_many_requests_is_answered_with_a_delay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "REFUSAL_DELAY", 0.3)
    request = b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with serve(tmp_path, {"tenants": {"acme": {}}, "limits": {"rate": 0.001, "burst": 1}}) as served:
        monkeypatch.setattr(guard, "identify", lambda *_: guard.Identity("alice", guard.Role.TENANT, "acme"))
        assert send(served.path, request).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        answer = send(served.path, request)
        assert answer.startswith(b"HTTP/1.1 429")
        assert time.monotonic() - began >= 0.3


# One half closed.


def half_close(served: Served, request: bytes) -> bytes:
    """As `nc -N` does."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(served.path))
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def test_half_closed_connection_is_answered(served: Served) -> None:
    look = b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n"
    assert half_close(served, look).startswith(b"HTTP/1.1 200")
    body = json.dumps(GOOD).encode()
    create = b"POST /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert half_close(served, create + body).startswith(b"HTTP/1.1 201")
    assert half_close(served, look * 5).count(b"HTTP/1.1 200") == 5, "one after the other"
    assert half_close(served, look.replace(b"1.1", b"1.0")).startswith(b"HTTP/1.1 200")
    for half in (b"", look[:-5], create + body[:-3]):
        assert half_close(served, half) == b""
    assert len(half_close(served, look.replace(b"version", b"metrics"))) > 6_000_000, "an answer longer than the kernel takes"
    served.client.delete("one")


def test_disconnect_after_half_close_ends_the_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for such a client would keep its place."""
    monkeypatch.setattr(api_connection, "POLL_INTERVAL", 0.05)
    half_closed = threading.Event()
    receive = api_connection.PeerConnection.eof_received

    def watch(connection: api_connection.PeerConnection) -> bool:
        goes_on = receive(connection)
        half_closed.set()
        return goes_on

    monkeypatch.setattr(api_connection.PeerConnection, "eof_received", watch)
    served.client.create(GOOD)
    wait = b"GET /v1/guests/one/ready?timeout=3600 HTTP/1.1\r\nHost: x\r\n\r\n"
    for half_first in (True, False):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(served.path))
            connection.sendall(wait)
            wait_for(lambda: connections(served) == 1)
            if half_first:
                connection.shutdown(socket.SHUT_WR)
                assert half_closed.wait(20)
        wait_for(lambda: connections(served) == 0)
    served.client.delete("one")


def waiting(served: Served) -> bool:
    """Whether a console is waited for."""
    return any(thread.name == "consoles" for thread in threading.enumerate())


def send_until_paused(served: Served, connection: socket.socket, request: bytes) -> None:
    """Sends requests until the server stops reading.

    The first may arrive before the handler of the wait asks uvicorn for the end of the connection, which resumes reading.
    """

    def is_paused() -> bool:
        if any(one.flow.read_paused for one in served.server.server_state.connections):  # type: ignore[union-attr]
            return True
        connection.sendall(request)
        return False

    wait_for(is_paused)


def test_disconnect_with_a_pending_request_ends_the_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads nothing while the next request waits, and so does not see the end."""
    monkeypatch.setattr(api_connection, "POLL_INTERVAL", 0.05)
    served.client.create(GOOD)
    wait = b"GET /v1/guests/one/ready?timeout=3600 HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(served.path))
        connection.sendall(wait)
        wait_for(lambda: waiting(served))
        send_until_paused(served, connection, wait)
    wait_for(lambda: connections(served) == 0)
    served.client.delete("one")


def test_tls_disconnect_with_a_pending_request_ends_the_wait(
    tls: tuple[Served, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_connection, "POLL_INTERVAL", 0.05)
    served, context = tls
    served.client.create(GOOD)
    wait = f"GET /v1/guests/one/ready?timeout=3600 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    with dial(served) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        connection.sendall(wait)
        wait_for(lambda: waiting(served))
        send_until_paused(served, connection, wait)
    wait_for(lambda: not any(one.scheme == "https" for one in served.server.server_state.connections))  # type: ignore[union-attr]
    served.client.delete("one")


def test_tls_buffers_of_a_lost_connection_are_freed_immediately(tls: tuple[Served, ssl.SSLContext]) -> None:
    """It has a buffer of 256 KB; what waits for a garbage collection is held by each of very many connections."""
    served, context = tls

    def count() -> int:
        return sum(isinstance(one, asyncio.sslproto.SSLProtocol) for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = count()
        for _ in range(5):
            with dial(served) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
                connection.sendall(b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        wait_for(lambda: count() <= before)
    finally:
        gc.enable()


# Answers that are read late, or not at all.


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_client_that_reads_late_gets_the_whole_response(
    tls: tuple[Served, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, close: bytes
) -> None:
    """After the time for the next request is over, and that for TLS's goodbye. The kernel takes only a small part of it."""
    served, context = tls
    served.server.listeners[1].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    served.server.config.timeout_keep_alive = 0.05  # type: ignore[assignment]
    monkeypatch.setattr(accept, "TLS_CLOSE_TIMEOUT", 0.05)
    looked = threading.Event()
    looks = 0

    def count(handler: Callable[[object], object]) -> Callable[[object], object]:
        def counted(one: object) -> object:
            nonlocal looks
            looks += 1
            if looks > 30:
                looked.set()
            return handler(one)

        return counted

    handler = count(api_connection.PeerConnection.timeout_keep_alive_handler)  # type: ignore[arg-type]
    monkeypatch.setattr(api_connection.PeerConnection, "timeout_keep_alive_handler", handler)
    unread = count(outgoing.Outgoing.unread.fget)  # type: ignore[attr-defined]
    monkeypatch.setattr(outgoing.Outgoing, "unread", property(unread))
    with context.wrap_socket(dial(served, room=4096), server_hostname="127.0.0.1") as one:
        one.sendall(b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n" + close + b"\r\n")
        assert looked.wait(20)
        answer = b""
        while not answer.endswith(b"end"):
            assert (part := one.recv(65536)), "it was cut off"
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert len(body) == 100_003


@pytest.mark.parametrize("request_", [b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\n", b"GET /v1/metrics HTTP/1.0\r\n"])
def test_client_that_does_not_read_is_disconnected(served: Served, monkeypatch: pytest.MonkeyPatch, request_: bytes) -> None:
    monkeypatch.setattr(outgoing, "WINDOW_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(served.path))
        connection.sendall(request_ + b"\r\n")
        wait_for(lambda: connections(served) == 1)
        wait_for(lambda: connections(served) == 0)
        assert len(read_all(connection)) < 6_000_000


def test_client_that_reads_slowly_gets_the_whole_response(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "WINDOW_SECONDS", 0.5)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(served.path))
        connection.sendall(b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := connection.recv(200_000):
            answer += part
            time.sleep(0.03)
    assert len(answer) > 6_000_000


def record_places(monkeypatch: pytest.MonkeyPatch) -> set[api_shares.Place]:
    """Places of all connections from now on whose responses are too long for one piece."""
    places: set[api_shares.Place] = set()
    hold = api_shares.Shares.hold

    def record(shares: api_shares.Shares, place: api_shares.Place, size: int) -> None:
        places.add(place)
        hold(shares, place, size)

    monkeypatch.setattr(api_shares.Shares, "hold", record)
    return places


def test_unread_responses_of_one_user_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_shares, "MAX_HELD", 20_000_000)
    places = record_places(monkeypatch)

    def count() -> int:
        return sum(place.held > 5_000_000 for place in places)

    with ExitStack() as held:
        for expected in (1, 2, 3, 3, 3, 3):
            connection = held.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(served.path))
            connection.sendall(b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_for(lambda expected=expected: connections(served) == expected == count())
        assert served.client.version()


def test_long_response_is_sent_in_pieces(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    places = record_places(monkeypatch)
    assert len(Client(served.path).metrics()) == 6_000_000
    wait_for(lambda: places and not any(place.held for place in places))
