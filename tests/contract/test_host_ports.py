"""The interfaces below a PF on odd servers: which is its own, whether it works, and what use the host makes of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from errno import EIO, EOPNOTSUPP
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from orchestrator.errors import HostError
from orchestrator.host import netlink
from orchestrator.host.ports import describe_use, find_port, read_ports, read_up
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_pf, read_pfs
from orchestrator.host.survey import read_topology, refresh_topology
from orchestrator.model.topology import PhysicalFunction
from tests.fakes.root import DEVICES, FakeRoot

INFINIBAND = "80:00:02:08:fe:80:00:00:00:00:00:00:00:02:c9:03:00:0a:41:21"
NEAR, ABOVE, BRIDGE = (f"np{os.getpid()}{letter}" for letter in "nab")


def add_interface(fake: FakeRoot, pf: PhysicalFunction, name: str, **files: str) -> None:
    """Another interface below the PF, up."""
    texts = {"address": "5a:00:00:00:00:01", "operstate": "up", "carrier": "1", "type": "1", "flags": "0x1003", **files}
    for file, text in texts.items():
        fake.add(f"{DEVICES}/{pf.address}/net/{name}/{file}", text)


@pytest.mark.parametrize("port_name", ["pf0vf0", "c1pf0vf3", "pf0sf88", "pf0", "p0pf0vf1"])
def test_a_representor_is_not_the_pfs_own_port(fake: FakeRoot, pf: PhysicalFunction, port_name: str) -> None:
    """In switchdev mode; eth10 sorts before nic0."""
    add_interface(fake, pf, "eth10", phys_port_name=port_name)
    now = read_pf(fake, pf.address)
    assert (now.interface, now.up, now.mac, now.fault) == (pf.interface, True, pf.mac, "")
    assert now.switchdev
    assert [(port.name, port.representor) for port in now.siblings] == [("eth10", True)]
    assert find_port(fake, pf.address) == pf.interface
    assert not pf.switchdev


@pytest.mark.parametrize("port_name", ["p0", "p1s2", "n0"])
def test_a_port_with_a_name_of_its_own_is_no_representor(fake: FakeRoot, pf: PhysicalFunction, port_name: str) -> None:
    fake.add(f"{DEVICES}/{pf.address}/net/{pf.interface}/phys_port_name", port_name)
    now = read_pf(fake, pf.address)
    assert (now.interface, now.fault, now.switchdev) == (pf.interface, "", False)


def test_a_driver_without_port_names_is_no_fault(fake: FakeRoot, pf: PhysicalFunction) -> None:
    """The file is there, and can't be read (net/core/net-sysfs.c, phys_port_name_show())."""
    name = f"{DEVICES}/{pf.address}/net/{pf.interface}/phys_port_name"
    fake.add(name)
    fake.read_errors[name] = EOPNOTSUPP
    assert read_pf(fake, pf.address) == pf


def test_of_several_ports_the_named_one_is_taken(fake: FakeRoot, pf: PhysicalFunction) -> None:
    """Two ports of one function, or representors of a driver that does not name them."""
    for name in ("eth10", "zeth"):
        add_interface(fake, pf, name, operstate="down")
    with pytest.raises(HostError, match=r"several network interfaces \(") as caught:
        find_port(fake, pf.address, ["gone"])
    assert all(name in caught.value.message for name in ("eth10", "zeth", str(pf.interface)))
    assert find_port(fake, pf.address, ["gone", "nic0", "zeth"]) == "nic0"
    now = read_pf(fake, pf.address, ["nic0"])
    assert (now.interface, now.up) == ("nic0", True)
    (surveyed,) = read_pfs(fake)
    by_name = [surveyed.at(name) for name in ("nic0", "eth10", "zeth", "eth9")]
    assert [found and (found.interface, found.up) for found in by_name] == [
        ("nic0", True), ("eth10", False), ("zeth", False), None
    ]  # fmt: skip


def test_an_ipoib_child_beside_the_port_stays_out_of_the_way(fake: FakeRoot, pf: PhysicalFunction) -> None:
    add_interface(fake, pf, "ib0.8001", address=INFINIBAND, type="32")
    assert find_port(fake, pf.address) == pf.interface
    assert read_pf(fake, pf.address).fault == ""


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"address": "00:00:00:00:00:00"}, "00:00:00:00:00:00, which is not a unicast Ethernet address"),
        ({"address": "01:00:5e:00:00:01"}, "not a unicast Ethernet address"),
        ({"address": INFINIBAND}, "not a unicast Ethernet address"),
        ({"address": INFINIBAND, "type": "32"}, "is an InfiniBand interface"),
        ({"type": "801"}, "is not an Ethernet interface (type 801)"),
        ({"type": "odd"}, "cannot be read"),
    ],
)
def test_an_odd_port_says_so_and_stops_nothing(fake: FakeRoot, pf: PhysicalFunction, files: dict[str, str], said: str) -> None:
    for file, text in files.items():
        fake.add(f"{DEVICES}/{pf.address}/net/{pf.interface}/{file}", text)
    (now,) = read_topology(fake).pfs
    assert said in now.fault
    with pytest.raises(HostError, match="has no network interface"):
        find_port(fake, pf.address)


@pytest.mark.parametrize(
    "file", ["vendor", "sriov_totalvfs", "sriov_offset", "net/nic0/operstate", "net/nic0/address", "numa_node"]
)
def test_a_file_that_cannot_be_read_stays_with_its_pf(fake: FakeRoot, pf: PhysicalFunction, file: str) -> None:
    known = read_topology(fake)
    fake.read_errors[f"{DEVICES}/{pf.address}/{file}"] = EIO
    (now,) = read_topology(fake).pfs
    assert now.address == pf.address
    assert "cannot be read" in now.fault
    if file.startswith("net"):
        assert "cannot be read" in refresh_topology(fake, known).pfs[0].fault


def test_text_that_is_no_number_stays_with_its_pf(fake: FakeRoot, pf: PhysicalFunction) -> None:
    fake.add(f"{DEVICES}/{pf.address}/sriov_totalvfs", "many")
    assert "cannot be read" in read_topology(fake).pfs[0].fault


def hide(fake: FakeRoot, pf: PhysicalFunction) -> None:
    """As when the interface was moved to another network namespace: the folder stays, and is empty."""
    (fake.path / DEVICES / str(pf.address) / "net" / str(pf.interface)).rename(fake.path / "elsewhere")


def take_the_driver(fake: FakeRoot, pf: PhysicalFunction) -> None:
    (fake.path / DEVICES / str(pf.address) / "driver").unlink()
    (fake.path / DEVICES / str(pf.address) / "net").rename(fake.path / "elsewhere")


def make_none(fake: FakeRoot, pf: PhysicalFunction) -> None:
    (fake.path / DEVICES / str(pf.address) / "net").rename(fake.path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hide, "it is in another network namespace"),
        (take_the_driver, "no driver is bound"),
        (make_none, "driver igb creates none"),
    ],
)
def test_why_a_pf_has_no_interface_is_said(
    fake: FakeRoot, pf: PhysicalFunction, change: Callable[[FakeRoot, PhysicalFunction], None], said: str
) -> None:
    change(fake, pf)
    (now,) = read_topology(fake).pfs
    assert (now.interface, now.up, now.mac) == (None, False, None)
    assert said in now.fault
    with pytest.raises(HostError, match=said):
        find_port(fake, pf.address)


def test_a_function_that_is_gone_is_said_to_be(fake: FakeRoot, pf: PhysicalFunction) -> None:
    with pytest.raises(HostError, match="the PCI function does not exist"):
        find_port(fake, pf.address.offset(1))


@pytest.mark.parametrize(
    ("state", "carrier", "works"),
    [
        ("up", "1", True), ("unknown", "1", True), ("dormant", "1", True), ("unknown", "0", False), ("dormant", "0", False),
        ("down", "1", False), ("lowerlayerdown", "1", False), ("testing", "1", False), ("notpresent", "1", False),
    ],
)  # fmt: skip
def test_whether_a_port_works(fake: FakeRoot, pf: PhysicalFunction, state: str, carrier: str, works: bool) -> None:
    folder = f"{DEVICES}/{pf.address}/net/{pf.interface}"
    fake.add(f"{folder}/operstate", state)
    fake.add(f"{folder}/carrier", carrier)
    assert read_pf(fake, pf.address).up is works
    assert read_up(fake, pf.address, str(pf.interface)) is works


def test_a_driver_that_does_not_tell_its_state_is_down_while_its_interface_is(fake: FakeRoot, pf: PhysicalFunction) -> None:
    """Then the file carrier can't even be read (EINVAL)."""
    folder = f"{DEVICES}/{pf.address}/net/{pf.interface}"
    fake.add(f"{folder}/operstate", "unknown")
    fake.read_errors[f"{folder}/carrier"] = 22
    assert not read_pf(fake, pf.address).up


def test_the_order_of_the_interfaces_is_by_age(fake: FakeRoot, pf: PhysicalFunction) -> None:
    """In a survey of a PF with several: the one that is most likely its own comes first."""
    fake.add(f"{DEVICES}/{pf.address}/net/{pf.interface}/ifindex", "5")
    add_interface(fake, pf, "aaa", ifindex="70")
    assert [port.name for port in read_ports(fake, pf.address)] == ["nic0", "aaa"]


@pytest.fixture
def near() -> Iterator[str]:
    """An interface of the real kernel, down and unused."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network interfaces need root")
    with IPRoute() as ipr:
        ipr.link("add", ifname=NEAR, kind="veth", peer={"ifname": f"{NEAR}p"})
    yield NEAR
    with IPRoute() as ipr:
        for name in (NEAR, BRIDGE):
            for index in ipr.link_lookup(ifname=name):
                ipr.link("del", index=index)


def use_of(name: str) -> str:
    return describe_use(HostRoot(Path("/")), f"sys/class/net/{name}", name)


@pytest.mark.netns
def test_the_real_kernel_shows_that_an_interface_is_up(near: str) -> None:
    assert use_of(near) == ""
    netlink.set_link_up(near, up=True)
    assert use_of(near) == f"its interface {near} is up"


@pytest.mark.netns
def test_the_real_kernel_shows_a_bridge(near: str) -> None:
    netlink.create_bridge(BRIDGE)
    netlink.add_port(BRIDGE, near)
    assert use_of(near) == f"its interface {near} is a port of {BRIDGE}"


@pytest.mark.netns
@pytest.mark.parametrize("kind", ["macvlan", "macvtap", "vlan"])
def test_the_real_kernel_shows_what_is_above(near: str, kind: str) -> None:
    """Passthrough macvtap too: its lower interface need not be up."""
    with IPRoute() as ipr:
        fields: dict[str, object] = {"macvtap_mode": "passthru"} if kind == "macvtap" else {}
        fields |= {"macvlan_mode": "private"} if kind == "macvlan" else {"vlan_id": 7} if kind == "vlan" else {}
        try:
            ipr.link("add", ifname=ABOVE, kind=kind, link=ipr.link_lookup(ifname=near)[0], **fields)
        except Exception as error:  # noqa: BLE001 (whatever it says, this kernel has no such interfaces)
            pytest.skip(f"this kernel has no {kind}: {error}")
    assert use_of(near) == f"{ABOVE} uses its interface {near}"


@pytest.mark.netns
def test_the_real_kernel_tells_of_addresses(near: str) -> None:
    assert near not in netlink.read_addressed()
    with IPRoute() as ipr:
        ipr.addr("add", index=ipr.link_lookup(ifname=near)[0], address="192.0.2.77", prefixlen=32)
    assert near in netlink.read_addressed()
    assert use_of(near) == "", "addresses are no files"
