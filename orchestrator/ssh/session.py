"""A command or a shell on a host, connected to the input and output of this process."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paramiko

from orchestrator.ssh.login import Login
from orchestrator.ssh.transport import SIGNALLED, ConnectionLost, explain, keep_status

_CHUNK = 32768
_WINDOW = 2 << 20  # bytes that the host may send before they are taken
_POLL = 0.25
_SHORT_POLL = 0.02  # while input waits for room
_GRACE = 5.0

_LEAVE = b"~."


@dataclass(frozen=True)
class Screen:
    """A terminal on the host. ``read_size`` returns columns and rows of the user's terminal, which can change."""

    term: str
    read_size: Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Streams:
    """``input``: descriptor, None for no input. The others take bytes of the command's output; they may raise OSError."""

    input: int | None
    output: Callable[[bytes], object]
    errors: Callable[[bytes], object]


class LeftSession(Exception):
    """The user has typed `~.` at the beginning of a line, as in ssh(1)."""


def run_session(login: Login, command: str | None, streams: Streams, screen: Screen | None = None) -> int:
    """Runs a command line, or the user's shell if None; returns its exit status, 128 + n after signal n.

    Raises ConnectionLost and LeftSession.
    """
    channel = None
    try:
        channel = login.transport.open_session(window_size=_WINDOW, timeout=30)
        session = _Session(login, channel, streams, screen)
        session.start(command)
        return session.pump()
    except (paramiko.SSHException, EOFError) as error:
        raise ConnectionLost(f"connection to {login.target} lost: {explain(error)}") from None
    finally:
        if channel:
            channel.close()


class _Session:
    def __init__(self, login: Login, channel: paramiko.Channel, streams: Streams, screen: Screen | None) -> None:
        self._login, self._channel, self._streams, self._screen = login, channel, streams, screen
        self._size = screen.read_size() if screen else (0, 0)
        self._escape = _EscapeKeys() if screen else None
        self._input, self._pending, self._sent_end = streams.input, b"", False

    def start(self, command: str | None) -> None:
        if self._screen:
            self._channel.get_pty(self._screen.term, *self._size)
        if command is None:
            self._channel.invoke_shell()
        else:
            self._channel.exec_command(keep_status(command))

    def pump(self) -> int:
        while True:
            if not self._receive() and (self._channel.eof_received or self._channel.closed) and not self._receive():
                return self._read_status()
            if not self._login.transport.is_active():
                raise ConnectionLost(f"connection to {self._login.target} lost")
            self._wait()
            self._send()
            self._resize()

    def _wait(self) -> None:
        """Waits for output, or for input if there is room for it."""
        watched: list[Any] = [self._channel]
        if self._input is not None and not self._pending:
            watched.append(self._input)
        ready = select.select(watched, [], [], _SHORT_POLL if self._pending else _POLL)[0]
        if self._input is not None and self._input in ready:
            data = os.read(self._input, _CHUNK)
            if not data:
                self._input = None
            self._pending = self._escape.check(data) if self._escape else data

    def _send(self) -> None:
        try:
            while self._pending and self._channel.send_ready():
                self._pending = self._pending[self._channel.send(self._pending) :]
            if self._input is None and not self._pending and not self._sent_end:
                self._sent_end = True
                self._channel.shutdown_write()
        except OSError:
            # The command has closed its input, as `head` does: its output and status still come.
            self._input, self._pending, self._sent_end = None, b"", True

    def _receive(self) -> bool:
        moved = False
        if self._channel.recv_ready():
            self._streams.output(self._channel.recv(_CHUNK))
            moved = True
        if self._channel.recv_stderr_ready():
            self._streams.errors(self._channel.recv_stderr(_CHUNK))
            moved = True
        return moved

    def _resize(self) -> None:
        if self._screen and (size := self._screen.read_size()) != self._size:
            self._size = size
            self._channel.resize_pty(*size)

    def _read_status(self) -> int:
        # The status comes before the channel is closed, but perhaps after the end of the output.
        deadline = time.monotonic() + _GRACE
        while not self._channel.exit_status_ready() and not self._channel.closed and time.monotonic() < deadline:
            self._channel.status_event.wait(_POLL)
        if self._channel.exit_status >= 0:
            return self._channel.exit_status
        if self._login.transport.is_active():
            return SIGNALLED
        raise ConnectionLost(f"connection to {self._login.target} lost before the command's exit status was received")


class _EscapeKeys:
    """Finds `~.` at the beginning of a line. `~~` there is one `~`."""

    def __init__(self) -> None:
        self._begins_line, self._tilde = True, False

    def check(self, data: bytes) -> bytes:
        """The keys to send. Raises LeftSession."""
        sent = bytearray()
        for key in data:
            if self._tilde:
                self._tilde = False
                if key == _LEAVE[1]:
                    raise LeftSession
                if key != _LEAVE[0]:
                    sent.append(_LEAVE[0])
            elif self._begins_line and key == _LEAVE[0]:
                self._tilde = True
                continue
            sent.append(key)
            self._begins_line = key in b"\r\n"
        return bytes(sent)
