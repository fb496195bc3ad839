"""Which uplink a guest of a network gets, and the reason where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import NoRoom
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import Network, parse_vlans
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.topology import Interface
from orchestrator.model.waiver import Waiver
from orchestrator.planning.inputs import Site
from orchestrator.planning.planner import plan_guest
from orchestrator.values import MacAddress
from tests.unit.test_plan import POLICY, groups, host, nic, request, second_nic

SITE = Site({"blue": Network("blue", 100, "acme"), "red": Network("red", 200)}, "1234")
BOTH = replace(POLICY, uplinks=("nic0", "nic1"), vlans={"nic0": parse_vlans("100-199"), "nic1": parse_vlans("200-299")})
FIRST, SECOND = nic(), second_nic()
TWO = host(pfs=(FIRST, SECOND), iommu_groups=groups((FIRST.address,), (SECOND.address,)))


def plan(policy: Policy, *nics: dict[str, object]) -> Plan:
    return plan_guest(request(nics=list(nics)), TWO, Allocated(), policy, SITE)


def test_nic_gets_network_vlan_and_rate() -> None:
    first, second, third = plan(POLICY, {"network": "blue", "rate": 50}, {"network": "red"}, {}).nics
    assert (first.network, first.vlan, first.rate) == ("blue", 100, 50)
    assert (second.network, second.vlan, second.rate) == ("red", 200, 0)
    assert (third.network, third.vlan, third.rate) == ("", 0, 0)
    assert first.vf
    assert (first.vf.vlan, first.vf.rate) == (100, 50)


def test_uplink_that_carries_the_network_is_chosen() -> None:
    assert plan(BOTH, {"network": "blue"}).vf.interface == "nic0"
    assert plan(BOTH, {"network": "red"}).vf.interface == "nic1"
    named = plan(BOTH, {"network": "red", "uplink": "nic1"}, {"network": "blue", "uplink": "nic0"})
    assert [one.interface for one in named.nics] == ["nic1", "nic0"]


def test_uplink_without_a_range_carries_every_network() -> None:
    assert plan(replace(BOTH, vlans={"nic0": parse_vlans("100-199")}), {"network": "red"}).vf.interface == "nic1"


@pytest.mark.parametrize(
    ("nics", "says"),
    [
        (
            [{"network": "red", "uplink": "nic0"}],
            "uplink nic0: it does not carry VLAN 200 of network red ([uplinks.nic0] vlans = 100-199)",
        ),
        (
            [{"network": "blue"}, {"network": "red"}],
            "uplink nic0: it does not carry VLAN 200 of network red ([uplinks.nic0] vlans = 100-199) (NIC 2 of 2)",
        ),
    ],
)
def test_refusal_names_the_uplink_and_its_range(nics: list[dict[str, object]], says: str) -> None:
    with pytest.raises(NoRoom) as caught:
        plan(BOTH, *nics)
    assert says in caught.value.reasons


def test_nic_without_a_network_is_kept_off_uplinks_with_networks_of_others() -> None:
    """Without a port VLAN it could enter them."""
    site = replace(SITE, closed=(Network("green", 201, "corp"),))

    def plan_one(*nics: dict[str, object]) -> Plan:
        return plan_guest(request(nics=list(nics)), TWO, Allocated(), BOTH, site)

    assert plan_one({}).vf.interface == "nic0", "which does not carry VLAN 201"
    assert plan_one({"network": "red"}).vf.interface == "nic1"
    for nics in ([{"uplink": "nic1"}], [{"network": "red"}, {}]):
        with pytest.raises(NoRoom) as caught:
            plan_one(*nics)
        text = "uplink nic1: a NIC without a network could enter the networks of others; request a network"
        assert any(reason.startswith(text) for reason in caught.value.reasons)


@pytest.mark.parametrize("wanted", [{"network": "blue"}, {"rate": 50}])
def test_software_edge_has_neither_networks_nor_rates(wanted: dict[str, object]) -> None:
    policy = replace(POLICY, edges=(("nic0", EdgeMode.MACVTAP_VEPA),), accept=(Waiver.SOFTWARE_EDGE,))
    topology = replace(TWO, interfaces=(Interface("nic0", True, MacAddress("52:54:00:00:01:00"), None, None),))

    def plan_one(**fields: object) -> Plan:
        return plan_guest(request(nics=[fields]), topology, Allocated(), policy, SITE)

    assert plan_one().vf.edge is EdgeMode.MACVTAP_VEPA
    with pytest.raises(NoRoom, match="with edge mode macvtap-vepa a NIC can have neither a network nor a rate"):
        plan_one(**wanted)


def test_software_edge_without_an_interface_is_refused_with_a_reason() -> None:
    with pytest.raises(NoRoom) as caught:
        plan(replace(POLICY, edges=(("nic0", EdgeMode.MACVTAP_VEPA),)), {})
    assert "uplink nic0: there is no Ethernet interface nic0 for edge mode macvtap-vepa" in caught.value.reasons
