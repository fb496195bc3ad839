"""Runs commands and copies files over SSH, to hosts with a known key.

A failed command is a result with its exit status; only a failed connection is an error.
"""

from __future__ import annotations

import os
import select
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from orchestrator.errors import ShellError
from orchestrator.ssh.transport import FAILURES, SIGNALLED, HostKey, WrongHostKey, dial, explain, keep_status, open_transport

Stream = Callable[[str, bytes], None]

_CHUNK = 32768
_GRACE = 2.0
_POLL = 0.2


class KeyRefused(ShellError):
    """The server does not accept the private key."""


class NotStarted(ShellError):
    """The connection was lost before the command was sent: it can be sent over a new one."""


class ShellTimeout(ShellError):
    """A command timed out and was stopped. The connection can still be used."""

    code = "shell-timeout"


@dataclass(frozen=True)
class Completed:
    status: int  # 128 + n: ended by signal n
    stdout: str
    stderr: str


class _StreamFailed(Exception):
    """The caller's `stream` raised OSError, which must not be mistaken for an error of the connection."""


class Shell:
    def __init__(self, transport: paramiko.Transport, where: str) -> None:
        self._transport = transport
        self._where = where

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    @property
    def is_open(self) -> bool:
        return self._transport.is_active()

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = 60,
        input: bytes | IO[bytes] = b"",
        stream: Stream | None = None,
    ) -> Completed:
        """Runs a command; stops it on a timeout or an interrupt.

        Args:
            command: a line for the remote shell, or words, which are quoted.
            timeout: seconds, None for no limit.
            stream: receives "stdout" or "stderr" and each piece of output; the result then has no output.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        try:
            channel = self._transport.open_session(timeout=30)
        except FAILURES as error:
            raise NotStarted(self._lost(line, error).message) from None
        try:
            channel.exec_command(keep_status(line))
        except FAILURES as error:
            raise self._lost(line, error) from None
        pump = _Pump(channel, input, stream)
        try:
            pump.run(timeout)
            status = self._status(channel, line)
        except TimeoutError:
            self._cancel(channel)
            raise ShellTimeout(f"`{_short(line)}` on {self._where} timed out after {timeout:g} s{pump.tail()}") from None
        except FAILURES as error:
            raise self._lost(line, error) from None
        except BaseException as error:
            self._cancel(channel)
            raise (error.__cause__ if isinstance(error, _StreamFailed) and error.__cause__ else error) from None
        finally:
            channel.close()
        return Completed(status, pump.text("stdout"), pump.text("stderr"))

    def put(self, local: Path, remote: str, *, mode: int = 0o644, timeout: float = 300) -> None:
        """Copies a file. The remote name exists only when the copy is complete."""
        fresh = f"{remote}.new"
        quoted, target = shlex.quote(fresh), shlex.quote(remote)
        with local.open("rb") as file:
            done = self.run(f"cat > {quoted} && chmod {mode:o} {quoted} && mv {quoted} {target}", timeout=timeout, input=file)
        if done.status:
            raise ShellError(f"cannot write {remote} on {self._where}: {done.stderr.strip()}")

    def _status(self, channel: paramiko.Channel, line: str) -> int:
        # The status arrives before the channel is closed. Without it, the shell was killed or the connection was lost.
        channel.status_event.wait(_GRACE if channel.closed else 30)
        if channel.exit_status >= 0:
            return channel.exit_status
        if self._transport.is_active():
            return SIGNALLED
        raise self._lost(line, self._transport.get_exception())

    def _lost(self, line: str, error: Exception | None) -> ShellError:
        why = f": {explain(error)}" if error else ""
        return ShellError(f"connection to {self._where} lost or refused during `{_short(line)}`{why}")

    def _cancel(self, channel: paramiko.Channel) -> None:
        """Signals the command's process group (RFC 4254 6.9): sshd does not do this when a channel without a terminal closes."""
        with suppress(Exception):
            for name in ("TERM", "KILL"):
                message = paramiko.Message()
                message.add_byte(cMSG_CHANNEL_REQUEST)
                message.add_int(channel.remote_chanid)
                message.add_string("signal")
                message.add_boolean(b=False)  # no reply requested
                message.add_string(name)
                self._transport._send_user_message(message)  # type: ignore[attr-defined]
                if channel.status_event.wait(_GRACE) or channel.closed:
                    return


class _Pump:
    """Transfers a command's input and output until both streams are closed."""

    def __init__(self, channel: paramiko.Channel, input: bytes | IO[bytes], stream: Stream | None) -> None:
        self._channel, self._input, self._stream = channel, input, stream
        self._kept: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self._pending = b""
        self._sending = True
        self._waiting: int | None = None  # the descriptor of the input while it has nothing yet

    def run(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._send()
            moved = self._receive()
            if not moved and (self._channel.eof_received or self._channel.closed) and not self._receive():
                return
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            if not moved:
                # Readable with data on either stream and at the end; the timeout is for input and deadline.
                watched: list[Any] = [self._channel] if self._waiting is None else [self._channel, self._waiting]
                select.select(watched, [], [], 0.01 if self._sending and self._waiting is None else _POLL)

    def text(self, name: str) -> str:
        return b"".join(self._kept[name]).decode(errors="replace")

    def tail(self) -> str:
        lines = (self.text("stdout") + self.text("stderr")).strip().splitlines()[-8:]
        return "".join(f"\n    {line}" for line in lines)

    def _send(self) -> None:
        while self._sending and self._channel.send_ready():
            if not self._pending:
                chunk = self._next_chunk()
                if chunk is None:
                    return
                self._pending = chunk
            if not self._pending or self._channel.closed:
                self._sending = False
                self._channel.shutdown_write()
                return
            self._pending = self._pending[self._channel.send(self._pending) :]

    def _next_chunk(self) -> bytes | None:
        """Empty at the end of the input, None if a pipe or terminal has nothing yet: output and deadline must not wait for it."""
        if isinstance(self._input, bytes):
            chunk, self._input = self._input[:_CHUNK], self._input[_CHUNK:]
            return chunk
        try:
            descriptor = self._input.fileno()
        except OSError:  # in memory
            return self._input.read(_CHUNK)
        ready = select.select([descriptor], [], [], 0)[0]
        self._waiting = None if ready else descriptor
        return os.read(descriptor, _CHUNK) if ready else None

    def _receive(self) -> bool:
        moved = False
        for name, ready, receive in (
            ("stdout", self._channel.recv_ready, self._channel.recv),
            ("stderr", self._channel.recv_stderr_ready, self._channel.recv_stderr),
        ):
            while ready():
                moved = True
                data = receive(_CHUNK)
                if self._stream:
                    try:
                        self._stream(name, data)
                    except OSError as error:
                        raise _StreamFailed from error
                else:
                    self._kept[name].append(data)
        return moved


def connect(
    host: str,
    port: int,
    *,
    user: str = "root",
    key: Path,
    host_key: str,
    timeout: float = 30,
    banner_timeout: float | None = None,
) -> Shell:
    """Opens a connection; raises WrongHostKey, KeyRefused, or another ShellError.

    Args:
        key: private key (ed25519, OpenSSH format).
        host_key: the expected public key of the host, `ssh-ed25519 AAAA...`.
        timeout: seconds for the whole connection.
        banner_timeout: seconds until the server must respond; shorter than `timeout` while waiting for a server to start.
    """
    where = f"{user}@{host}:{port}"
    try:
        connection = dial(host, port, banner_timeout or timeout)
    except OSError as error:
        raise ShellError(f"no SSH server responds at {host}:{port}: {error.strerror or error}") from None
    try:
        transport = open_transport(
            connection, HostKey(" ".join(host_key.split()[:2])),
            lambda opened: opened.auth_publickey(user, paramiko.Ed25519Key.from_private_key_file(str(key))), timeout=timeout,
        )  # fmt: skip
    except WrongHostKey as error:
        raise WrongHostKey(f"{where} {error.message}") from None
    except paramiko.AuthenticationException as error:
        raise KeyRefused(f"{where} does not accept the key {key}: {error}") from None
    except FAILURES as error:
        raise ShellError(f"cannot open an SSH connection to {where}: {explain(error)}") from None
    return Shell(transport, where)


def _short(line: str) -> str:
    return line if len(line) <= 80 else line[:77] + "..."
