"""The console of a guest over the API: live and earlier output, input, several readers, and who may do what."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from orchestrator.api.identity import hash_token
from orchestrator.client import Client
from orchestrator.client.console import ConsoleOutput
from orchestrator.errors import Forbidden, GuestError, NotFound, OrchestratorError, RequestError, TooMany
from orchestrator.hypervisor.connection import EndCause
from orchestrator.model.access import OPERATOR
from tests.harness.api_server import Authority, Served, send, serve
from tests.harness.crash import World
from tests.harness.guests import until

GOOD = {"name": "web", "memory": "64M", "image": "minimal"}


@contextmanager
def ending_readers(served: Served) -> Iterator[None]:
    """A reader connects again until its guest has ended: at the end of the block all guests are killed."""
    try:
        yield
    finally:
        for guest in served.client.guests():
            if guest["state"] == "running":
                served.client.kill(guest["name"])
        while Reader.threads:
            thread = Reader.threads.pop()
            thread.join(60)
            assert not thread.is_alive(), "the reader has not noticed that its guest has ended"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served, ending_readers(served):
        served.world.hypervisor.watch_ends(served.manager.reconciler.on_guest_ended)
        served.client.create(GOOD)
        yield served


@pytest.fixture
def tenants(tmp_path: Path) -> Iterator[tuple[Served, Callable[[str], Client]]]:
    """A manager with tenants, and their clients by name."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    tokens = {
        name: {
            "hash": f"sha256:{hash_token(f'secret-of-{name}').hex()}",
            "role": role,
            **({"tenant": name} if role == "tenant" else {}),
        }
        for name, role in (("acme", "tenant"), ("bolt", "tenant"), ("eve", "viewer"))
    }
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "tenants": {"acme": {}, "bolt": {}}, "tokens": tokens, "limits": {"rate": 1000.0, "burst": 1000},
    }  # fmt: skip
    with serve(tmp_path, settings) as served, ending_readers(served):
        yield served, lambda name: Client(served.url, token=f"secret-of-{name}", ca=authority.file)


class Reader:
    """Reads a console in a thread until its guest ends."""

    threads: ClassVar[list[threading.Thread]] = []

    def __init__(self, client: Client, lines: int = 0, name: str = "web") -> None:
        self.data, self.skipped, self.uuid, self.error = b"", False, "", ""
        self._changed = threading.Condition()
        self._output = client.read_console(name, lines)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.threads.append(self.thread)
        self.thread.start()

    def _read(self) -> None:
        try:
            for part in self._output:
                with self._changed:
                    self.data, self.uuid = self.data + part.data, part.uuid
                    self.skipped |= part.may_have_skipped
                    self._changed.notify_all()
        except OrchestratorError as error:
            self.error = error.message

    def until(self, text: bytes, seconds: float = 20) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.data[-len(text) - 100 :], seconds), self.data[-300:]


@contextmanager
def raw_pty(world: World, name: str = "web") -> Iterator[int]:
    """The guest's side of its console, as QEMU sets it up: without echo and line editing."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    world.hypervisor.ptys[name] = Path(os.ttyname(theirs))
    try:
        yield ours
    finally:
        os.close(theirs)
        with contextlib.suppress(OSError):
            os.close(ours)


@contextmanager
def open_stream(path: Path, query: str = "", headers: str = "") -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(f"GET /v1/guests/web/console{query} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
        yield connection


def read_parts(client: Client, lines: int = 0, *, follow: bool = True) -> list[ConsoleOutput]:
    return list(client.read_console("web", lines, follow=follow))


# Output.


def test_reader_gets_earlier_lines_and_then_live_output(served: Served) -> None:
    served.world.hypervisor.write("web", b"one\r\ntwo\r\nthree\r\n")
    reader = Reader(served.client, 2)
    reader.until(b"three\r\n")
    served.world.hypervisor.write("web", b"\x1b[31mlive \xff\0 bytes\r\n")
    reader.until(b"bytes\r\n")
    assert reader.data == b"two\r\nthree\r\n\x1b[31mlive \xff\0 bytes\r\n"
    assert reader.uuid == str(served.manager.guest(OPERATOR, "web").plan.uuid)


@pytest.mark.parametrize("size", [0, 5, 100_000, 3_000_000])
def test_earlier_output_alone_ends(served: Served, size: int) -> None:
    served.world.hypervisor.write("web", b"x" * size)
    data = b"".join(part.data for part in read_parts(served.client, 10, follow=False))
    assert data == b"x" * min(size, 1 << 20)


@pytest.mark.parametrize("end", ["stop", "kill", "by itself"])
def test_reader_gets_the_last_output_and_the_reason_of_the_end(served: Served, end: str) -> None:
    reader = Reader(served.client)
    until(lambda: served.readers == 1)
    served.world.hypervisor.write("web", b"first\n")
    reader.until(b"first\n")
    served.world.hypervisor.write("web", b"x" * 200_000 + b"last\n")
    if end == "by itself":
        served.world.hypervisor.end("web", EndCause.POWERED_OFF)
    else:
        getattr(served.client, end)("web")
    reader.thread.join(20)
    assert reader.error == "guest web has ended"
    assert reader.data.endswith(b"xlast\n")


def test_reader_of_a_deleted_guest_learns_that_it_was_replaced(served: Served) -> None:
    reader = Reader(served.client)
    until(lambda: served.readers == 1)
    served.world.hypervisor.write("web", b"first\n")
    reader.until(b"first\n")
    served.client.delete("web")
    served.client.create(GOOD)
    served.world.hypervisor.write("web", b"secret of the second\n")
    reader.thread.join(20)
    assert reader.error == "guest web ended or was replaced during the request"
    assert reader.data == b"first\n"


def test_console_of_a_stopped_guest_is_its_last_output(served: Served) -> None:
    served.world.hypervisor.write("web", b"kernel panic\n")
    served.client.kill("web")
    assert b"".join(part.data for part in read_parts(served.client, 5, follow=False)) == b"kernel panic\n"
    parts = served.client.read_console("web", 5)
    assert [next(parts).data, next(parts).data] == [b"", b"kernel panic\n"]
    with pytest.raises(NotFound, match="guest web is stopped"):
        list(parts)


def test_console_of_a_deleted_guest_is_not_found(served: Served) -> None:
    uuid = str(served.manager.guest(OPERATOR, "web").plan.uuid)
    served.client.delete("web")
    for ask in (lambda: read_parts(served.client), lambda: served.client.type_console("web", uuid, b"x")):
        with pytest.raises(NotFound, match="no guest named web"):
            ask()


def test_reader_continues_after_a_restart_of_the_manager(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    with serve(tmp_path, world=world) as served:
        served.client.create(GOOD)
        reader = Reader(served.client)
        until(lambda: served.readers == 1)
        world.hypervisor.write("web", b"one ")
        reader.until(b"one ")
    world.hypervisor.write("web", b"two ")
    with serve(tmp_path, world=world) as served, ending_readers(served):
        world.hypervisor.write("web", b"three ")
        reader.until(b"three ")
        assert reader.data == b"one two three "
        assert not reader.skipped


def test_position_of_another_guest_is_refused(served: Served) -> None:
    for text, status in (("6f1c64e2-6a4a-5d3c-9f5d-0c3f6f1f3a55.1.1.1", b"404"), ("nonsense", b"400")):
        with open_stream(served.path, headers=f"Last-Event-ID: {text}\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("query", ["?lines=-1", "?lines=100001", "?lines=x", "?follow=yes", "?history=1"])
def test_wrong_queries_are_refused(served: Served, query: str) -> None:
    with open_stream(served.path, query) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_head_of_a_console_ends(served: Served) -> None:
    """And the connection can be used for the next request."""
    for name, status in (("web", b"200"), ("nix", b"404")):
        request = f"HEAD /v1/guests/{name}/console HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        answer = send(served.path, request + b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.endswith(b'"}')
    assert served.readers == 0


# Input.


def test_input_reaches_the_guest_unchanged(served: Served) -> None:
    with raw_pty(served.world) as guest:
        uuid = first_uuid(served.client)
        everything = bytes(range(256)) + "ä\n".encode()
        assert served.client.type_console("web", uuid, everything) == len(everything)
        assert os.read(guest, 1000) == everything
        assert served.client.type_console("web", uuid, b"again") == 5
        assert os.read(guest, 1000) == b"again"


def test_output_is_not_held_up_while_the_console_is_open_for_input(served: Served) -> None:
    """The pty holds 4 KB, and QEMU waits for room."""
    with raw_pty(served.world) as guest:
        served.client.type_console("web", first_uuid(served.client), b"x")
        written = 0
        deadline = time.monotonic() + 20
        os.set_blocking(guest, False)
        while written < 100_000 and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                written += os.write(guest, b"y" * 1000)
        assert written >= 100_000


def test_guest_that_reads_nothing_takes_a_part(served: Served) -> None:
    with raw_pty(served.world):
        uuid = first_uuid(served.client)
        counts = [served.client.type_console("web", uuid, b"x" * 4096) for _ in range(8)]
        assert counts[-1] == 0
        assert 0 < sum(counts) < 8 * 4096


def test_input_for_another_guest_of_the_name_is_refused(served: Served) -> None:
    uuid = first_uuid(served.client)
    served.client.delete("web")
    served.client.create(GOOD)
    with raw_pty(served.world) as guest:
        with pytest.raises(NotFound, match="guest web ended or was replaced"):
            served.client.type_console("web", uuid, b"rm -rf /\n")
        os.set_blocking(guest, False)
        with pytest.raises(BlockingIOError):
            os.read(guest, 10)


def test_input_is_refused_after_the_end_and_accepted_after_a_start(served: Served) -> None:
    uuid = first_uuid(served.client)
    with raw_pty(served.world) as guest:
        served.client.type_console("web", uuid, b"one")
        assert os.read(guest, 10) == b"one"
    served.client.kill("web")
    with pytest.raises(NotFound, match="guest web is stopped"):
        served.client.type_console("web", uuid, b"two")
    served.client.start("web")
    with raw_pty(served.world) as guest:
        assert served.client.type_console("web", uuid, b"three") == 5
        assert os.read(guest, 10) == b"three"


def test_console_that_cannot_be_opened_is_a_clear_error(served: Served) -> None:
    served.world.hypervisor.ptys["web"] = Path("/nonexistent/pts")
    with pytest.raises(GuestError, match="cannot open the console /nonexistent/pts of guest web: No such file or directory"):
        served.client.type_console("web", first_uuid(served.client), b"x")


def test_silent_guest_can_be_typed_on(served: Served) -> None:
    uuid = next(served.client.read_console("web")).uuid
    with raw_pty(served.world) as guest:
        served.client.type_console("web", uuid, b"x")
        assert os.read(guest, 10) == b"x"


@pytest.mark.parametrize("data", [b"", b"x" * 4097])
def test_wrong_sizes_of_input_are_refused(served: Served, data: bytes) -> None:
    with pytest.raises(RequestError, match="data"):
        served.client.type_console("web", first_uuid(served.client), data)


def first_uuid(client: Client) -> str:
    return read_parts(client, follow=False)[0].uuid


# Who.


def test_console_of_another_tenant_is_not_found(tenants: tuple[Served, Callable[[str], Client]]) -> None:
    served, client_of = tenants
    client_of("acme").create(GOOD)
    served.world.hypervisor.write("web", b"password of acme\n")
    uuid = first_uuid(client_of("acme"))
    for ask in (lambda: read_parts(client_of("bolt"), 9), lambda: client_of("bolt").type_console("web", uuid, b"x")):
        with pytest.raises(NotFound, match="no guest named web"):
            ask()
    with raw_pty(served.world) as guest:
        client_of("acme").type_console("web", uuid, b"hers")
        assert os.read(guest, 10) == b"hers"


def test_viewer_reads_but_does_not_type(tenants: tuple[Served, Callable[[str], Client]]) -> None:
    served, client_of = tenants
    client_of("acme").create(GOOD)
    served.world.hypervisor.write("web", b"output\n")
    parts = read_parts(client_of("eve"), 9, follow=False)
    assert b"".join(part.data for part in parts) == b"output\n"
    with pytest.raises(Forbidden, match="read-only role viewer"):
        client_of("eve").type_console("web", parts[0].uuid, b"x")


def test_readers_of_a_tenant_are_limited(tenants: tuple[Served, Callable[[str], Client]]) -> None:
    served, client_of = tenants
    client_of("acme").create(GOOD)
    for _ in range(16):
        Reader(client_of("acme"))
    until(lambda: served.readers == 16)
    with pytest.raises(TooMany, match="16 waiting requests, the limit"):
        read_parts(client_of("acme"))
    assert client_of("acme").guest("web")["state"] == "running", "other requests are not limited by them"


# Many, and slow.


def test_many_readers_get_the_same_output(served: Served) -> None:
    readers = [Reader(served.client) for _ in range(50)]
    text = b"".join(b"line %d\n" % number for number in range(2000))
    until(lambda: served.readers == 50)
    served.world.hypervisor.write("web", text)
    for reader in readers:
        reader.until(b"line 1999\n")
        assert reader.data == text


def test_flooding_guest_and_stuck_readers_hold_up_no_one(served: Served) -> None:
    """Fifty readers that read nothing, one that reads, and a guest that prints 4 MB without an end of line."""
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(open_stream(served.path)) for _ in range(50)]
        for connection in stuck:
            assert connection.recv(12) == b"HTTP/1.1 200"
        reader = Reader(served.client)
        until(lambda: served.readers == 51)
        served.world.hypervisor.write("web", b"begin")
        reader.until(b"begin")
        for _ in range(16):
            served.world.hypervisor.write("web", b"x" * 262_144)
            assert served.client.guest("web")["state"] == "running"
        served.world.hypervisor.write("web", b"end")
        reader.until(b"end", 60)
        assert len(reader.data) == 8 + 16 * 262_144
        served.client.kill("web")


def test_readers_that_disconnect_are_forgotten(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(open_stream(served.path))
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert any(thread.name == "consoles" for thread in threading.enumerate())
    until(lambda: not any(thread.name == "consoles" for thread in threading.enumerate()))


def test_reader_that_disconnects_before_the_response_leaves_nothing(served: Served) -> None:
    stream = served.manager.begin_reading(OPERATOR, "web", 10)
    follow = served.consoles.follow(stream, OPERATOR)
    del follow, stream
    assert served.readers == 0
    assert not any(thread.name == "consoles" for thread in threading.enumerate())


def test_stopping_server_ends_the_readers(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        served.client.create(GOOD)
        with open_stream(served.path) as connection:
            connection.recv(12)
            begun = time.monotonic()
            served.server.should_exit = True
            while connection.recv(4096):
                pass
            assert time.monotonic() - begun < 4, "it does not wait for the time-out of open requests"


def test_parts_are_server_sent_events(served: Served) -> None:
    served.world.hypervisor.write("web", b"hello\n")
    with open_stream(served.path, "?lines=1&follow=false", "Connection: close\r\n") as connection:
        text = b""
        while piece := connection.recv(4096):
            text += piece
    (data,) = [line for line in text.decode().splitlines() if line.startswith("data: ")][1:2]
    part = json.loads(data[6:])
    assert base64.b64decode(part["output"]) == b"hello\n"
    assert f"id: {part['position']}\r\n" in text.decode() or f"id: {part['position']}\n" in text.decode()
    assert part["problem"] is None
