"""A small SSH server that runs commands on this machine; for tests of `ssh`, and the inside of the stand-in for QEMU.

It has terminals, forwards connections as a jump host does, and can offer SFTP (`tests.harness.sftp_server`).
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import termios
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

import paramiko


class Server(paramiko.ServerInterface):
    """Accepts one public key, and runs what it is told."""

    def __init__(self, authorized: str, users: Collection[str]) -> None:
        self._authorized, self._users = authorized, users
        self._terminals: dict[int, Pty] = {}
        self._destinations: dict[int, tuple[str, int]] = {}

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = f"{key.get_name()} {key.get_base64()}" == self._authorized
        return paramiko.common.AUTH_SUCCESSFUL if known and username in self._users else paramiko.common.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        pty = self._terminals.get(channel.get_id())
        work = (_execute, (channel, command)) if pty is None else (pty.run, (channel, ["bash", "-c", command.decode()]))
        threading.Thread(target=work[0], args=work[1], daemon=True).start()
        return True

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        pty = self._terminals.get(channel.get_id())
        if pty is None:
            return self.check_channel_exec_request(channel, b"bash -s")
        threading.Thread(target=pty.run, args=(channel, ["bash", "--norc", "--noprofile", "-i"]), daemon=True).start()
        return True

    def check_channel_pty_request(self, channel, term, width, height, pixelwidth, pixelheight, modes) -> bool:  # type: ignore[no-untyped-def]
        self._terminals[channel.get_id()] = Pty(term.decode(), width, height)
        return True

    def check_channel_window_change_request(self, channel, width, height, pixelwidth, pixelheight) -> bool:  # type: ignore[no-untyped-def]
        self._terminals[channel.get_id()].resize(width, height)
        return True

    def check_channel_direct_tcpip_request(self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]) -> int:
        try:
            connection = socket.create_connection(destination, 5)
        except OSError:
            return paramiko.common.OPEN_FAILED_CONNECT_FAILED
        threading.Thread(target=self._forward, args=(chanid, connection), daemon=True).start()
        return paramiko.common.OPEN_SUCCEEDED

    transport: paramiko.Transport

    def _forward(self, chanid: int, connection: socket.socket) -> None:
        while (channel := self.transport.accept(10)) and channel.get_id() != chanid:
            pass
        if channel is None:
            return

        def pump(read: Callable[[int], bytes], write: Callable[[bytes], object]) -> None:
            with contextlib.suppress(OSError):
                while data := read(32768):
                    write(data)
            channel.close()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=pump, args=(channel.recv, connection.sendall), daemon=True).start()
        pump(connection.recv, channel.sendall)


@dataclass
class Pty:
    """A terminal of a session."""

    term: str
    width: int
    height: int

    def __post_init__(self) -> None:
        self._ours, self._theirs = os.openpty()
        self.resize(self.width, self.height)

    def resize(self, width: int, height: int) -> None:
        termios.tcsetwinsize(self._ours, (height, width))

    def run(self, channel: paramiko.Channel, words: list[str]) -> None:
        process = subprocess.Popen(
            words, stdin=self._theirs, stdout=self._theirs, stderr=self._theirs, start_new_session=True,
            env={**os.environ, "TERM": self.term, "PS1": "ready$ "},
        )  # fmt: skip
        os.close(self._theirs)

        def type_input() -> None:
            with contextlib.suppress(OSError):
                while data := channel.recv(32768):
                    os.write(self._ours, data)

        threading.Thread(target=type_input, daemon=True).start()
        with contextlib.suppress(OSError):  # EIO at the end of the process
            while data := os.read(self._ours, 32768):
                channel.sendall(data)
        if (status := process.wait()) >= 0:
            channel.send_exit_status(status)
        channel.close()


def serve(
    listener: socket.socket,
    host_key: str,
    authorized: str,
    prepare: Callable[[paramiko.Transport], object] = lambda _: None,
    users: Collection[str] = ("root",),
) -> None:
    """Serves connections for ever.

    Args:
        host_key: private key in OpenSSH's format.
        authorized: the public key that may come in, ``ssh-ed25519 AAAA...``.
        prepare: gets each connection before it is served.
        users: the names to log in with.
    """
    key = paramiko.Ed25519Key.from_private_key(io.StringIO(host_key))
    kept = []
    while True:
        connection, _ = listener.accept()
        transport = paramiko.Transport(connection)
        transport.add_server_key(key)
        prepare(transport)
        server = Server(authorized, users)
        server.transport = transport
        transport.start_server(event=threading.Event(), server=server)
        kept.append(transport)


def _execute(channel: paramiko.Channel, command: bytes) -> None:
    # The other side sends input, or its end, when it has been told that the command was accepted. paramiko tells it only after
    # check_channel_exec_request: a quick command could be over before that.
    begin = channel.recv(32768)
    process = subprocess.Popen(
        ["bash", "-c", command.decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    threading.Thread(target=_feed, args=(channel, process.stdin, begin), daemon=True).start()
    pumps = [
        threading.Thread(target=_drain, args=(stream, send))
        for stream, send in ((process.stdout, channel.sendall), (process.stderr, channel.sendall_stderr))
    ]
    for pump in pumps:
        pump.start()
    for pump in pumps:
        pump.join()
    status = process.wait()
    if status >= 0:
        channel.send_exit_status(status)
    channel.close()


def _feed(channel: paramiko.Channel, stream, data: bytes) -> None:
    try:
        while data:
            stream.write(data)
            stream.flush()
            data = channel.recv(32768)
        stream.close()
    except OSError:
        pass


def _drain(stream, send) -> None:
    try:
        while data := stream.read1(32768):
            send(data)
    except OSError:
        pass
