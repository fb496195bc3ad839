"""SSH connections to hosts whose key is known, and what `login` and `shell` share about them."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from orchestrator.errors import ShellError

# Without a handler, paramiko's messages go to stderr. The relevant ones are in the errors of this package.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

FAILURES = (paramiko.SSHException, OSError, EOFError)
"""What paramiko raises if a connection fails."""

SIGNALLED = 128 + 9
"""The status of a command whose host sent none, as a shell reports SIGKILL."""

_KEEPALIVE = 15
# Algorithms with which a server proves that it has a key of this type.
_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}


@dataclass(frozen=True)
class HostKey:
    """The public key of a host, `TYPE BASE64`."""

    text: str

    @property
    def algorithms(self) -> tuple[str, ...]:
        kind = self.text.partition(" ")[0]
        return _ALGORITHMS.get(kind, (kind,))


class WrongHostKey(ShellError):
    """The message continues a sentence that begins with the host."""


class ConnectionLost(ShellError):
    """The connection ended before the work on it."""


def explain(error: BaseException) -> str:
    return str(error) or type(error).__name__


def keep_status(line: str) -> str:
    """Without a second line the shell replaces itself by the command, and a signal does not become a status."""
    return f"{line}\nexit $?"


def open_transport(
    stream: socket.socket | paramiko.Channel,
    host_key: HostKey,
    authenticate: Callable[[paramiko.Transport], object],
    *,
    timeout: float,
) -> paramiko.Transport:
    """A connection to a host that has proved its key, after ``authenticate``.

    Raises FAILURES, WrongHostKey, ShellError for a type of key that is not supported, and what ``authenticate`` raises.
    """
    transport = paramiko.Transport(stream)
    try:
        transport.banner_timeout = transport.auth_timeout = transport.handshake_timeout = timeout
        try:
            # No other type may be negotiated than that of the expected key.
            transport.get_security_options().key_types = host_key.algorithms
        except ValueError:
            raise ShellError(f"host keys of the type {host_key.text.partition(' ')[0]} are not supported") from None
        try:
            transport.start_client(timeout=timeout)
        except IncompatiblePeer as error:
            raise WrongHostKey(f"has no key of the expected type: {error}") from None
        shown = transport.get_remote_server_key()
        text = f"{shown.get_name()} {shown.get_base64()}"
        if text != host_key.text:
            raise WrongHostKey(f"presented the host key {text}, expected {host_key.text}")
        authenticate(transport)
        transport.set_keepalive(_KEEPALIVE)
    except BaseException:
        transport.close()
        raise
    return transport


def end_when_silent(transport: paramiko.Transport, *, every: float = 15.0, silence: float = 60.0) -> None:
    """Closes the connection in another thread, when the host has not answered a request for ``silence`` seconds.

    A host that has gone sends no reset, and TCP alone gives up after a quarter of an hour. ``every``: seconds between requests.
    """
    pause = threading.Event()

    def ask() -> None:
        timer = threading.Timer(silence, transport.close)
        timer.daemon = True
        timer.start()
        with suppress(*FAILURES):
            transport.global_request("keepalive@openssh.com", wait=True)  # a refusal is an answer too (RFC 4254 4)
        timer.cancel()

    def watch() -> None:
        while transport.is_active():
            ask()
            pause.wait(every)

    threading.Thread(target=watch, name="ssh-alive", daemon=True).start()


def dial(host: str, port: int, timeout: float) -> socket.socket:
    """A TCP connection to a server that has sent its first bytes. Raises OSError."""
    connection = socket.create_connection((host, port), timeout)
    try:
        # QEMU's port forward accepts connections before a server listens in the guest: wait for the server's first bytes.
        connection.settimeout(timeout)
        if not connection.recv(4, socket.MSG_PEEK):
            raise ConnectionRefusedError(0, "the connection was closed immediately")
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection
