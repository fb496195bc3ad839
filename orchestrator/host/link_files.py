"""Network interfaces by the files of sysfs, for programs that have no package for netlink
(Documentation/ABI/testing/sysfs-class-net)."""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOENT
from typing import Any

from orchestrator.errors import HostError, RequestError
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Link
from orchestrator.values import MacAddress

_FOLDER = "sys/class/net"
_IFF_UP = 1  # include/uapi/linux/if.h
_ARPHRD_ETHER = 1  # include/uapi/linux/if_arp.h


class FileNet:
    """Stands for the module `host.netlink` where pyroute2 is not installed: lists interfaces, and refuses all else.

    Addresses only mark a VF as used by the host: none is known.
    """

    def __init__(self, host: HostRoot) -> None:
        self._host = host

    def read_links(self) -> tuple[Link, ...]:
        return read_links(self._host)

    def read_addressed(self) -> frozenset[str]:
        return frozenset()

    def __getattr__(self, name: str) -> Any:
        def refuse(*_arguments: object, **_more: object) -> None:
            raise HostError(
                "settings of network interfaces cannot be read: the Python package pyroute2 is not installed",
                "run `apt install python3-pyroute2`",
            )

        return refuse


def list_missing_nodes(host: HostRoot) -> list[str]:
    """Device nodes that a guest with a software edge needs, and that the server does not have."""
    return [f"/{name}" for name in ("dev/net/tun", "dev/vhost-net") if not host.exists(name)]


def is_wireless(host: HostRoot, name: str) -> bool:
    """Whether an interface is one of IEEE 802.11 (net/wireless/core.c)."""
    return host.exists(f"{_FOLDER}/{name}/phy80211")


def read_links(host: HostRoot) -> tuple[Link, ...]:
    """Those of the own network namespace. An interface that disappears meanwhile is left out.

    ``kind`` is None for an interface of a device, and otherwise as the kernel's DEVTYPE, or "virtual": sysfs has no other name.
    ``promiscuous`` and ``all_multicast`` are not set: sysfs mixes them with what the kernel needs for itself.
    """
    try:
        names = host.names(_FOLDER)
    except HostError as error:
        raise HostError(f"network interfaces cannot be listed: {error.message}", error.hint, error.errno) from None
    found = (_try_link(host, name) for name in names)
    return tuple(link for link in found if link)


def _try_link(host: HostRoot, name: str) -> Link | None:
    try:
        return _read_link(host, name)
    except HostError as error:
        if error.errno in (ENOENT, ENODEV):
            return None
        raise


def _read_link(host: HostRoot, name: str) -> Link | None:
    folder = f"{_FOLDER}/{name}"
    if not host.exists(f"{folder}/ifindex"):
        return None  # such as bonding_masters, which is a file
    flags = int(host.read(f"{folder}/flags"), 0)
    up = bool(flags & _IFF_UP)
    return Link(
        name,
        int(host.read(f"{folder}/ifindex")),
        _parse_mac(host.find(f"{folder}/address") or ""),
        up=up,
        carrier=up and _read_carrier(host, folder),
        master=host.link(f"{folder}/master"),
        kind=None if host.exists(f"{folder}/device") else _read_type(host, folder),
        mtu=int(host.find(f"{folder}/mtu") or 0),
        ethernet=int(host.read(f"{folder}/type")) == _ARPHRD_ETHER,
    )


def _read_carrier(host: HostRoot, folder: str) -> bool:
    try:
        return host.read(f"{folder}/carrier") == "1"
    except HostError as error:
        if error.errno != EINVAL:  # of an interface that is down
            raise
        return False


def _read_type(host: HostRoot, folder: str) -> str:
    pairs = (line.partition("=") for line in (host.find(f"{folder}/uevent") or "").splitlines())
    return next((value for key, _, value in pairs if key == "DEVTYPE"), "virtual")


def _parse_mac(text: str) -> MacAddress | None:
    try:
        return MacAddress.parse(text)
    except RequestError:
        return None
