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
    if netns_exists(name):
        raise HostError(f"cannot create network namespace {name}", HINTS[EEXIST], EEXIST)
    try:
        namespaces.create(name)
    except OSError as error:
        if netns_exists(name):
            # pyroute2 creates the mount point first; without the mount it looks like a namespace.
            with suppress(OSError):
                namespaces.remove(name)
        raise HostError(f"cannot create network namespace {name}", HINTS.get(errno_of(error), ""), errno_of(error)) from None


def delete_netns(name: str) -> None:
    """Virtual interfaces disappear when the last process leaves the namespace; physical interfaces return to the initial one."""
    if not netns_exists(name):
        raise HostError(f"cannot remove network namespace {name}", "check the name with `ip netns list`", ENOENT)
    try:
        namespaces.remove(name)
    except OSError as error:
        raise HostError(f"cannot remove network namespace {name}", HINTS.get(errno_of(error), ""), errno_of(error)) from None


def move_to_netns(interface: str, netns: str) -> None:
    """The interface is down afterwards and has no addresses. Raises HostError if it does not exist (ENODEV), its name is taken
    there (EEXIST), or it cannot move (EINVAL).
    """
    what = f"move {interface} to network namespace {netns}"
    check_netns(what, netns)
    with opened(what) as ipr:
        ipr.link("set", index=find_index(ipr, interface, what), net_ns_fd=netns)
    with opened(what, netns) as ipr:
        find_link(read_all(ipr), interface, what)


def rename_link(interface: str, name: str, netns: str | None = None) -> None:
    """The interface must be down. Raises HostError if it does not exist (ENODEV), or the name is taken (EEXIST)."""
    what = f"rename {interface} to {name}"
    with opened(what, netns) as ipr:
        ipr.link("set", index=find_index(ipr, interface, what), ifname=name)
        find_link(read_all(ipr), name, what)
