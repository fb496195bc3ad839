"""Networks in the ledger: a VLAN belongs to one network, and a network in use stays."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, LedgerError, LostRace
from orchestrator.guests.networks import Networks
from orchestrator.guests.refusals import RefusalLog
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.network import Network, parse_network_request, parse_vlans
from orchestrator.model.plan import Plan
from orchestrator.planning.network import plan_network
from tests.unit.test_ledger import make_plan, make_request
from tests.unit.test_plan import POLICY

BLUE, RED = Network("blue", 100, "acme"), Network("red", 101)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def make(ledger: Ledger, network: Network) -> bool:
    return ledger.create_network(lambda _: network)[1]


def joined(number: int, network: Network) -> Plan:
    plan = make_plan(number)
    return replace(plan, nics=(replace(plan.vf, network=network.name, vlan=network.vlan),))


def claim(ledger: Ledger, plan: Plan) -> None:
    ledger.claim(plan, ledger.read().generation, make_request(plan))


def accept(_guests: Sequence[str]) -> None:
    """Any guests."""


def refuse(guests: Sequence[str]) -> None:
    if guests:
        raise Conflict(f"used by {', '.join(guests)}")


def test_networks_outlive_the_manager(path: Path) -> None:
    with Ledger(path) as ledger:
        assert make(ledger, RED)
        assert make(ledger, BLUE)
        assert not make(ledger, BLUE), "it exists already"
        claim(ledger, joined(1, BLUE))
    with Ledger(path) as ledger:
        assert list(ledger.networks().values()) == [BLUE, RED]
        assert ledger.read().claims[0].plan.vf.network == "blue"


@pytest.mark.parametrize("other", [replace(RED, vlan=BLUE.vlan), replace(BLUE, vlan=200)])
def test_a_vlan_and_a_name_belong_to_one_network(path: Path, other: Network) -> None:
    """Also if the one who chooses has a fault."""
    with Ledger(path) as ledger:
        make(ledger, BLUE)
        with pytest.raises(Conflict, match="is taken"):
            make(ledger, other)
        assert list(ledger.networks().values()) == [BLUE]


def test_choice_is_made_on_the_networks_of_the_file(path: Path) -> None:
    with Ledger(path) as ledger:
        make(ledger, BLUE)

        def choose(known: Mapping[str, Network]) -> Network:
            assert known == {"blue": BLUE}
            raise Conflict("refused")

        with pytest.raises(Conflict, match="refused"):
            ledger.create_network(choose)
        assert make(ledger, RED), "a refusal leaves no transaction open"


def test_network_in_use_is_not_deleted(path: Path) -> None:
    with Ledger(path) as ledger:
        make(ledger, BLUE)
        claim(ledger, joined(1, BLUE))
        claim(ledger, make_plan(2))
        with pytest.raises(Conflict, match="used by g1$"):
            ledger.delete_network(BLUE, refuse)
        ledger.release("g1")
        ledger.delete_network(BLUE, refuse)
        assert ledger.networks() == {}
        with pytest.raises(LostRace, match="network blue was changed meanwhile"):
            ledger.delete_network(BLUE, refuse)


@pytest.mark.parametrize("now", [None, replace(BLUE, vlan=102)])
def test_plan_on_a_network_that_has_changed_is_not_claimed(path: Path, now: Network | None) -> None:
    with Ledger(path) as ledger:
        make(ledger, BLUE)
        plan = joined(1, BLUE)
        ledger.delete_network(BLUE, accept)
        if now:
            make(ledger, now)
        with pytest.raises(LostRace, match="network blue with VLAN 100 has changed while guest g1 was planned"):
            claim(ledger, plan)
        assert ledger.read().claims == ()


def test_network_that_another_tenant_has_created_again_is_not_claimed(path: Path) -> None:
    """With the same name and VLAN."""
    with Ledger(path) as ledger:
        make(ledger, BLUE)
        plan = joined(1, BLUE)
        ledger.delete_network(BLUE, accept)
        make(ledger, replace(BLUE, owner="other"))
        with pytest.raises(LostRace, match="network blue with VLAN 100 has changed while guest g1 was planned"):
            ledger.claim(plan, ledger.read().generation, make_request(plan), "acme")
        assert ledger.read().claims == ()
        ledger.claim(plan, ledger.read().generation, make_request(plan), "other")


def test_vlan_without_network_is_not_claimed(path: Path) -> None:
    with Ledger(path) as ledger, pytest.raises(LostRace):
        claim(ledger, joined(1, Network("", 100)))


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("INSERT INTO network VALUES ('host', 105, '')", "'host' is reserved"),
        ("INSERT INTO network VALUES ('a b', 105, '')", "'a b' is not a guest name"),
        ("INSERT INTO network VALUES ('green', 4095, '')", "VLAN 4095 of network green"),
        ("INSERT INTO network VALUES ('green', 0, '')", "VLAN 0 of network green"),
        ("INSERT INTO network VALUES ('green', 105, 'A')", "'A' is not a guest name"),
        ("DELETE FROM network WHERE name = 'blue'", "guest g1: its plan has network blue with VLAN 100, but the table"),
        ("UPDATE network SET vlan = 200 WHERE name = 'blue'", "guest g1: its plan has network blue with VLAN 100"),
    ],
)
def test_damaged_networks_are_refused(path: Path, statement: str, says: str) -> None:
    with Ledger(path) as ledger:
        make(ledger, BLUE)
        claim(ledger, joined(1, BLUE))
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(statement)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=says):
        Ledger(path)
    assert path.read_bytes() == before


def test_change_whose_event_cannot_be_written_is_done(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_words: object, **_more: object) -> None:
        raise LedgerError("the disk is full")

    policy = replace(POLICY, vlans={"nic0": parse_vlans("100-119")})
    with Ledger(path) as ledger:
        networks = Networks(ledger, policy, RefusalLog(ledger, lambda *_: None))
        monkeypatch.setattr(ledger, "append_event", fail)
        view, new = networks.create(OPERATOR, parse_network_request({"name": "blue"}))
        assert (view.network, new) == (Network("blue", 100), True)
        networks.delete(OPERATOR, "blue")
        assert ledger.networks() == {}


def test_networks_that_are_created_at_the_same_time_differ(path: Path) -> None:
    policy = replace(POLICY, vlans={"nic0": parse_vlans("100-119")})
    with Ledger(path) as ledger, ThreadPoolExecutor(8) as pool:

        def create(number: int) -> tuple[Network, bool]:
            request = parse_network_request({"name": f"net{number // 2}"})  # each is requested twice
            return ledger.create_network(lambda known: plan_network(OPERATOR, request, known, policy))

        made = list(pool.map(create, range(40)))
    assert sorted(network.vlan for network, new in made if new) == list(range(100, 120))
    assert len({network.name for network, _ in made}) == 20
