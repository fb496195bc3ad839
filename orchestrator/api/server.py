"""The sockets: uvicorn, told who is at the other end of each connection, on the Unix socket and the TLS port."""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator.api.app import Api
from orchestrator.api.identity import Peer, read_peer
from orchestrator.api.problems import MEDIA_TYPE, build_problem
from orchestrator.api.tls import Certificates
from orchestrator.config import ApiConfig
from orchestrator.errors import HostError, RequestError
from orchestrator.service.server import QuietServer

_log = logging.getLogger(__name__)

SOCKET_GROUP = "nohype"

_PATIENCE = 30.0
# Seconds, a fifth of what Python begins with: a request waits for the kernel and the disk several times, and each time for the
# interpreter, while others compute. With 64 clients it makes the slowest of a hundred claims a quarter faster.
_TURN = 0.001
_HANDSHAKE = 10.0
_FAREWELL = 1.0
_GRACE = 5
# Of one user or address, and of one listener. Each listener counts its own: strangers reach the TLS port, and must not lock
# out those whom the Unix socket's mode lets in. A descriptor each: all together stay far below what the unit may open.
_CONNECTIONS = 128
_ALL_CONNECTIONS = 400


@dataclass(frozen=True)
class Listener:
    """A socket that listens, and its TLS if it has one."""

    socket: socket.socket
    tls: ssl.SSLContext | None = None


def open_socket(path: Path) -> socket.socket:
    """The manager's Unix socket, for root and the group nohype (0660).

    Raises:
        HostError: another manager serves it, or the folder can't be written.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise HostError(f"another manager serves {path}", "one manager a host: `systemctl status nohyped`")
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made closed, then opened to the group: between bind and chmod nobody else can connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            os.chown(path, -1, grp.getgrnam(SOCKET_GROUP).gr_gid)
        except KeyError:
            _log.warning("there is no group %s: only root can use %s", SOCKET_GROUP, path)
        path.chmod(0o660)
        # Now, not when the server starts: a second manager must meet an answer while this one still recovers.
        listener.listen()
    except OSError as error:
        listener.close()
        raise HostError(f"cannot serve {path}", "run as root", error.errno or 0) from None
    return listener


def open_port(config: ApiConfig) -> Listener:
    """The manager's TLS port.

    Raises:
        HostError: the address can't be had, or a file can't be read.
        RequestError: see ``Certificates``.
    """
    certificates = Certificates(config)
    host, port = config.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4]
        listener = socket.create_server(address[:2], family=family)
        # Connections inherit it. asyncio sets it only where the socket names its protocol, and each answer took 40 ms more
        # (Nagle's algorithm against delayed acknowledgements: head and body are written one after the other).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Listener(listener, certificates.context)
    except OSError as error:
        raise HostError(f"cannot listen on {config.listen}", "see [api] in the configuration", error.errno or 0) from None


class Server(QuietServer):
    """Serves the interface until it is told to end.

    Args:
        api: the application.
        listeners: where.
        ready: called once when requests are answered.
        stopping: called once when the server begins to end: what runs has some seconds to finish, streams end.
    """

    def __init__(
        self,
        api: Api,
        listeners: Sequence[Listener],
        ready: Callable[[], object] = lambda: None,
        stopping: Callable[[], object] = lambda: None,
    ) -> None:
        def stop() -> None:
            api.feed.close()
            stopping()

        config = uvicorn.Config(
            api.app, http=Connection, ws="none", lifespan="off", interface="asgi3", loop="asyncio", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=_GRACE,
        )  # fmt: skip
        super().__init__(config, ready, stop)
        self._listeners = tuple(listeners)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves; see ``should_exit``. The process is its own: threads take turns in the interpreter as suits requests."""
        sys.setswitchinterval(_TURN)
        super().run([one.socket for one in self._listeners if not one.tls])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server, which knows one TLS for all sockets or none."""
        loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for one in self._listeners:
            if one.tls:
                server = loop.create_server(
                    lambda: Connection(self.config, self.server_state, {}),
                    sock=one.socket, ssl=one.tls, ssl_handshake_timeout=_HANDSHAKE, ssl_shutdown_timeout=_FAREWELL,
                )  # fmt: skip
                self.servers.append(await server)


class Connection(H11Protocol):
    """A connection that knows its peer: each request finds it as ``scope["state"]["peer"]``."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks who is there, once: it can't change."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self.peer = self._read_peer(transport)
        # A copy: uvicorn's is shared by all connections.
        self.app_state = {**self.app_state, "peer": self.peer}
        here = [one.peer for one in self.connections if isinstance(one, Connection) and one.peer.local == self.peer.local]
        if len(here) > _ALL_CONNECTIONS or sum(one.key == self.peer.key for one in here) > _CONNECTIONS:
            if self.peer.uid != 0:
                _log.warning("too many connections of %s: one is closed", self.peer.key)
                transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Takes bytes of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, as all errors are answered."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        problem = build_problem(RequestError(f"this is no HTTP request: {msg}"))
        content = json.dumps(problem).encode()
        fields = [("content-type", MEDIA_TYPE), ("content-length", str(len(content))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=fields, reason=b"Bad Request"),
            h11.Data(content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _read_peer(self, transport: asyncio.Transport) -> Peer:
        return read_peer(transport.get_extra_info("socket"), transport.get_extra_info("peercert"))

    def _watch(self) -> None:
        """Who has opened a connection, or begun a request, and sends nothing more, can't keep it for ever."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_PATIENCE, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
