"""Tenant networks over HTTP: who may create, see, join and delete them, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.client.problems import STATUS
from orchestrator.errors import Conflict, LostRace, NoRoom, NotFound, RequestError
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.network import parse_vlans
from orchestrator.model.plan import Policy
from tests.harness.api_server import Served, serve
from tests.harness.crash import World
from tests.service.test_api_access import ALICE, BOB, CAROL, REQUEST, SETTINGS, ask, open_to_all

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")

TENANTS: dict[str, Any] = SETTINGS["tenants"]  # type: ignore[assignment]
NETWORK_SETTINGS = {**SETTINGS, "tenants": {**TENANTS, "acme": {**TENANTS["acme"], "networks": 2}}}


class NetworkWorld(World):
    """A host of which one uplink carries some VLANs."""

    def open_manager(self, policy: Policy | None = None) -> tuple[GuestService, Ledger]:
        vlans, tenants = {"nic0": parse_vlans("100-103")}, frozenset({"acme", "bolt"})
        return super().open_manager(policy or replace(self.server.policy, vlans=vlans, tenants=tenants))


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("networks")
    with serve(folder, NETWORK_SETTINGS, world=NetworkWorld(folder / "world")) as served:
        open_to_all(served.path)
        yield served


def join(served: Served, user: str, name: str, *networks: str, **fields: object) -> tuple[int, Any]:
    nics = [{"network": network} for network in networks]
    return ask(served, user, "POST", "/v1/guests", {"name": name, "nics": nics, **REQUEST, **fields})


def test_life_of_a_network(served: Served) -> None:
    client = served.client
    made = client.create_network({"name": "blue"})
    assert made == {"name": "blue", "vlan": 100, "owner": "", "guests": []}
    assert client.create_network({"name": "blue"}) == made
    assert client.create_network({"name": "red", "vlan": 103, "owner": "acme"})["vlan"] == 103
    assert [network["name"] for network in client.networks()] == ["blue", "red"]
    guest = client.create({"name": "web", "nics": [{"network": "blue"}, {"network": "red"}, {}], **REQUEST})
    assert [(nic["network"], nic["vlan"]) for nic in guest["nics"]] == [("blue", 100), ("red", 103), ("", 0)]
    assert client.network("blue")["guests"] == ["web"]
    client.stop("web", 1)
    with pytest.raises(Conflict, match="network blue is in use by guests: web"):
        client.delete_network("blue")
    client.delete("web")
    client.delete_network("blue")
    for gone in (client.network, client.delete_network):
        with pytest.raises(NotFound, match="there is no network named blue"):
            gone("blue")
    events = [(event["kind"], event["subject"], event["detail"], event["tenant"]) for event in client.events()]
    assert [event for event in events if event[0].startswith("network-")] == [
        ("network-created", "network/blue", "VLAN 100", ""),
        ("network-created", "network/red", "VLAN 103", "acme"),
        ("network-deleted", "network/blue", "VLAN 100", ""),
    ]


def test_repeated_request_gets_200(served: Served) -> None:
    assert [ask(served, ALICE, "POST", "/v1/networks", {"name": "blue"})[0] for _ in range(2)] == [201, 200]


def test_tenant_needs_a_network_once_others_have_one(served: Served) -> None:
    served.client.create_network({"name": "mine", "owner": "acme"})
    assert join(served, ALICE, "first")[0] == 400
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "flat", **REQUEST})[0] == 201
    served.client.create_network({"name": "theirs", "owner": "bolt"})
    status, problem = ask(served, ALICE, "POST", "/v1/guests", {"name": "late", **REQUEST})
    says = "a NIC without a network could enter the networks of others; request a network"
    assert (status, problem["reasons"]) == (409, [f"uplink {name}: {says}" for name in ("nic0", "nic1")])
    assert join(served, ALICE, "member", "mine")[0] == 201
    assert served.client.create({"name": "operators", **REQUEST})["nics"][0]["network"] == ""


def test_network_of_another_tenant_does_not_exist(served: Served) -> None:
    assert ask(served, ALICE, "POST", "/v1/networks", {"name": "blue"})[1]["owner"] == "acme"
    served.client.create_network({"name": "hosts"})
    assert ask(served, BOB, "GET", "/v1/networks") == (200, [])
    for name in ("blue", "hosts"):
        for method in ("GET", "DELETE"):
            status, problem = ask(served, BOB, method, f"/v1/networks/{name}")
            absent = ask(served, BOB, method, "/v1/networks/absent")[1]
            assert (status, problem["detail"]) == (404, absent["detail"].replace("absent", name))
        for target in ("/v1/guests", "/v1/plans"):
            body = {"name": "spy", "nics": [{"network": name}], **REQUEST}
            status, problem = ask(served, BOB, "POST", target, body)
            absent = ask(served, BOB, "POST", target, {**body, "nics": [{"network": "absent"}]})[1]
            assert (status, problem["detail"]) == (404, absent["detail"].replace("absent", name))
    status, problem = ask(served, BOB, "POST", "/v1/networks", {"name": "blue"})
    assert (status, problem["code"], problem["detail"]) == (409, "conflict", "the name blue is taken")
    assert [event["subject"] for event in ask(served, BOB, "GET", "/v1/events")[1] if event["kind"].startswith("network")] == []


def test_only_the_owners_guests_and_those_of_operators_join(served: Served) -> None:
    ask(served, ALICE, "POST", "/v1/networks", {"name": "blue"})
    assert join(served, ALICE, "one", "blue")[0] == 201
    served.client.create({"name": "two", "nics": [{"network": "blue"}], **REQUEST})
    assert ask(served, ALICE, "GET", "/v1/networks/blue")[1]["guests"] == ["one"]
    assert served.client.network("blue")["guests"] == ["one", "two"]
    status, problem = ask(served, ALICE, "DELETE", "/v1/networks/blue")
    assert status == 409
    assert "in use by guests: one, 1 of the operator" in problem["detail"]
    served.client.delete("one")
    assert "in use by guests: 1 of the operator" in ask(served, ALICE, "DELETE", "/v1/networks/blue")[1]["detail"]
    served.client.delete("two")
    assert ask(served, ALICE, "DELETE", "/v1/networks/blue")[0] == 204


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"name": "host"}, 400, "bad-request", "'host' is reserved"),
        ({"name": "blue", "vlan": 100}, 403, "forbidden", "may not choose a VLAN"),
        ({"name": "blue", "owner": "bolt"}, 403, "forbidden", "may not create networks of tenant bolt"),
        ({"name": "blue", "vlan": 4095}, 400, "bad-request", "vlan: "),
        ({"name": "blue", "mtu": 9000}, 400, "bad-request", "mtu: "),
        ({"name": "blue", "vlan": None, "owner": "\x00"}, 400, "bad-request", "owner: "),
        ({}, 400, "bad-request", "name: "),
        ([], 400, "bad-request", "invalid request"),
    ],
)
def test_bad_request(served: Served, body: object, status: int, code: str, says: str) -> None:
    answer, problem = ask(served, ALICE, "POST", "/v1/networks", body)
    assert (answer, problem["code"]) == (status, code)
    assert says in problem["detail"]
    assert served.client.networks() == []


def test_operator_gets_the_reason(served: Served) -> None:
    client = served.client
    client.create_network({"name": "blue", "vlan": 101})
    with pytest.raises(Conflict, match="VLAN 101 is used by network blue"):
        client.create_network({"name": "red", "vlan": 101})
    with pytest.raises(Conflict, match="there is a network blue of the host with VLAN 101"):
        client.create_network({"name": "blue", "vlan": 102})
    with pytest.raises(RequestError, match="there is no tenant named corp"):
        client.create_network({"name": "red", "owner": "corp"})
    refused = [(event["kind"], event["subject"]) for event in client.events() if event["kind"] != "network-created"]
    assert refused == [("refused", "network/red"), ("refused", "network/blue"), ("refused", "network/red")]
    client.create_network({"name": "far", "vlan": 300})  # nic1 has no range
    with pytest.raises(
        NoRoom, match=r"uplink nic0: it does not carry VLAN 300 of network far \(\[uplinks.nic0\] vlans = 100-103"
    ):
        client.plan({"name": "web", "nics": [{"network": "far", "uplink": "nic0"}], **REQUEST})
    assert client.plan({"name": "web", "nics": [{"network": "far"}], **REQUEST})["nics"][0]["interface"] == "nic1"


def test_quota(served: Served) -> None:
    for name in ("one", "two"):
        assert ask(served, ALICE, "POST", "/v1/networks", {"name": name})[0] == 201
    status, problem = ask(served, ALICE, "POST", "/v1/networks", {"name": "three"})
    assert (status, problem["code"]) == (STATUS["quota"], "quota")
    assert problem["reasons"] == ["tenant acme with network 'three': 3 of 2 networks"]
    assert ask(served, ALICE, "POST", "/v1/networks", {"name": "two"})[0] == 200
    assert ask(served, BOB, "POST", "/v1/networks", {"name": "three"})[0] == 201


def test_viewer_reads_and_changes_nothing(served: Served) -> None:
    served.client.create_network({"name": "blue"})
    assert ask(served, CAROL, "GET", "/v1/networks/blue")[0] == 200
    assert len(ask(served, CAROL, "GET", "/v1/networks")[1]) == 1
    assert ask(served, CAROL, "POST", "/v1/networks", {"name": "red"})[0] == 403
    assert ask(served, CAROL, "DELETE", "/v1/networks/blue")[0] == 403
    assert ask(served, ALICE, "POST", "/v1/networks", {"name": "green", "vlan": 101})[0] == 403
    assert [event["kind"] for event in served.client.events()] == ["network-created"], "what is forbidden fills no log"


def test_network_that_disappears_while_a_guest_is_planned(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served.client
    client.create_network({"name": "blue"})
    known = served.ledger.networks()
    client.delete_network("blue")
    with monkeypatch.context() as patch:
        patch.setattr(served.ledger, "networks", lambda: known)
        with pytest.raises(LostRace, match="network blue with VLAN 100 has changed while guest web was planned"):
            client.create({"name": "web", "nics": [{"network": "blue"}], **REQUEST})
    assert served.ledger.read().claims == ()
