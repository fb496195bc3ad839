"""Notifications of changes of links and of nftables in a network namespace, with a time limit (rtnetlink(7), nft(8))."""

from __future__ import annotations

import socket
from errno import ENOBUFS
from types import TracebackType
from typing import Self

from orchestrator.errors import HostError
from orchestrator.host.netlink.sockets import HINTS, RTMGRP_LINK
from orchestrator.host.netns import call_in_netns

_LONGEST = 1 << 16
_NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h
_NFNLGRP_NFTABLES = 1 << (7 - 1)  # include/uapi/linux/netfilter/nfnetlink.h, as a mask


class Notices:
    """Reports that something has changed, not what. Must be opened before the state is read: no change between is missed."""

    def __init__(self, what: str, protocol: int, groups: int, netns: str | None) -> None:
        self._what = f"cannot watch {what}"
        try:
            self._socket = call_in_netns(netns, lambda: _open(protocol, groups))
        except OSError as error:
            number = error.errno or 0
            raise HostError(self._what, HINTS.get(number, ""), number) from None

    def __enter__(self) -> Self:
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
                raise HostError(self._what, errno=error.errno or 0) from None
            return True


class LinkNotices(Notices):
    """Of interfaces: a change of a bridge port's flags is announced too (br_ifinfo_notify())."""

    def __init__(self, netns: str | None = None) -> None:
        super().__init__("the network interfaces", socket.NETLINK_ROUTE, RTMGRP_LINK, netns)


class RuleNotices(Notices):
    """Of all tables of nftables: each transaction is announced, of other programs too. Raises HostError (EPROTONOSUPPORT) if the
    kernel has no nftables.
    """

    def __init__(self, netns: str | None = None) -> None:
        super().__init__("the rules of nftables", _NETLINK_NETFILTER, _NFNLGRP_NFTABLES, netns)


def _open(protocol: int, groups: int) -> socket.socket:
    result = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        result.bind((0, groups))
    except BaseException:
        result.close()
        raise
    return result
