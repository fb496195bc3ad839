"""Waits until a guest is ready, in the way in which its image reports it."""

from __future__ import annotations

import socket
import time

from orchestrator.client import Client, shapes
from orchestrator.errors import GuestError, NotFound, ReadyBySsh

SSH_PORT = 22
_PAUSE = 1.0
_CONNECT_SECONDS = 5.0


def wait_ready(client: Client, name: str, seconds: float) -> str:
    """The line with which the guest reported ready, or the greeting of its SSH server.

    The SSH server is contacted from this machine: the manager does not connect to guests. Raises what `Client.wait_ready` raises.
    """
    deadline = time.monotonic() + seconds
    try:
        return client.wait_ready(name, seconds)
    except ReadyBySsh:
        address = find_address(client.guest(name))
    while True:
        try:
            return f"SSH at {address} port {SSH_PORT}: {read_greeting(address, SSH_PORT, _CONNECT_SECONDS)}"
        except OSError as error:
            reason = error.strerror or str(error)
        if (state := client.guest(name)["state"]) != "running":
            raise GuestError(f"guest {name} is {state}; it did not answer SSH", f"see `nohype guest console {name} --no-follow`")
        if time.monotonic() + _PAUSE > deadline:
            what = f"timed out after {seconds:g} s waiting for guest {name} to answer SSH at {address} port {SSH_PORT}: {reason}"
            raise GuestError(what, f"check that this machine reaches the guest, and see `nohype guest console {name}`")
        time.sleep(_PAUSE)


def find_address(guest: shapes.Guest) -> str:
    """The first IP address of the request. Raises NotFound without one."""
    if not guest["addresses"]:
        raise NotFound(f"guest {guest['name']} was created without an IP address", "give the address of the guest with --address")
    return guest["addresses"][0].partition("/")[0]


def read_greeting(address: str, port: int, seconds: float) -> str:
    """The first line of an SSH server (RFC 4253 4.2). Raises OSError if none answers."""
    with socket.create_connection((address, port), seconds) as connection:
        connection.settimeout(seconds)
        data = b""
        while b"\n" not in data and len(data) < 255:
            piece = connection.recv(255)
            if not piece:
                break
            data += piece
    line = data.partition(b"\n")[0].decode(errors="replace").strip()
    if not line.startswith("SSH-"):
        raise OSError(0, "the server that answers is not an SSH server")
    return line
