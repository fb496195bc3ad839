"""Runs uvicorn on the Unix socket and the TLS port."""

from __future__ import annotations

import asyncio
import gc
import grp
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from orchestrator import serving_cpu
from orchestrator.api.accept import Acceptor, Listener
from orchestrator.api.app import Api
from orchestrator.api.connection import PeerConnection
from orchestrator.api.identity import Peer
from orchestrator.api.shares import Place, Shares
from orchestrator.api.tickless import TicklessServer
from orchestrator.api.tls import Certificates
from orchestrator.api.uvicorn_import import Config
from orchestrator.config import ApiConfig
from orchestrator.errors import HostError
from orchestrator.values import CpuSet

_log = logging.getLogger(__name__)

SOCKET_GROUP = "nohype"

# Seconds, a fifth of Python's default: a request waits for the kernel and the disk several times, and each time for the
# interpreter while others compute. With 64 clients this makes the slowest of a hundred claims a quarter faster.
_TURN = 0.001
# Objects between two garbage collections, 700 by default. What the manager has loaded until it serves is not examined at all.
# Most objects of a request need no collection.
_ALLOCATIONS = 10_000
_GRACE = 5
_ANY = CpuSet()
# Each listener counts its own: the TLS port is open to the network, which must not lock out the users of the Unix socket. A
# connection needs a descriptor; the sum stays far below the unit's limit.
MAX_CONNECTIONS_PER_CLIENT = 128
MAX_CONNECTIONS = 400


def open_socket(path: Path) -> socket.socket:
    """Creates the socket for root and the group nohype (0660). Raises HostError, also if another manager listens on it."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise HostError(f"another manager listens on {path}", "run one manager per host: see `systemctl status nohyped`")
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created closed, then opened to the group: between bind and chmod no other user can connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            os.chown(path, -1, grp.getgrnam(SOCKET_GROUP).gr_gid)
        except KeyError:
            _log.warning("group %s does not exist: only root can connect to %s", SOCKET_GROUP, path)
        path.chmod(0o660)
        # Now, not when the server starts: a second manager must be able to connect while this one still recovers.
        listener.listen()
    except OSError as error:
        listener.close()
        raise HostError(f"cannot create the socket {path}", "run as root", error.errno or 0) from None
    return listener


def open_port(config: ApiConfig) -> Listener:
    """Raises HostError if the address cannot be used, and the errors of ``Certificates``."""
    certificates = Certificates(config)
    host, port = config.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4]
        listener = socket.create_server(address[:2], family=family)
        # Connections inherit it. asyncio sets it only where the socket names its protocol; without it each response takes 40 ms
        # more (Nagle's algorithm against delayed acknowledgements: head and body are written one after the other).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Listener(listener, certificates.context)
    except OSError as error:
        raise HostError(f"cannot listen on {config.listen}", "check [api] in the configuration", error.errno or 0) from None


class Server(TicklessServer):
    """Serves the interface until ``should_exit`` is set.

    Args:
        ready: called once when requests are answered.
        stopping: called once when the server starts to stop: requests in progress have 5 s to finish, streams end.
        cpus: one of these serves all requests; empty for any CPU.
    """

    def __init__(
        self,
        api: Api,
        listeners: Sequence[Listener],
        ready: Callable[[], object] = lambda: None,
        stopping: Callable[[], object] = lambda: None,
        cpus: CpuSet = _ANY,
    ) -> None:
        def stop() -> None:
            api.close()
            stopping()

        config = Config(
            api.app, http=PeerConnection, ws="none", lifespan="off", interface="asgi3", loop="asyncio", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=_GRACE,
        )  # fmt: skip
        super().__init__(config, ready, stop)
        self.listeners, self._cpus = tuple(listeners), cpus

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Also sets the thread switch interval and the garbage collection of the process, and chooses the CPU."""
        sys.setswitchinterval(_TURN)
        gc.collect()
        gc.freeze()
        gc.set_threshold(_ALLOCATIONS)
        serving_cpu.stay_on_one(self._cpus)
        try:
            super().run([])
        finally:
            serving_cpu.leave()

    def listen(self) -> None:
        # Not with uvicorn's servers: they count a connection only after its TLS handshake.
        for listener in self.listeners:
            shares = Shares(MAX_CONNECTIONS_PER_CLIENT, MAX_CONNECTIONS)
            self.servers.append(cast(asyncio.Server, Acceptor(listener, shares, self._build)))

    def _build(self, peer: Peer, place: Place, shares: Shares) -> PeerConnection:
        return PeerConnection(self.config, self.server_state, peer, place, shares)
