"""Two labs as two hosts behind one switch: guests of one network reach each other across hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.lab import control, switch
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.progress import Timeline
from orchestrator.lab.spec import load_spec
from orchestrator.lab.start import start_lab
from tests.lab.conftest import LabHost, connected
from tests.lab.test_manager import MEMORY
from tests.lab.test_networks import ping

pytestmark = pytest.mark.soak

VLAN = "300"


@pytest.fixture(scope="module")
def second(host: LabHost) -> Iterator[LabHost]:
    """Another host behind the switch of the lab."""
    name = f"{host.lab.name}-2"
    lab = start_lab(name, load_spec("small"), AccelChoice.AUTO, Timeline(), switch_of=host.lab.name)
    try:
        with connected(lab) as found:
            yield found
    finally:
        control.down(name)


@pytest.fixture(scope="module")
def members(empty_host: LabHost, second: LabHost) -> Iterator[dict[str, dict[str, Any]]]:
    """A guest of the network on each host, one of another network with the same subnet on the second."""
    places = {"here": (empty_host, "blue", "10.4.0.1/24"), "there": (second, "blue", "10.4.0.2/24")}
    places |= {"other": (second, "red", "10.4.0.3/24")}
    try:
        for host in (empty_host, second):
            host.nohype("network", "create", "blue", "--vlan", VLAN)
        second.nohype("network", "create", "red", "--vlan", "301")
        shown = {}
        for name, (host, network, address) in places.items():
            words = ("--nic", f"network={network},address={address}", "--wait", "300", "--json")
            shown[name] = json.loads(host.nohype("guest", "create", name, *MEMORY, *words).stdout)
        yield shown
    finally:
        for name, (host, _, _) in places.items():
            host.nohype("guest", "delete", name, check=False)
        for host in (empty_host, second):
            for network in ("blue", "red"):
                host.nohype("network", "delete", network, check=False)


def test_guests_of_one_network_reach_each_other_across_hosts(
    empty_host: LabHost, second: LabHost, members: dict[str, dict[str, Any]]
) -> None:
    assert ping(empty_host, "here", "10.4.0.2", 5) >= 4
    assert ping(second, "there", "10.4.0.1", 5) == 5
    assert ping(empty_host, "here", "10.4.0.3") == 0, "of another network, in the same subnet"
    addresses = [members[name]["nics"][0]["mac"] for name in members]
    assert len(set(addresses)) == 3, "addresses are unique across hosts"


@pytest.mark.usefixtures("members")
def test_each_manager_has_a_port_of_the_same_switch(empty_host: LabHost, second: LabHost) -> None:
    ports = {host.lab.name: switch.port(host.lab.name) for host in (empty_host, second)}
    assert len({port.netns for port in ports.values()}) == 1
    for host in (empty_host, second):
        (view,) = json.loads(host.nohype("switch", "list", "--json").stdout)
        assert [(tie["uplink"], tie["port"]) for tie in view["uplinks"]] == [("nic0", ports[host.lab.name].interface)]
        assert host.nohype("switch", "verify", "lab").stdout
