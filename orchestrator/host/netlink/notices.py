"""Notifications of link changes in a network namespace, with a time limit (rtnetlink(7))."""

from __future__ import annotations

import socket
from errno import ENOBUFS
from types import TracebackType

from orchestrator.errors import HostError
from orchestrator.host.netlink.sockets import HINTS, RTMGRP_LINK
from orchestrator.host.netns import call_in_netns

_LONGEST = 1 << 16


class LinkNotices:
    """Reports that a link has changed, not which: a change of a bridge port's flags is announced too (br_ifinfo_notify()).

    Must be opened before the state is read: no change between the two is missed.
    """

    def __init__(self, netns: str | None = None) -> None:
        try:
            self._socket = call_in_netns(netns, _open)
        except OSError as error:
            number = error.errno or 0
            raise HostError("cannot watch the network interfaces", HINTS.get(number, ""), number) from None

    def __enter__(self) -> LinkNotices:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def wait(self, timeout: float) -> bool:
        """Waits ``timeout`` seconds for a change; takes all notifications that have arrived."""
        self._socket.settimeout(timeout)
        try:
            self._receive()
            self._socket.settimeout(0)
            while self._receive():
                pass
        except TimeoutError:
            return False
        except BlockingIOError:
            pass
        return True

    def _receive(self) -> bool:
        try:
            return bool(self._socket.recv(_LONGEST))
        except (TimeoutError, BlockingIOError):
            raise
        except OSError as error:
            if error.errno != ENOBUFS:  # notifications were lost: there were changes
                raise HostError("cannot watch the network interfaces", errno=error.errno or 0) from None
            return True


def _open() -> socket.socket:
    result = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        result.bind((0, RTMGRP_LINK))
    except BaseException:
        result.close()
        raise
    return result
