"""Edge mode channel: a VLAN of its own for each VF, where the NIC cannot have VEPA mode."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.audit.network import VfReading, prove_network_isolated
from orchestrator.config import read_config
from orchestrator.errors import Conflict, NoRoom, RequestError
from orchestrator.ledger import Ledger
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import Network, parse_vlans
from orchestrator.model.plan import Allocated, NicPlan, Plan, Policy
from orchestrator.model.proof import Verdict
from orchestrator.model.topology import VfState
from orchestrator.planning.host_check import build_policy
from orchestrator.planning.inputs import NO_SITE, Site
from orchestrator.planning.planner import plan_guest
from orchestrator.planning.uplink import explain_edges
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
    assert "the driver bnx2x of PF 0000:41:00.0 is not known to support VEPA; the switch must translate its VLAN 1000" in sentence


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


def test_network_is_refused() -> None:
    with pytest.raises(NoRoom, match="with edge mode channel a NIC cannot join a network"):
        plan(site=Site({"blue": Network("blue", 100)}), nics=[{"network": "blue"}])


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
