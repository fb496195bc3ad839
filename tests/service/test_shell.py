"""SSH connections, against a server in this process that really runs the commands."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko
import pytest

from orchestrator.errors import ShellError
from orchestrator.lab.keys import KeyPair, make_key
from orchestrator.ssh import Shell, ShellTimeout, connect
from orchestrator.ssh.transport import HostKey, end_when_silent, open_transport
from orchestrator.waiting import wait_until
from tests.harness.ssh_server import serve

pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class Place:
    """Where the server listens, and the keys of both sides."""

    port: int
    key: Path
    host: KeyPair

    def connect(self, **options: object) -> Shell:
        return connect("127.0.0.1", self.port, **{"key": self.key, "host_key": self.host.public, "timeout": 20, **options})  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    client, host = make_key(), make_key()
    key = tmp_path / "key"
    key.write_bytes(client.private)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, host.private.decode(), client.public), daemon=True).start()
        yield Place(listener.getsockname()[1], key, host)


@pytest.fixture
def shell(place: Place) -> Iterator[Shell]:
    with place.connect() as connection:
        yield connection


def test_status_and_both_streams_come_back(shell: Shell) -> None:
    done = shell.run("echo out; echo err >&2; exit 7")
    assert (done.status, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_words_are_taken_as_they_are(shell: Shell) -> None:
    assert shell.run(["printf", "%s|", "a b", "$HOME", "it's", ""]).stdout == "a b|$HOME|it's||"


def test_a_command_that_a_signal_ends_has_the_status_that_a_shell_gives(shell: Shell) -> None:
    assert shell.run(["sh", "-c", "kill -TERM $$"]).status == 128 + 15


def test_much_goes_both_ways_at_once(shell: Shell) -> None:
    # More than a channel's window either way: whoever waits for one side before it looks at the other waits for ever.
    data = os.urandom(6 << 20)
    digest = hashlib.sha256()
    done = shell.run("cat", input=data, stream=lambda name, piece: digest.update(piece), timeout=50)
    assert done.status == 0
    assert digest.digest() == hashlib.sha256(data).digest()


def test_output_is_streamed_while_the_command_runs(shell: Shell) -> None:
    seen: list[tuple[float, bytes]] = []
    shell.run("echo one; sleep 1; echo two", stream=lambda name, piece: seen.append((time.monotonic(), piece)))
    assert [piece for _, piece in seen] == [b"one\n", b"two\n"]
    assert seen[1][0] - seen[0][0] > 0.5


def test_a_stream_that_cannot_be_written_is_no_lost_connection(shell: Shell) -> None:
    def closed(name: str, piece: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        shell.run("echo x", stream=closed)


def test_a_command_that_takes_too_long_is_ended_and_says_what_it_printed(shell: Shell) -> None:
    with pytest.raises(ShellTimeout, match="(?s)timed out after 2 s.*so far"):
        shell.run("echo so far; sleep 60", timeout=2)
    assert shell.run("echo sound").stdout == "sound\n"


def test_files_are_copied_whole(shell: Shell, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "it's a target"
    source.write_bytes(os.urandom(100_000))
    shell.put(source, str(target), mode=0o750)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o750
    assert not list(tmp_path.glob("*.new"))
    with pytest.raises(ShellError, match="cannot write /nonexistent/x on root@127.0.0.1"):
        shell.put(source, "/nonexistent/x")


def test_another_host_key_is_refused(place: Place) -> None:
    with pytest.raises(ShellError, match="presented the host key ssh-ed25519"):
        place.connect(host_key=make_key().public)


def test_a_key_that_is_not_accepted_is_an_error(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(make_key().private)
    with pytest.raises(ShellError, match=f"does not accept the key {other}"):
        place.connect(key=other)


def test_nobody_who_listens_or_answers_is_an_error(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ShellError, match="no SSH server responds"):
            connect("127.0.0.1", port, key=place.key, host_key=place.host.public, banner_timeout=0.5)
    with pytest.raises(ShellError, match="no SSH server responds.*refused"):
        connect("127.0.0.1", port, key=place.key, host_key=place.host.public)


def test_a_connection_that_is_lost_is_no_result(place: Place) -> None:
    shell = place.connect()
    threading.Timer(1, shell.close).start()
    with pytest.raises(ShellError, match="lost or refused during `sleep 30`"):
        shell.run("sleep 30")
    with pytest.raises(ShellError, match="lost or refused"):
        shell.run("true")


class Line:
    """A network between client and server, which can be cut without any of them noticing."""

    def __init__(self, port: int) -> None:
        self.is_cut = threading.Event()
        self.asked = 0  # pieces from the client
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._server = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        client = self._listener.accept()[0]
        threading.Thread(target=self._carry, args=(self._server, client), daemon=True).start()
        while data := self._carry_piece(client, self._server):
            self.asked += len(data) > 0

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        while self._carry_piece(source, target):
            pass

    def _carry_piece(self, source: socket.socket, target: socket.socket) -> bytes:
        try:
            data = source.recv(1 << 16)
            if not self.is_cut.is_set():
                target.sendall(data)
        except OSError:
            return b""
        return data


def test_connection_without_answers_ends(place: Place) -> None:
    line = Line(place.port)
    host_key, key = HostKey(place.host.public.strip()), paramiko.Ed25519Key.from_private_key_file(str(place.key))
    stream = socket.create_connection(("127.0.0.1", line.port))
    transport = open_transport(stream, host_key, lambda opened: opened.auth_publickey("root", key), timeout=20)
    try:
        end_when_silent(transport, every=0.01, silence=5)
        before = line.asked
        assert wait_until(lambda: line.asked > before + 10, timeout=30, interval=0.01)
        assert transport.is_active(), "it answers"
        line.is_cut.set()
        assert wait_until(lambda: not transport.is_active(), timeout=40, interval=0.1)
    finally:
        transport.close()
