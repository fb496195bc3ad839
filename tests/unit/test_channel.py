"""Edge mode channel: a VLAN of its own for each VF, where the NIC cannot have VEPA mode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.audit.network import Strays, VfReading, prove_network_isolated
from orchestrator.config import read_config
from orchestrator.errors import Conflict, NoRoom, RequestError, SwitchError
from orchestrator.guests.switches import find_needs
from orchestrator.ledger import Ledger
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import Network, parse_vlans
from orchestrator.model.plan import Allocated, NicPlan, Plan, Policy
from orchestrator.model.proof import Measurement, Verdict
from orchestrator.model.state import GuestState
from orchestrator.model.switch import PortChannel, PortNeeds, PortVlan, SwitchPort, SwitchState
from orchestrator.model.topology import VfState
from orchestrator.planning.host_check import build_policy
from orchestrator.planning.inputs import NO_SITE, Site
from orchestrator.planning.planner import plan_guest
from orchestrator.planning.uplink import explain_edges
from orchestrator.switches.bridge_channels import set_channel
from orchestrator.switches.verify import check_ports, find_untranslated
from orchestrator.values import MacAddress, PciAddress
from tests.harness.audit_data import GUEST1
from tests.unit.test_ledger import make_plan
from tests.unit.test_plan import PF, POLICY, host, nic, request

CHANNELS = replace(POLICY, channels={"nic0": parse_vlans("1000-1002")})
FORCED = replace(CHANNELS, edges=(("nic0", EdgeMode.CHANNEL),))
OLD = host(pfs=(nic(device="14e4:16af", driver="bnx2x"),))
"""A NIC whose driver does not support VEPA."""


def plan(policy: Policy = CHANNELS, used: Allocated | None = None, site: Site = NO_SITE, **fields: object) -> Plan:
    return plan_guest(request(**fields), OLD, used or Allocated(), policy, site)


def test_nic_without_vepa_gets_vlans_of_its_own() -> None:
    first = plan(nics=[{}, {}])
    assert [(one.edge, one.vlan) for one in first.nics] == [(EdgeMode.CHANNEL, 1000), (EdgeMode.CHANNEL, 1001)]
    used = Allocated(channels=frozenset(first.channels), numbers=frozenset((vf.pf, vf.index) for vf in first.vfs))
    assert plan(used=used).vf.vlan == 1002
    with pytest.raises(NoRoom, match=r"all of VLANs 1000-1002 are used by guests \(\[uplinks.nic0\] channels\) \(NIC 2 of 2\)"):
        plan(used=used, nics=[{}, {}])
    (sentence,) = explain_edges(plan(), OLD, CHANNELS)
    assert "the driver bnx2x of PF 0000:41:00.0 is not known to support VEPA" in sentence
    assert sentence.endswith("the switch must translate its VLAN 1000 to untagged frames: the manager does not set that")


def test_vlans_of_other_pfs_are_not_taken() -> None:
    other = Allocated(channels=frozenset({(PciAddress.parse("0000:81:00.0"), 1000)}))
    assert plan(used=other).vf.vlan == 1000


@pytest.mark.parametrize(
    ("policy", "pf", "edge", "vlan"),
    [
        (POLICY, {"driver": "bnx2x", "device": "14e4:16af"}, EdgeMode.VEPA, 0),  # as before: the driver refuses it at the start
        (CHANNELS, {}, EdgeMode.VEPA, 0),
        (CHANNELS, {"driver": "ixgbe", "device": "8086:10fb"}, EdgeMode.VEPA, 0),
        (CHANNELS, {"driver": None, "device": "8086:10fb"}, EdgeMode.CHANNEL, 1000),
        (FORCED, {}, EdgeMode.CHANNEL, 1000),
    ],
)
def test_auto_prefers_vepa_where_the_nic_may_have_it(policy: Policy, pf: dict[str, object], edge: EdgeMode, vlan: int) -> None:
    found = plan_guest(request(), host(pfs=(nic(**pf),)), Allocated(), policy).vf
    assert (found.edge, found.vlan) == (edge, vlan)


BLUE = Site({"blue": Network("blue", 100)})


def test_network_needs_a_switch_that_the_manager_sets() -> None:
    with pytest.raises(NoRoom, match=r"with edge mode channel a NIC cannot join a network: .*\[uplinks.nic0\] switch and port"):
        plan(site=BLUE, nics=[{"network": "blue"}])
    tied = replace(CHANNELS, tied=frozenset({"nic0"}))
    nics = plan(tied, site=BLUE, nics=[{"network": "blue"}, {"network": "blue"}, {}]).nics
    assert [(one.network, one.vlan, one.switch_vlan, one.network_vlan) for one in nics] == [
        ("blue", 1000, 100, 100), ("blue", 1001, 100, 100), ("", 1002, 0, 0),
    ]  # fmt: skip
    assert nics[0].vf
    assert nics[0].vf.vlan == 1000, "the NIC has the VLAN of its own, the switch that of the network"


def test_guest_gets_no_vlan_of_a_network() -> None:
    """Guests that joined it before the configuration was changed may still have VFs of the uplink."""
    assert plan(site=Site(taken=frozenset({1000}))).vf.vlan == 1001
    with pytest.raises(NoRoom, match="all of VLANs 1000-1002 are used by guests and networks"):
        plan(site=Site(taken=frozenset({1000, 1001, 1002})))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('edge = "channel"', "edge mode channel needs channels"),
        ('channels = "4095"', "channels"),
        ('vlans = "100-199"\nchannels = "150-160,198-300"', "VLANs 150-160,198-199 in common"),
    ],
)
def test_bad_ranges_are_refused(tmp_path: Path, lines: str, says: str) -> None:
    file = tmp_path / "nohype.toml"
    file.write_text(f'[host]\nhousekeeping = "0-1"\nuplinks = ["nic0"]\n[uplinks.nic0]\n{lines}\n')
    with pytest.raises(RequestError, match=says):
        read_config(file)
    file.write_text(file.read_text().replace(lines, 'edge = "channel"\nvlans = "100-199"\nchannels = "1000-1199"'))
    policy = build_policy(read_config(file))
    assert (dict(policy.edges), policy.channels["nic0"]) == ({"nic0": EdgeMode.CHANNEL}, parse_vlans("1000-1199"))


def test_ledger_gives_a_vlan_once(tmp_path: Path) -> None:
    def make(number: int, vlan: int) -> Plan:
        found = make_plan(number)
        return replace(found, nics=(replace(found.vf, edge=EdgeMode.CHANNEL, vlan=vlan),))

    with closing(Ledger(tmp_path / "ledger")) as ledger:
        for number, vlan in ((1, 1000), (2, 1001)):
            ledger.claim(make(number, vlan), ledger.read().generation, request(name=f"g{number}"))
        with pytest.raises(Conflict, match=f"cannot claim VLAN {PF} 1000 for guest g3"):
            ledger.claim(make(3, 1000), ledger.read().generation, request(name="g3"))
    with closing(Ledger(tmp_path / "ledger")) as again:
        assert [claim.plan.vf.vlan for claim in again.read().claims] == [1000, 1001]


@pytest.mark.parametrize(("other", "verdict"), [(0, Verdict.PASS), (1001, Verdict.PASS), (1000, Verdict.FAIL)])
def test_vf_in_the_vlan_of_another_is_found(other: int, verdict: Verdict) -> None:
    """Also if both guests are the manager's, and in no network."""
    (vf,), second, mac = GUEST1.hostdevs, PciAddress.parse("0000:41:10.6"), MacAddress("02:4e:48:00:00:01")
    mine, others = (NicPlan(PF, "nic0", index, vf, mac, EdgeMode.CHANNEL, vlan=1000) for index in (0, 3))
    found = {vf: VfReading("nic0", VfState(0, mac, vlan=1000)), second: VfReading("nic0", VfState(3, vlan=other))}
    promised = {GUEST1.name: (mine,), "other": (replace(others, address=second),)}
    assert prove_network_isolated(GUEST1, found, promised).verdict is verdict


CHANNEL = PortChannel(1000, "02:4e:48:00:00:01", 100)
PORT = SwitchPort("swp1", True, True, False, "forwarding", False, 1500, (), None, (), (), None, channels=(CHANNEL,))


@pytest.mark.parametrize(
    ("found", "findings"),
    [
        ((CHANNEL,), []),
        ((replace(CHANNEL, mac=""),), []),  # a Linux bridge has no address of it
        ((), ["VLAN 1000 of 02:4e:48:00:00:01 is not translated"]),
        (
            (replace(CHANNEL, switch_vlan=0),),
            ["the translation is VLAN 1000 to untagged frames for 02:4e:48:00:00:01, expected"],
        ),
        ((replace(CHANNEL, mac="02:4e:48:00:00:02"),), ["for 02:4e:48:00:00:02, expected"]),
        ((CHANNEL, PortChannel(1001, "", 100)), []),
    ],
)
def test_translation_of_the_switch_is_compared(found: tuple[PortChannel, ...], findings: list[str]) -> None:
    actual = find_untranslated(replace(PORT, channels=found), [CHANNEL])
    assert len(actual) == len(findings)
    assert all(part in text for part, text in zip(findings, actual, strict=True))


def test_port_of_guests_with_vlans_of_their_own_needs_no_hairpin() -> None:
    state = SwitchState((PORT,), True, False, None, None, None)

    def failed(needs: PortNeeds) -> set[str]:
        checks = check_ports("sw1", state, {"swp1": 1500}, None, {"swp1": needs})
        return {check.name for check in checks if check.verdict is Verdict.FAIL}

    assert failed(PortNeeds()) == {"hairpin", "channels", "vlan"}, "a translation that no guest has"
    assert failed(PortNeeds(relay=False, channels=(CHANNEL,), known=(CHANNEL,))) == {"vlan"}
    of_another_host = check_ports("sw1", state, {})
    assert {check.name: check.verdict for check in of_another_host}["channels"] is Verdict.PASS, "of guests that are not ours"
    assert failed(PortNeeds(relay=False, known=(CHANNEL,))) == {"vlan"}, "the guest is being started"


def test_needs_of_guests_follow_their_edge_modes(tmp_path: Path) -> None:
    first = replace(make_plan(1), nics=(replace(make_plan(1).vf, edge=EdgeMode.CHANNEL, vlan=1000, switch_vlan=0),))
    with closing(Ledger(tmp_path / "ledger")) as ledger:
        assert find_needs((), "nic0", is_channel=False) == PortNeeds()
        assert find_needs((), "nic0", is_channel=True) == PortNeeds(relay=False)
        ledger.claim(first, ledger.read().generation, request(name="g1"))
        channel = PortChannel(1000, str(first.vf.mac), 0)
        assert find_needs(ledger.read().claims, "nic0", is_channel=True) == PortNeeds(relay=False, known=(channel,))
        ledger.set_state("g1", GuestState.RUNNING)
        needs = find_needs(ledger.read().claims, "nic0", is_channel=False)
        assert needs == PortNeeds(relay=False, channels=(channel,), known=(channel,))
        ledger.claim(make_plan(2), ledger.read().generation, request(name="g2"))
        assert find_needs(ledger.read().claims, "nic0", is_channel=True).relay, "a guest in VEPA mode needs it"


def test_port_must_carry_the_vlans_of_guests_networks(tmp_path: Path) -> None:
    """Hairpin that is lost in one VLAN: the probe of the host, which is untagged, returns."""
    plan = replace(make_plan(1), nics=(replace(make_plan(1).vf, network="blue", vlan=100),))
    with closing(Ledger(tmp_path / "ledger")) as ledger:
        ledger.create_network(lambda _: Network("blue", 100))
        ledger.claim(plan, ledger.read().generation, request(name="g1"))
        assert not find_needs(ledger.read().claims, "nic0", is_channel=False).vlans, "it does not run"
        ledger.set_state("g1", GuestState.RUNNING)
        needs = find_needs(ledger.read().claims, "nic0", is_channel=False)
    assert (needs.vlans, needs.relay) == (frozenset({100}), True)
    untagged, tagged = PortVlan(1, pvid=True, untagged=True), PortVlan(100, pvid=False, untagged=False)
    for vlans, failed in (
        ((untagged, tagged), set()),
        ((untagged,), {"networks"}),
        ((untagged, replace(tagged, untagged=True)), {"networks"}),
    ):
        port = replace(PORT, hairpin=True, channels=(), vlans=vlans)
        state = SwitchState((port,), True, False, None, None, None)
        checks = check_ports("sw1", state, {"swp1": 1500}, None, {"swp1": needs})
        assert {check.name for check in checks if check.verdict is Verdict.FAIL} == failed
    unfiltered = SwitchState((replace(port, vlans=()),), False, False, None, None, None)
    assert not [check for check in check_ports("sw1", unfiltered, {}, None, {"swp1": needs}) if check.name == "networks"]


def test_audit_names_the_translation_and_fails_without_it() -> None:
    (vf,), mac = GUEST1.hostdevs, MacAddress("02:4e:48:00:00:01")
    nic = NicPlan(PF, "nic0", 0, vf, mac, EdgeMode.CHANNEL, "blue", vlan=1000, switch_vlan=100)
    found = {vf: VfReading("nic0", VfState(0, mac, vlan=1000))}

    def prove(strays: Strays) -> Measurement:
        return prove_network_isolated(GUEST1, found, {GUEST1.name: (nic,)}, strays)

    good = prove(Strays({}, translated={str(mac): "VLAN 1000 to VLAN 100"}))
    assert good.verdict is Verdict.PASS
    assert "the switch translates VLAN 1000 to VLAN 100" in good.evidence
    bad = prove(Strays({}, untranslated={str(mac): "port swp1 of the switch: VLAN 1000 is not translated"}))
    assert bad.verdict is Verdict.FAIL
    unknown = prove(Strays({}, "not measured: no switch"))
    assert any("how the switch translates VLAN 1000 is not measured" in line for line in unknown.evidence)


class Programs:
    """iproute2 of a bridge whose port swp1 has PVID 1; notes what would change it."""

    where = "on the switch"

    def __init__(self) -> None:
        self.changes: list[str] = []

    def run(self, words: Sequence[str], *, input: str = "") -> str:
        if "show" not in words:
            self.changes.append(" ".join(words))
            return ""
        vlans = [{"ifname": "swp1", "vlans": [{"vlan": 1, "flags": ["PVID", "Egress Untagged"]}]}]
        links = [{"ifname": "swp1", "ifindex": 5, "linkinfo": {"info_data": {"vlan_filtering": 1}}}]
        return json.dumps(vlans if words[0] == "bridge" else links)

    def close(self) -> None:
        pass


def test_network_with_the_vlan_of_untagged_frames_is_refused_by_name() -> None:
    """Stations without a tag would be in the network. It was read back as a translation to untagged frames."""
    programs = Programs()
    with pytest.raises(SwitchError, match=r"VLAN 1 is that of untagged frames \(PVID\) at port swp1 of bridge br0"):
        set_channel(programs, "br0", "swp1", replace(CHANNEL, switch_vlan=1))
    assert programs.changes == []
    set_channel(programs, "br0", "swp1", CHANNEL)
    assert "bridge vlan add dev nhc5.1000 vid 100 pvid untagged" in programs.changes
