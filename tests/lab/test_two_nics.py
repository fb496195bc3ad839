"""A guest with two NICs: it gets two VFs, uses both, passes the audit, and leaves the host as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.conftest import LabHost
from tests.lab.test_manager import MEMORY, survey

# `test_networks` has guests with several NICs, too.
pytestmark = pytest.mark.soak

NAME = "twonics"
# Of two addresses in a /31 network (RFC 3021) one is this guest's, the other that of guest1 or guest2. So the guest has one route
# to each of them, over one NIC each, and what is answered has gone out over this NIC.
NICS = (("10.9.0.10/31", "10.9.0.11"), ("10.9.0.13/31", "10.9.0.12"))


@pytest.fixture(scope="module")
def before(host: LabHost) -> Any:
    return survey(host)


@pytest.fixture(scope="module")
def guest(host: LabHost, guests: list[dict[str, Any]], before: Any) -> Iterator[dict[str, Any]]:
    """A guest with two NICs next to the two shared guests."""
    words = [word for address, _ in NICS for word in ("--nic", f"uplink=nic0,address={address}")]
    made = json.loads(host.nohype("guest", "create", NAME, *MEMORY, *words, "--wait", "180", "--json").stdout)
    yield made
    host.nohype("guest", "delete", NAME, check=False)


def test_guest_gets_a_vf_per_nic(host: LabHost, guests: list[dict[str, Any]], guest: dict[str, Any]) -> None:
    assert guest["vf"].items() <= guest["nics"][0].items()
    assert [nic["interface"] for nic in guest["nics"]] == ["nic0", "nic0"]
    vfs = [nic["address"] for one in (*guests, guest) for nic in one["nics"]]
    assert len(set(vfs)) == 4
    for nic in guest["nics"]:
        assert host.run(f"readlink /sys/bus/pci/devices/{nic['address']}/driver").stdout.strip().endswith("/vfio-pci")
        assert f"vf {nic['index']} " in (links := host.run("ip link show nic0").stdout)
        assert nic["mac"] in links


def test_first_nic_is_the_first_interface_of_the_guest(host: LabHost, guest: dict[str, Any]) -> None:
    assert host.nohype("guest", "tell", NAME, "mac").stdout.strip().endswith(f"nohype: done mac {guest['nics'][0]['mac']}")


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize("peer", [peer for _, peer in NICS])
def test_frames_go_out_over_each_nic(host: LabHost, peer: str) -> None:
    assert " received=3 " in host.nohype("guest", "tell", NAME, f"ping {peer} 3").stdout


@pytest.mark.usefixtures("guest")
def test_audit_accepts_both_vfs(host: LabHost) -> None:
    """Each proof says of this guest what it says of one with a single NIC."""
    proofs = host.proofs()
    names = [name for name, subject in proofs if subject == "guest1"]
    assert names
    assert {name: proofs[name, NAME].verdict for name in names} == {name: proofs[name, "guest1"].verdict for name in names}


def test_deleted_guest_leaves_its_vfs_as_they_were(host: LabHost, guest: dict[str, Any], before: Any) -> None:
    """The last test of the module."""
    host.nohype("guest", "delete", NAME)
    for nic in guest["nics"]:
        assert host.run(f"test ! -e /sys/bus/pci/devices/{nic['address']}/driver", check=False).status == 0
        assert nic["mac"] not in host.run("ip link show nic0").stdout
    assert survey(host) == before
