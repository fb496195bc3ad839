"""The client's kept connections: used again, but no change is made twice when one is lost."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from orchestrator.api.identity import hash_token
from orchestrator.client import kept
from orchestrator.client.client import Client
from orchestrator.client.transport import TlsConnection, Unreachable
from orchestrator.errors import NotFound
from tests.harness.api_server import Authority, Served, serve
from tests.service.test_api_client import GUEST

TOKEN = "operator-token-0123456789"


def build_answer(status: str, content: object) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


ANSWERS = {
    "GET": build_answer("200 OK", {"version": "1"}),
    "POST": build_answer("201 Created", GUEST),
    "DELETE": b"HTTP/1.1 204 No Content\r\n\r\n",
}


@dataclass
class Fake:
    """A manager that answers the first request of each connection, and then does what the test chooses.

    Attributes:
        end: with a connection whose first request was answered; gets the next request if it reads it.
        seen: the methods of the requests that it has read.
        connections: how many were made.
    """

    path: Path
    end: Callable[[Fake, socket.socket], object]
    seen: list[str] = field(default_factory=list)
    connections: int = 0

    def read(self, connection: socket.socket) -> str:
        data = b""
        while b"\r\n\r\n" not in data:
            part = connection.recv(65536)
            if not part:
                raise ConnectionError
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        self.seen.append(head.split(b" ")[0].decode())
        return self.seen[-1]

    def serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(ANSWERS[self.read(connection)])
                self.end(self, connection)
            except OSError:
                pass


@contextmanager
def faking(folder: Path, end: Callable[[Fake, socket.socket], object]) -> Iterator[Fake]:
    fake = Fake(folder / "fake.sock", end)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(fake.path))
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                fake.connections += 1
                threading.Thread(target=fake.serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield fake
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def end_after_reading(fake: Fake, connection: socket.socket) -> None:
    """As a manager that is killed while it executes the request."""
    fake.read(connection)


def close_unread(_fake: Fake, connection: socket.socket) -> None:
    """As a manager that closes an idle connection in the moment in which the next request arrives."""
    connection.recv(1, socket.MSG_PEEK)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


def count_connections(served: Served) -> int:
    return sum(len(server.shares) for server in served.server.servers)  # type: ignore[attr-defined]


def test_requests_share_a_connection(served: Served) -> None:
    client = Client(served.path)
    for _ in range(5):
        client.version()
        assert client.guests() == []
        with pytest.raises(NotFound):
            client.guest("web")
    assert count_connections(served) == 1
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: client.version(), range(100)))) == 1
    assert 1 <= count_connections(served) <= 8


def test_connections_are_closed_with_the_client(served: Served) -> None:
    client = Client(served.path)
    client.version()
    del client
    deadline = time.monotonic() + 60
    while count_connections(served):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_connection_of_a_manager_that_was_restarted_is_not_used(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        client = Client(served.path)
        client.version()
        world = served.world
    with serve(tmp_path, world=world) as served:
        with pytest.raises(NotFound):
            client.delete("web")
        assert count_connections(served) == 1


def test_connection_is_not_used_after_some_seconds(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager may be closing it at that moment."""
    monkeypatch.setattr(kept, "MAX_IDLE", -1.0)
    client = Client(served.path)
    for _ in range(3):
        client.version()
    deadline = time.monotonic() + 60
    while count_connections(served):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_change_that_may_have_been_made_is_not_repeated(tmp_path: Path) -> None:
    with faking(tmp_path, end_after_reading) as fake:
        client = Client(fake.path)
        client.version()
        with pytest.raises(Unreachable):
            client.delete("web")
        assert fake.seen == ["GET", "DELETE"]


@pytest.mark.parametrize("request_id", [None, "order-1"])
def test_creation_is_repeated_only_with_an_id(tmp_path: Path, request_id: str | None) -> None:
    with faking(tmp_path, end_after_reading) as fake:
        client = Client(fake.path)
        client.version()
        if request_id:
            assert client.create({"name": "web", "id": request_id})["name"] == "web"
            assert fake.seen == ["GET", "POST", "POST"]
        else:
            with pytest.raises(Unreachable):
                client.create({"name": "web"})
            assert fake.seen == ["GET", "POST"]


def test_read_is_repeated(tmp_path: Path) -> None:
    with faking(tmp_path, end_after_reading) as fake:
        client = Client(fake.path)
        assert [client.version() for _ in range(3)] == ["1"] * 3
        assert fake.seen == ["GET"] * 5


def test_change_that_was_not_read_is_sent_again(tmp_path: Path) -> None:
    with faking(tmp_path, close_unread) as fake:
        client = Client(fake.path)
        for _ in range(3):
            client.delete("web")
        assert fake.seen == ["DELETE"] * 3
        assert fake.connections == 3


def test_change_over_tls_gets_its_own_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS does not tell whether the manager has read a request."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "tokens": {"root": {"hash": f"sha256:{hash_token(TOKEN).hex()}", "role": "operator"}},
    }
    connect, made = TlsConnection.connect, Counter[int]()
    monkeypatch.setattr(TlsConnection, "connect", lambda self: made.update([self.port]) or connect(self))
    with serve(tmp_path, settings) as served:
        client = Client(served.url, token=TOKEN, ca=authority.file)
        port = urlsplit(served.url).port or 0  # clients of earlier tests may still connect to others
        for _ in range(5):
            client.guests()
        assert made[port] == 1
        for _ in range(2):
            with pytest.raises(NotFound):
                client.delete("web")
        assert made[port] == 3


def test_process_that_was_forked_has_its_own_connections(served: Served) -> None:
    client = Client(served.path)
    client.version()
    child = os.fork()
    if not child:
        os._exit(0 if client.version() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert client.version()
