"""A small SSH server that runs commands on this machine; for tests of `shell`, and the inside of the stand-in for QEMU."""

from __future__ import annotations

import io
import socket
import subprocess
import threading

import paramiko


class Server(paramiko.ServerInterface):
    """Accepts one public key, and runs what it is told."""

    def __init__(self, authorized: str) -> None:
        self._authorized = authorized

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = f"{key.get_name()} {key.get_base64()}" == self._authorized
        return paramiko.common.AUTH_SUCCESSFUL if known and username == "root" else paramiko.common.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=_execute, args=(channel, command), daemon=True).start()
        return True


def serve(listener: socket.socket, host_key: str, authorized: str) -> None:
    """Serves connections for ever.

    Args:
        host_key: private key in OpenSSH's format.
        authorized: the public key that may come in, ``ssh-ed25519 AAAA...``.
    """
    key = paramiko.Ed25519Key.from_private_key(io.StringIO(host_key))
    kept = []
    while True:
        connection, _ = listener.accept()
        transport = paramiko.Transport(connection)
        transport.add_server_key(key)
        transport.start_server(event=threading.Event(), server=Server(authorized))
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
