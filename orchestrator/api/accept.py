"""Accepts connections, and counts each of them before its TLS handshake starts."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from errno import ECONNABORTED, EMFILE, ENFILE
from typing import Any, cast

from orchestrator.api.connection import PeerConnection
from orchestrator.api.identity import Peer, read_peer
from orchestrator.api.outgoing import Outgoing
from orchestrator.api.shares import Pace, Place, Shares

_log = logging.getLogger(__name__)

_HANDSHAKE = 10.0
# TLS handshakes of one address: per second, and in a burst after a pause. Each takes the event loop 1 to 2 ms. More start later.
_RATE, _BURST = 100.0, 200
# Connections that are refused, 0.05 ms each, before the event loop serves other work.
_IN_A_ROW = 16
TLS_CLOSE_TIMEOUT = 1.0
_PAUSE = 0.1
_BACKLOG = 2048
_ROOT = 0
# Bytes that asyncio's TLS buffers per connection before the writer must wait; its default is 512 KB.
_HIGH_WATER = 64 << 10


@dataclass(frozen=True)
class Listener:
    socket: socket.socket
    tls: ssl.SSLContext | None = None


class Acceptor:
    """Accepts the connections of one listener until it is closed. Has the methods of an asyncio.Server that uvicorn calls."""

    def __init__(self, listener: Listener, shares: Shares, build: Callable[[Peer, Place, Shares], PeerConnection]) -> None:
        self._listener, self.shares, self._build = listener, shares, build
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pace = Pace(_RATE, _BURST)
        listener.socket.settimeout(0)
        listener.socket.listen(_BACKLOG)
        self._start(self._accept_all())

    def close(self) -> None:
        """Stops accepting. Open connections continue."""
        for task in self._tasks:
            task.cancel()
        self._listener.socket.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept_all(self) -> None:
        refused = 0
        while True:
            try:
                # Does not yield to other tasks if a connection is waiting already.
                connection, _ = await self._loop.sock_accept(self._listener.socket)
            except OSError as error:
                if error.errno == ECONNABORTED:
                    continue  # the client closed it while it waited (accept(2))
                made_room = error.errno in (EMFILE, ENFILE) and self.shares.make_room()
                _log.error("cannot accept a connection: %s%s", error, "; an idle one was closed" if made_room else "")
                await asyncio.sleep(_PAUSE)
            else:
                refused = 0 if self._admit(connection) else refused + 1
                if refused % _IN_A_ROW == 0:
                    await asyncio.sleep(0)

    def _admit(self, connection: socket.socket) -> bool:
        """Starts to serve a connection; returns whether it was admitted."""
        try:
            peer = read_peer(connection, None)
        except OSError:
            connection.close()  # closed by the client already
            return False
        place = Place(peer.rate_limit_key, connection.close)
        if not self.shares.admit(place, always=peer.uid == _ROOT):
            _log.warning("too many connections of %s, none idle: refused a new one", peer.rate_limit_key)
            connection.close()
            return False
        task = self._start(self._open(connection, peer, place))
        place.close = task.cancel
        return True

    async def _open(self, connection: socket.socket, peer: Peer, place: Place) -> None:
        """Sets up the protocol of a connection. Releases ``place`` if that fails; otherwise the protocol releases it."""
        served = False
        raw: asyncio.Transport | None = None
        try:
            raw, _ = await self._loop.connect_accepted_socket(_Paused, connection)
            transport, early = raw, _Early()
            if self._listener.tls is not None:
                if wait := self._pace.reserve(peer.rate_limit_key):
                    await asyncio.sleep(wait)
                transport = await self._greet(raw, self._listener.tls, early)
                if early.lost:
                    return
                peer = read_peer(raw.get_extra_info("socket"), transport.get_extra_info("peercert"))
            protocol = self._build(peer, place, self.shares)
            transport.set_protocol(protocol)
            protocol.connection_made(cast(asyncio.Transport, Outgoing(transport, raw)))
            served = True
            early.replay(protocol)
            transport.resume_reading()
        except (OSError, asyncio.CancelledError):
            # Not TLS, an unsupported version, an untrusted certificate, a timeout; or it was closed in favour of another one.
            # Not logged: a client can cause this without credentials, and repeat it.
            pass
        finally:
            if not served:
                self.shares.release(place)
                (raw.abort if raw else connection.close)()

    async def _greet(self, raw: asyncio.Transport, context: ssl.SSLContext, early: _Early) -> asyncio.Transport:
        """Performs the TLS handshake; returns the transport to write to. Raises OSError, such as ssl.SSLError or TimeoutError."""
        transport = await self._loop.start_tls(
            raw, early, context, server_side=True, ssl_handshake_timeout=_HANDSHAKE, ssl_shutdown_timeout=TLS_CLOSE_TIMEOUT
        )
        if transport is None:
            raise ConnectionAbortedError
        transport.set_write_buffer_limits(_HIGH_WATER)
        return transport


class _Paused(asyncio.Protocol):
    """Reads nothing until it is replaced by another protocol."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.ReadTransport, transport).pause_reading()


class _Early(asyncio.Protocol):
    """Buffers what arrives between the end of the handshake and the start of the connection's protocol."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._eof = False
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self._data += data

    def eof_received(self) -> bool:
        self._eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def replay(self, protocol: asyncio.Protocol) -> None:
        if self._data:
            protocol.data_received(bytes(self._data))
        if self._eof:
            protocol.eof_received()
