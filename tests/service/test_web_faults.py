"""The server of `nohype web` when the manager hangs, or breaks off a response."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.client import Client
from orchestrator.web import relay
from orchestrator.web import server as web_server
from orchestrator.web.server import WebServer
from tests.service.test_web import Answer, ask, open_session, run_server

Respond = Callable[[socket.socket], object]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@contextmanager
def run_manager(path: Path, respond: Respond) -> Iterator[list[socket.socket]]:
    """A program on a Unix socket that reads one request per connection, and calls ``respond``. Yields the open connections."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(100)
    held: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError):
            while b"\r\n\r\n" not in (data := connection.recv(65536)):
                if not data:
                    return
            respond(connection)

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            held.append(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield held
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in held:
            connection.close()


def hang(_connection: socket.socket) -> None:
    """The request is read, and never answered."""


def send(*parts: bytes, end: bool = True) -> Respond:
    def respond(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        if end:
            connection.shutdown(socket.SHUT_RDWR)

    return respond


def count_free(web: WebServer) -> int:
    """Of the places for connections."""
    free = 0
    while web.places.acquire(blocking=False):
        free += 1
    if free:
        web.places.release(free)
    return free


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PUT"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["no response", "no TLS handshake"])
def test_manager_that_hangs_is_504_and_gives_the_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, is_tls: bool
) -> None:
    monkeypatch.setattr(relay, "READ_SECONDS", 0.3)
    monkeypatch.setattr(relay, "CHANGE_SECONDS", 0.3)
    deaf = socket.create_server(("127.0.0.1", 0))
    where = f"https://127.0.0.1:{deaf.getsockname()[1]}" if is_tls else tmp_path / "socket"
    with run_manager(tmp_path / "socket", hang), deaf, run_server(Client(where)) as web:
        secret = open_session(web)
        answer = ask(web, method, "/v1/guests/web", Authorization=f"Bearer {secret}")
        assert answer.status == 504
        if method != "HEAD":
            assert b'"status": 504' in answer.content
            assert b"timed out" in answer.content
        assert until(lambda: count_free(web) == web_server.CONNECTIONS)


def test_manager_whose_queue_is_full_is_502_without_a_wait(tmp_path: Path) -> None:
    deaf, waiting = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with deaf, waiting:
        deaf.bind(str(tmp_path / "socket"))
        deaf.listen(0)
        waiting.connect(str(tmp_path / "socket"))
        with run_server(Client(tmp_path / "socket")) as web:
            answer = ask(web, "GET", "/v1/guests", Authorization=f"Bearer {open_session(web)}")
    assert answer.status == 502


def test_place_of_a_browser_that_has_gone_is_free_before_the_time_limit(tmp_path: Path) -> None:
    """A page repeats its requests: those that it has given up must not take all places while the manager hangs."""
    with run_manager(tmp_path / "socket", hang) as held, run_server(Client(tmp_path / "socket")) as web:
        secret = open_session(web)
        fields = {"Authorization": f"Bearer {secret}"}
        browsers = [http.client.HTTPConnection("127.0.0.1", web.server_port, timeout=60) for _ in range(web_server.CONNECTIONS)]
        for number, browser in enumerate(browsers):
            method, target = [("GET", "/v1/host"), ("POST", "/v1/guests/web/start"), ("GET", "/v1/events/stream")][number % 3]
            browser.request(method, target, headers=fields)
        assert until(lambda: len(held) == len(browsers))
        assert count_free(web) == 0
        for browser in browsers:
            browser.close()
        assert until(lambda: count_free(web) == web_server.CONNECTIONS, 10)
        assert ask(web, "GET", "/").status == 200


def test_place_of_a_stream_is_free_when_its_browser_has_gone(tmp_path: Path) -> None:
    respond = send(CHUNKED, b"5\r\nhello\r\n", end=False)  # and then silence
    with run_manager(tmp_path / "socket", respond), run_server(Client(tmp_path / "socket")) as web:
        browser = http.client.HTTPConnection("127.0.0.1", web.server_port, timeout=60)
        browser.request("GET", "/v1/events/stream", headers={"Authorization": f"Bearer {open_session(web)}"})
        assert browser.getresponse().read1() == b"hello"
        browser.close()
        assert until(lambda: count_free(web) == web_server.CONNECTIONS, 10)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((CHUNKED, b"5\r\nhello\r\n"), id="between chunks"),
        pytest.param((CHUNKED, b"5\r\nhel"), id="in a chunk"),
        pytest.param((CHUNKED, b"5\r\nhello\r\n5"), id="in the length of a chunk"),
        pytest.param((CHUNKED,), id="after the head"),
        pytest.param((HEAD + b"Content-Length: 9\r\n\r\n", b"hello"), id="shorter than its length"),
        pytest.param((HEAD + b"Content-Length: 9\r\n\r\n",), id="length without content"),
    ],
)
@pytest.mark.parametrize("end", [True, False], ids=["closed", "silent"])
def test_response_that_is_cut_off_does_not_look_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, ...], end: bool
) -> None:
    monkeypatch.setattr(web_server, "SILENCE_SECONDS", 0.3)
    with run_manager(tmp_path / "socket", send(*parts, end=end)), run_server(Client(tmp_path / "socket")) as web:
        secret = open_session(web)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            ask(web, "GET", "/v1/host", Authorization=f"Bearer {secret}")
        assert until(lambda: count_free(web) == web_server.CONNECTIONS)


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        pytest.param((CHUNKED, b"5\r\nhello\r\n", b"0\r\n\r\n"), b"hello", id="chunked"),
        pytest.param((CHUNKED, b"0\r\n\r\n"), b"", id="chunked and empty"),
        pytest.param((HEAD + b"Content-Length: 5\r\n\r\n", b"hello"), b"hello", id="with a length"),
        pytest.param((HEAD + b"Content-Length: 0\r\n\r\n",), b"", id="length 0"),
        pytest.param((b"HTTP/1.1 204 No Content\r\n\r\n",), b"", id="no content"),
        pytest.param((HEAD + b"Content-Length: 200000\r\n\r\n", b"x" * 200_000), b"x" * 200_000, id="large"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_complete_response_is_complete(tmp_path: Path, parts: tuple[bytes, ...], content: bytes, method: str) -> None:
    with run_manager(tmp_path / "socket", send(*(parts[:1] if method == "HEAD" else parts))):
        with run_server(Client(tmp_path / "socket")) as web:
            answer: Answer = ask(web, method, "/v1/host", Authorization=f"Bearer {open_session(web)}")
    assert answer.status in (200, 204)
    assert answer.content == (b"" if method == "HEAD" else content)


def test_program_that_cannot_tell_a_cut_is_refused(tmp_path: Path) -> None:
    """HTTP/1.0 has no chunks: the end of the connection would be the end of the response."""
    with run_manager(tmp_path / "socket", hang) as held, run_server(Client(tmp_path / "socket")) as web:
        head = f"GET /v1/host HTTP/1.0\r\nHost: 127.0.0.1:{web.server_port}\r\nAuthorization: Bearer {open_session(web)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", web.server_port), 60) as connection:
            connection.sendall(head.encode())
            assert b" 400 " in connection.recv(65536).partition(b"\r\n")[0]
        assert held == []
