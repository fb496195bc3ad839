"""Who may create which tenant network, and with which VLAN."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import Conflict, Forbidden, NoRoom, NotFound, OrchestratorError, QuotaExceeded, RequestError
from orchestrator.model.access import OPERATOR, Identity, Quota, Role
from orchestrator.model.network import RESERVED, Network, describe_vlans, parse_network_request, parse_vlans
from orchestrator.planning.network import check_access, explain_not_carried, find_network, plan_network
from tests.unit.test_plan import POLICY

ACME = Identity("alice", Role.TENANT, "acme", Quota(networks=2))
BOLT = Identity("bob", Role.TENANT, "bolt")
VIEWER = Identity("carol", Role.VIEWER)
RANGES = replace(POLICY, vlans={"nic0": parse_vlans("100-102")}, tenants=frozenset({"acme", "bolt"}))


def known(*networks: Network) -> dict[str, Network]:
    return {network.name: network for network in networks}


def plan(caller: Identity, existing: dict[str, Network] | None = None, **fields: object) -> Network:
    request = parse_network_request({"name": "blue", **fields})
    check_access(caller, request)
    return plan_network(caller, request, existing or {}, RANGES)


@pytest.mark.parametrize(("text", "vlans"), [("7", {7}), ("100-102, 300", {100, 101, 102, 300}), ("1-4094", set(range(1, 4095)))])
def test_vlans_are_read(text: str, vlans: set[int]) -> None:
    assert parse_vlans(text) == vlans
    assert parse_vlans(describe_vlans(parse_vlans(text))) == vlans


@pytest.mark.parametrize(
    "text", ["", "0", "4095", "0-5", "4000-5000", "9-7", "a", "1-", "-1", "1,,2", "1-2-3", "²", "1" * 5000, "+5", "0x10"]
)
def test_vlans_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="VLAN"):
        parse_vlans(text)


def test_no_vlan_is_none() -> None:
    assert describe_vlans(frozenset()) == "none"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        *(({"name": name}, "reserved") for name in RESERVED),
        ({"name": "Blue"}, "is not a guest name"),
        ({"name": ""}, "is not a guest name"),
        ({"name": "a/b"}, "is not a guest name"),
        ({"vlan": 0}, "vlan: "),
        ({"vlan": 4095}, "vlan: "),
        ({"vlan": -1}, "vlan: "),
        ({"vlan": "100"}, "vlan: "),
        ({"vlan": 100.0}, "vlan: "),
        ({"vlan": True}, "vlan: "),
        ({"owner": "A B"}, "owner: "),
        ({"mtu": 9000}, "mtu: "),
    ],
)
def test_bad_request_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_network_request({"name": "blue", **fields})


def test_lowest_free_vlan_of_the_ranges_is_chosen() -> None:
    assert plan(ACME) == Network("blue", 100, "acme")
    assert plan(ACME, known(Network("red", 100, "bolt"), Network("green", 102))) == Network("blue", 101, "acme")


def test_no_free_vlan() -> None:
    full = known(*(Network(f"n{vlan}", vlan) for vlan in (100, 101, 102)))
    with pytest.raises(NoRoom, match="all of VLANs 100-102 are used by networks"):
        plan(BOLT, full)
    with pytest.raises(NoRoom, match="no uplink has a range of VLANs"):
        plan_network(BOLT, parse_network_request({"name": "blue"}), {}, POLICY)


def test_same_request_gives_the_same_network() -> None:
    for caller, network in ((ACME, Network("blue", 100, "acme")), (OPERATOR, Network("blue", 300))):
        assert plan(caller, known(network)) == network
    assert plan(OPERATOR, known(Network("blue", 100)), vlan=100) == Network("blue", 100)
    full = replace(ACME, quota=Quota(networks=0))
    assert plan(full, known(Network("blue", 100, "acme"))).vlan == 100, "a repeated request needs no quota"


@pytest.mark.parametrize(
    ("caller", "existing", "fields", "error", "says"),
    [
        (BOLT, Network("blue", 100, "acme"), {}, Conflict, "^the name blue is taken\n"),
        (BOLT, Network("blue", 100), {}, Conflict, "^the name blue is taken\n"),
        (OPERATOR, Network("blue", 100, "acme"), {}, Conflict, "a network blue of tenant acme with VLAN 100"),
        (OPERATOR, Network("blue", 100), {"vlan": 101}, Conflict, "a network blue of the host with VLAN 100"),
        (OPERATOR, Network("red", 100), {"vlan": 100}, Conflict, "VLAN 100 is used by network red"),
        (OPERATOR, Network("red", 100), {"vlan": 103}, RequestError, "no uplink carries VLAN 103"),
        (OPERATOR, Network("red", 100), {"owner": "corp"}, RequestError, "there is no tenant named corp"),
        (ACME, Network("red", 100), {"vlan": 101}, Forbidden, "may not choose a VLAN"),
        (ACME, Network("red", 100), {"owner": "bolt"}, Forbidden, "may not create networks of tenant bolt"),
        (ACME, Network("red", 100), {"owner": ""}, Forbidden, "may not create networks"),
        (VIEWER, Network("red", 100), {}, Forbidden, "carol may not create networks"),
    ],
)
def test_request_that_is_refused(
    caller: Identity, existing: Network, fields: dict[str, object], error: type[OrchestratorError], says: str
) -> None:
    with pytest.raises(error) as caught:
        plan(caller, known(existing), **fields)
    assert type(caught.value) is error
    caught.match(says)


def test_quota_of_a_tenant_counts_its_own_networks() -> None:
    one, two = Network("one", 100, "acme"), Network("two", 101, "bolt")
    assert plan(ACME, known(one, two)).vlan == 102
    with pytest.raises(QuotaExceeded, match="tenant acme with network 'blue': 3 of 2 networks"):
        plan(ACME, known(one, replace(two, owner="acme")))
    assert plan(OPERATOR, known(one, replace(two, owner="acme")), owner="acme").owner == "acme", "operators decide themselves"


def test_network_of_another_tenant_does_not_exist() -> None:
    networks = known(Network("blue", 100, "acme"), Network("host-net", 101))
    assert find_network(OPERATOR, "blue", networks).vlan == find_network(ACME, "blue", networks).vlan == 100
    messages = set()
    for name in ("blue", "host-net", "absent"):
        with pytest.raises(NotFound) as caught:
            find_network(BOLT, name, networks)
        messages.add(str(caught.value).replace(name, "NAME"))
    assert len(messages) == 1, "the answer tells that it is there"


def test_uplink_carries_its_range_or_every_vlan() -> None:
    assert explain_not_carried(RANGES, "nic0", Network("blue", 102)) == ""
    assert "does not carry VLAN 103 of network blue ([uplinks.nic0] vlans = 100-102)" in explain_not_carried(
        RANGES, "nic0", Network("blue", 103)
    )
    assert explain_not_carried(RANGES, "nic1", Network("blue", 103)) == ""


def test_uplink_does_not_carry_the_vlans_of_single_guests() -> None:
    policy = replace(POLICY, uplinks=("nic1",), channels={"nic1": parse_vlans("1000-1199")})
    assert explain_not_carried(policy, "nic1", Network("blue", 999)) == ""
    says = "it keeps VLAN 1000 of network blue for single guests ([uplinks.nic1] channels)"
    assert explain_not_carried(policy, "nic1", Network("blue", 1000)) == says
    with pytest.raises(RequestError, match="no uplink carries VLAN 1000"):
        plan_network(OPERATOR, parse_network_request({"name": "blue", "vlan": 1000}), {}, policy)
