"""Stacked uplinks: through which interfaces their frames pass. On recorded links, and on those of a real kernel."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from orchestrator.host.interfaces import find_lower, read_index
from orchestrator.host.netlink import create_netns, delete_netns, read_links
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Link

NETNS = f"lo{os.getpid()}"


def link(name: str, kind: str | None = None, *, master: str | None = None, parent: str | None = None) -> Link:
    return Link(name, 1, None, up=True, carrier=True, master=master, kind=kind, parent=parent)


@pytest.mark.parametrize("kind", ["bond", "team", "bridge"])
def test_members_of_a_stacked_uplink_are_below_it(kind: str) -> None:
    links = [link("up0", kind), link("eth0", master="up0"), link("eth1", master="up0"), link("eth2", master="other")]
    assert find_lower(links, "up0") == {"eth0", "eth1"}


@pytest.mark.parametrize("kind", ["vlan", "macvlan", "ipvlan"])
def test_parent_of_an_uplink_is_below_it_and_its_siblings_are_not(kind: str) -> None:
    links = [
        link("up0", kind, parent="eth0"),
        link("eth0"),
        link("up1", kind, parent="eth0"),
        link("nh-1", "macvtap", parent="up0"),
    ]
    assert find_lower(links, "up0") == {"eth0"}


def test_stack_of_several_layers_is_followed_to_its_end() -> None:
    links = [
        link("up0.5", "vlan", parent="up0"), link("up0", "bond"), link("eth0.7", "vlan", master="up0", parent="eth0"),
        link("eth0"), link("eth1", master="up0"), link("nh-1", "macvtap", parent="up0.5"), link("br0", "bridge"),
    ]  # fmt: skip
    assert find_lower(links, "up0.5") == {"up0", "eth0.7", "eth0", "eth1"}
    assert find_lower(links, "eth1") == frozenset()
    assert find_lower(links, "gone") == frozenset()


def test_links_in_a_circle_end() -> None:
    """Two ends of a veth pair are each other's parent."""
    assert find_lower([link("a", "veth", parent="b"), link("b", "veth", parent="a")], "a") == {"b"}


@pytest.fixture
def stack() -> Iterator[IPRoute]:
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")
    create_netns(NETNS)
    try:
        with IPRoute(netns=NETNS) as ipr:
            for number in (1, 2):
                ipr.link("add", ifname=f"eth{number}", kind="veth", peer={"ifname": f"far{number}"})
            yield ipr
    finally:
        delete_netns(NETNS)


def add(ipr: IPRoute, name: str, kind: str, **fields: int) -> int:
    try:
        ipr.link("add", ifname=name, kind=kind, **fields)
    except NetlinkError as error:
        pytest.skip(f"this kernel has no {kind}: {error}")
    return int(ipr.link_lookup(ifname=name)[0])


@pytest.mark.parametrize("kind", ["bond", "team", "bridge"])
def test_members_on_a_real_kernel(stack: IPRoute, kind: str) -> None:
    index = add(stack, "up0", kind)
    (member,) = stack.link_lookup(ifname="eth1")
    stack.link("set", index=member, master=index)
    assert find_lower(read_links(netns=NETNS), "up0") >= {"eth1"}
    assert "eth2" not in find_lower(read_links(netns=NETNS), "up0")


@pytest.mark.parametrize(("kind", "fields"), [("vlan", {"vlan_id": 5}), ("macvlan", {})])
def test_parent_on_a_real_kernel(stack: IPRoute, kind: str, fields: dict[str, int]) -> None:
    (parent,) = stack.link_lookup(ifname="eth1")
    add(stack, "up0", kind, link=parent, **fields)
    found = find_lower(read_links(netns=NETNS), "up0")
    assert "eth1" in found
    assert not found & {"eth2", "far2"}


def test_number_of_an_interface() -> None:
    host = HostRoot()
    assert read_index(host, "lo") == socket.if_nametoindex("lo")
    assert read_index(host, "absent0") is None
