"""Named network namespaces (ip-netns(8))."""

from __future__ import annotations

from contextlib import suppress
from errno import EEXIST, ENOENT

from orchestrator.errors import HostError
from orchestrator.host.netlink.sockets import (
    HINTS,
    check_netns,
    errno_of,
    find_index,
    find_link,
    namespaces,
    netns_exists,
    opened,
    read_all,
)


def create_netns(name: str) -> None:
    """Makes a named network namespace, as `ip netns add` does.

    Raises:
        HostError: the name is taken (EEXIST), or not root (EPERM).
    """
    if netns_exists(name):
        raise HostError(f"cannot make the network namespace {name}", HINTS[EEXIST], EEXIST)
    try:
        namespaces.create(name)
    except OSError as error:
        if netns_exists(name):
            # It makes the mount point first; without the mount that would look like a namespace.
            with suppress(OSError):
                namespaces.remove(name)
        raise HostError(f"cannot make the network namespace {name}", HINTS.get(errno_of(error), ""), errno_of(error)) from None


def delete_netns(name: str) -> None:
    """Removes a named network namespace. Its virtual interfaces go with the last process in it; physical ones return.

    Raises:
        HostError: there is none (ENOENT), or not root (EPERM).
    """
    if not netns_exists(name):
        raise HostError(f"cannot remove the network namespace {name}", "look with: ip netns list", ENOENT)
    try:
        namespaces.remove(name)
    except OSError as error:
        raise HostError(f"cannot remove the network namespace {name}", HINTS.get(errno_of(error), ""), errno_of(error)) from None


def move_to_netns(interface: str, netns: str) -> None:
    """Moves an interface from our network namespace into a named one. It arrives there down, and without addresses.

    Raises:
        HostError: no such interface (ENODEV) or namespace (ENOENT), the name is taken there (EEXIST), or it cannot move (EINVAL).
    """
    what = f"move {interface} to the network namespace {netns}"
    check_netns(what, netns)
    with opened(what) as ipr:
        ipr.link("set", index=find_index(ipr, interface, what), net_ns_fd=netns)
    with opened(what, netns) as ipr:
        find_link(read_all(ipr), interface, what)
