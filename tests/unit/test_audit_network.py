"""network-isolated passes on the settings that the manager promised, and fails for each that another program changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.audit.catalogue import PROOFS
from orchestrator.audit.facts import Facts, Source, read_vfs
from orchestrator.audit.network import Promised, Readings, Strays, VfReading, prove_network_isolated
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor.guests import EmulatedNic
from orchestrator.model.access import OPERATOR
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.network import parse_network_request
from orchestrator.model.plan import NicPlan
from orchestrator.model.proof import WEAKER, Measurement, Verdict
from orchestrator.model.topology import VfState
from orchestrator.values import MacAddress, PciAddress
from tests.harness.audit_data import GUEST1, GUEST2
from tests.harness.crash import World
from tests.harness.guests import create

PF = PciAddress.parse("0000:41:00.0")
(VF,), OTHER = GUEST1.hostdevs, PciAddress.parse("0000:41:10.6")
MAC = MacAddress("02:4e:48:00:00:01")
NIC = NicPlan(PF, "nic0", 0, VF, MAC, network="blue", vlan=100, rate=50)
STATE = VfState(0, MAC, vlan=100, max_rate=50)
FREE = VfReading("nic0", VfState(3))


def prove(
    state: VfState | str = STATE, nic: NicPlan | None = NIC, others: Readings | None = None, more: Promised | None = None
) -> Measurement:
    reading = state if isinstance(state, str) else VfReading("nic0", state)
    promised = {GUEST1.name: None if nic is None else (nic,), **(more or {})}
    return prove_network_isolated(GUEST1, {VF: reading, OTHER: FREE, **(others or {})}, promised)


def test_promised_settings_pass() -> None:
    proof = prove()
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert proof.evidence == (f"VF {VF}: network blue, port VLAN 100, address {MAC}, at most 50 Mbit/s, VF 0 of nic0 (netlink)",)
    untagged = prove(VfState(0, MAC), replace(NIC, network="", vlan=0, rate=0), {OTHER: VfReading("nic0", VfState(3))})
    assert untagged.verdict is Verdict.PASS
    assert "no network, untagged" in untagged.evidence[0]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (replace(STATE, vlan=0), "port VLAN is none, expected 100 (network blue)"),
        (replace(STATE, vlan=101), "port VLAN is 101, expected 100 (network blue)"),
        (replace(STATE, mac=MacAddress("02:4e:48:00:00:02")), "address is 02:4e:48:00:00:02, expected 02:4e:48:00:00:01"),
        (replace(STATE, mac=None), "address is none, expected 02:4e:48:00:00:01"),
        (replace(STATE, max_rate=0), "rate is none, expected 50"),
        (replace(STATE, spoof_check=False), "the spoof check is off"),
        (replace(STATE, trust=True), "trusted: it can change its address"),
        (replace(STATE, link_state="disable"), "its link is disabled"),
    ],
)
def test_each_changed_setting_fails(state: VfState, says: str) -> None:
    proof = prove(state)
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert says in proof.evidence[0]
    assert str(VF) in proof.evidence[0]


def test_vf_of_no_guest_in_the_vlan_fails() -> None:
    proof = prove(others={OTHER: VfReading("nic0", VfState(3, vlan=100))})
    assert proof.verdict is Verdict.FAIL
    assert proof.evidence[0] == f"VF {OTHER} of nic0 has port VLAN 100 too, and is not in this network"


def test_guest_of_another_network_in_the_vlan_fails() -> None:
    others = {OTHER: VfReading("nic0", VfState(3, vlan=100))}
    nic = replace(NIC, index=3, address=OTHER)
    assert prove(others=others, more={GUEST2.name: (nic,)}).verdict is Verdict.PASS
    assert prove(others=others, more={GUEST2.name: (replace(nic, network="red", vlan=101),)}).verdict is Verdict.FAIL


def test_guest_of_no_network_on_the_same_pf_is_named() -> None:
    """It is weaker, not a failure: the settings are those that were requested."""
    nic = replace(NIC, index=3, address=OTHER, network="", vlan=0)
    proof = prove(more={GUEST2.name: (nic,)})
    assert proof.verdict is Verdict.PASS
    assert proof.evidence[-1].startswith(f"{WEAKER}a guest that is in no network can use each VLAN of nic0")
    assert proof.evidence[-1].endswith(f": {GUEST2.name} (VF 3)")
    elsewhere = prove(others={OTHER: VfReading("nic1", VfState(3))}, more={GUEST2.name: (nic,)})
    assert not [line for line in elsewhere.evidence if line.startswith(WEAKER)]


def test_same_vlan_on_another_pf_is_not_a_finding() -> None:
    """It leaves the host through another port."""
    assert prove(others={OTHER: VfReading("nic1", VfState(3, vlan=100))}).verdict is Verdict.PASS


@pytest.mark.parametrize("uplink", ["nic0", "nic1"])
def test_vf_with_the_same_address_fails(uplink: str) -> None:
    proof = prove(others={OTHER: VfReading(uplink, VfState(3, MAC))})
    assert proof.verdict is Verdict.FAIL
    assert proof.evidence[0] == f"VF {OTHER} of {uplink} has the same address {MAC}"


@pytest.mark.parametrize("changes", [{"spoof_check": None}, {"trust": None}])
def test_what_the_driver_does_not_report_is_a_limit(changes: dict[str, object]) -> None:
    proof = prove(replace(STATE, **changes))  # type: ignore[arg-type]
    assert proof.verdict is Verdict.PASS
    assert proof.evidence[1].startswith(WEAKER)


def test_settings_that_cannot_be_read_never_pass() -> None:
    proof = prove("no such device")
    assert (proof.verdict, proof.evidence) == (Verdict.NOT_MEASURED, (f"VF {VF} could not be read: no such device",))
    two = replace(GUEST1, hostdevs=(VF, OTHER))
    mixed = prove_network_isolated(two, {VF: "gone", OTHER: VfReading("nic0", VfState(3, trust=True))}, {GUEST1.name: (NIC,)})
    assert mixed.verdict is Verdict.FAIL


def test_vf_that_the_survey_lacks_is_not_measured() -> None:
    """As of a PF that could not be read: it is left out of the survey."""
    proof = prove_network_isolated(GUEST1, {}, {GUEST1.name: (NIC,)})
    assert proof.verdict is Verdict.NOT_MEASURED
    assert f"VF {VF} could not be read" in proof.evidence[0]
    assert prove_network_isolated(GUEST1, {}, {GUEST1.name: None}).verdict is Verdict.NOT_MEASURED


def test_nic_of_a_software_edge_is_not_measured() -> None:
    soft = replace(GUEST1, nics=(EmulatedNic("nh-1", "02:4e:48:00:00:09"),))
    proof = prove_network_isolated(replace(soft, hostdevs=()), {}, {GUEST1.name: ()})
    assert (proof.verdict, proof.evidence) == (
        Verdict.NOT_MEASURED, ("nh-1: the host's kernel forwards its frames, no PF does",)
    )  # fmt: skip
    both = prove_network_isolated(soft, {VF: VfReading("nic0", STATE)}, {GUEST1.name: (NIC,)})
    assert both.verdict is Verdict.PASS
    assert both.evidence[-1].startswith(f"{WEAKER}nh-1: ")


def test_guest_of_another_program_is_not_measured() -> None:
    assert prove(nic=None).verdict is Verdict.NOT_MEASURED
    assert prove(replace(STATE, trust=True), nic=None).verdict is Verdict.FAIL


def test_guest_without_a_vf() -> None:
    proof = prove_network_isolated(replace(GUEST1, hostdevs=()), {}, {GUEST1.name: ()})
    assert (proof.verdict, proof.evidence) == (Verdict.PASS, ("the guest has no VF",))


@pytest.mark.parametrize(
    ("change", "verdict"),
    [({}, Verdict.PASS), ({"vlan": 0}, Verdict.FAIL), ({"spoof_check": False}, Verdict.FAIL), ({"max_rate": 9}, Verdict.FAIL)],
)
def test_whole_way_from_the_request_to_the_proof(tmp_path: Path, change: dict[str, object], verdict: Verdict) -> None:
    world = World(tmp_path / "world")
    manager, ledger = world.open_manager()
    with ledger:
        manager.networks.create(OPERATOR, parse_network_request({"name": "blue", "vlan": 100}))
        nic = create(manager, nics=[{"network": "blue", "rate": 50}]).nics[0]
        assert nic.index is not None
        world.host.fake_net.set_vf(nic.interface, nic.index, **change)
        source = Source(
            world.host, world.hypervisor, lambda: read_topology(world.host), lambda *_: "", world.server.policy.housekeeping,
            ExitPolicy(1, 1), window=0, nics=manager.records.nics,
        )  # fmt: skip
        facts = Facts(source, 0)
        (row,) = (row for row in PROOFS if row.name == "network-isolated")
        (guest,) = facts.guests
        assert row.prove(facts, guest).verdict is verdict  # type: ignore[call-arg, arg-type]
        manager.close()


def test_guest_of_the_network_that_is_being_started_is_no_intruder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its VF has the VLAN before its QEMU runs."""
    world = World(tmp_path / "world")
    manager, ledger = world.open_manager()
    with ledger:
        manager.networks.create(OPERATOR, parse_network_request({"name": "blue", "vlan": 100}))
        create(manager, name="one", nics=[{"network": "blue"}])
        other = create(manager, name="two", nics=[{"network": "blue"}]).nics[0]
        guests, unread = world.hypervisor.read_guests()
        assert (len(guests), unread) == (2, {})
        first = tuple(guest for guest in guests if guest.name == "one")
        source = Source(
            world.host, world.hypervisor, lambda: read_topology(world.host), lambda *_: "", world.server.policy.housekeeping,
            ExitPolicy(1, 1), window=0, nics=manager.records.nics,
        )  # fmt: skip
        monkeypatch.setattr(world.hypervisor, "read_guests", lambda: (first, {}))
        facts = Facts(source, 0)
        assert facts.vfs()[other.address].state.vlan == 100  # type: ignore[index, union-attr]
        assert prove_network_isolated(first[0], facts.vfs(), facts.nics()).verdict is Verdict.PASS
        manager.close()


def test_pf_whose_settings_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "world")
    manager, ledger = world.open_manager()
    with ledger:
        plan = create(manager)
        guests, _ = world.hypervisor.read_guests()
        topology = read_topology(world.host)
        monkeypatch.setattr(world.host.fake_net, "vfs", lambda _interface: ())
        readings = read_vfs(world.host, guests, topology)
        assert plan.vf.address is not None
        assert readings[plan.vf.address] == f"{plan.vf.interface} does not report it"
        without = replace(topology, pfs=tuple(replace(pf, interface=None) for pf in topology.pfs))
        assert "has no interface" in str(read_vfs(world.host, guests, without)[plan.vf.address])
        manager.close()


def test_address_that_the_switch_has_seen_elsewhere_fails() -> None:
    def judge(strays: Strays) -> Measurement:
        return prove_network_isolated(GUEST1, {VF: VfReading("nic0", STATE), OTHER: FREE}, {GUEST1.name: (NIC,)}, strays)

    proof = judge(Strays({str(MAC): "swp7"}))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert proof.evidence[0] == f"address {MAC}: the external switch has seen it at port swp7 too, from another station"
    other = judge(Strays({"02:4e:48:00:00:02": "swp7"}))
    assert other.verdict is Verdict.PASS
    assert "table of the external switch: 0 of its addresses at other ports" in other.evidence
    unread = judge(Strays({}, "not measured: no switch is configured for uplink nic0"))
    assert unread.verdict is Verdict.PASS
    assert "table of the external switch: not measured: no switch is configured for uplink nic0" in unread.evidence
