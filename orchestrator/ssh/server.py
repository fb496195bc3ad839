"""A small SSH server for one user and one key, which runs no shell: each command is given to a function."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EBADF, EINVAL
from pathlib import Path

import paramiko

from orchestrator.ssh.shell import Completed
from orchestrator.ssh.transport import keep_status

RunCommand = Callable[[str], Completed]
"""The line that the client has sent → status and output."""

MAX_CONNECTIONS = 16
"""Each has a thread and a descriptor."""
_PAUSE = 0.2


class _Server(paramiko.ServerInterface):
    def __init__(self, client: str, run: RunCommand) -> None:
        self._client, self._run = client, run

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = username == "root" and f"{key.get_name()} {key.get_base64()}" == self._client
        return paramiko.common.AUTH_SUCCESSFUL if known else paramiko.common.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED if kind == "session" else paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._execute, args=(channel, command), daemon=True).start()
        return True

    def _execute(self, channel: paramiko.Channel, command: bytes) -> None:
        # Input, or its end, comes only after the client was told that the command was accepted, which is after this thread began.
        with suppress(OSError, EOFError, paramiko.SSHException):
            channel.recv(1)
            done = self._run(command.decode(errors="replace").removesuffix(keep_status("")))
            channel.sendall(done.stdout.encode())
            channel.sendall_stderr(done.stderr.encode())
            channel.send_exit_status(done.status)
        channel.close()


def serve(listener: socket.socket, host_key: Path, client: str, run: RunCommand) -> None:
    """Until the listener is shut down.

    Args:
        host_key: file of the private key (Ed25519).
        client: the public key with which root may log in, ``ssh-ed25519 AAAA...``.
    """
    key = paramiko.Ed25519Key.from_private_key_file(str(host_key))
    transports: list[paramiko.Transport] = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in (EBADF, EINVAL):
                return
            time.sleep(_PAUSE)  # too many open files, for example; or the client has gone
            continue
        transports = _make_room([one for one in transports if one.is_active()])
        transport = paramiko.Transport(connection)
        transports.append(transport)
        transport.add_server_key(key)
        # Without an event it waits for the whole negotiation: a silent client would hold up the others.
        transport.start_server(event=threading.Event(), server=_Server(client, run))


def _make_room(transports: list[paramiko.Transport]) -> list[paramiko.Transport]:
    """Closes the oldest connection if there are many, first of clients that have not logged in."""
    if len(transports) < MAX_CONNECTIONS:
        return transports
    oldest = next((one for one in transports if not one.is_authenticated()), transports[0])
    oldest.close()
    return [one for one in transports if one is not oldest]
