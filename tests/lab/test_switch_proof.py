"""The audit completes the proof vepa by itself: it reads the lab's external switch over SSH, from inside the lab.

`nohype lab up` has registered the switch at the manager, as an operator does.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pyroute2 import IPRoute

from orchestrator.audit.catalogue import VEPA
from orchestrator.host.netlink import set_hairpin
from orchestrator.lab import switch
from orchestrator.lab.switch import BRIDGE, LabPort
from orchestrator.model.plain import from_plain
from orchestrator.model.proof import Proof, Verdict
from orchestrator.model.uplink import CountWay
from orchestrator.waiting import wait_until
from tests.lab.conftest import LabHost

pytestmark = pytest.mark.usefixtures("guests")


@pytest.fixture(scope="module")
def port(host: LabHost) -> LabPort:
    return switch.port(host.lab.name)


def measure(host: LabHost, frames: int = 50) -> Proof:
    """As the manager alone has measured it."""
    proofs = from_plain(
        tuple[Proof, ...], json.loads(host.nohype("audit", "--frames", str(frames), "--json", check=False).stdout)
    )
    return next(proof for proof in proofs if proof.name == VEPA.name)


def test_audit_completes_vepa_by_itself(host: LabHost) -> None:
    proof = measure(host)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert proof.readings
    assert proof.readings.switch
    assert proof.readings.switch.way is CountWay.PORT
    assert proof.readings.switch.into_switch >= 100


@pytest.mark.soak  # `test_proofs` has the same proof without the switch
def test_audit_finds_a_hairpin_that_is_off(host: LabHost, port: LabPort) -> None:
    set_hairpin(port.interface, port.netns, on=False)
    try:
        proof = measure(host, 5)
    finally:
        set_hairpin(port.interface, port.netns, on=True)
    assert proof.verdict == Verdict.FAIL, proof.evidence


@pytest.mark.soak
def test_switch_that_cannot_be_read_makes_the_proof_not_measured(host: LabHost, port: LabPort) -> None:
    with IPRoute(netns=port.netns) as ipr:
        (index,) = ipr.link_lookup(ifname=BRIDGE)
        ipr.link("set", index=index, ifname="other0")
        try:
            proof = measure(host)
        finally:
            ipr.link("set", index=index, ifname=BRIDGE)
    assert proof.verdict == Verdict.NOT_MEASURED
    assert any(f"there is no bridge {BRIDGE}" in line for line in proof.evidence), proof.evidence
    proof = wait_until(lambda: measure(host), lambda proof: proof.verdict == Verdict.PASS, timeout=120, interval=1)
    assert proof.verdict == Verdict.PASS, proof.evidence


KINDS = ("hairpin-lost", "hairpin-returned")


def read_events(host: LabHost, after: int) -> list[dict[str, Any]]:
    found = json.loads(host.nohype("events", "--after", str(after), "--json").stdout)
    return [event for event in found if event["kind"] in KINDS]


def read_settled(host: LabHost) -> int:
    """The id of the last event; 0 while frames are reported as lost."""
    events = json.loads(host.nohype("events", "--json").stdout)
    kinds = [event["kind"] for event in events if event["kind"] in KINDS]
    return 0 if kinds and kinds[-1] == "hairpin-lost" else events[-1]["id"]


def test_hairpin_that_is_lost_is_an_event_within_ten_seconds(host: LabHost, port: LabPort) -> None:
    """By probe frames: the switch is not asked. The guests have VFs, whose frames igb does not count."""
    # An earlier test can have switched hairpin off too: a loss that is known already is not reported again.
    last = wait_until(lambda: read_settled(host), timeout=60, interval=0.5)
    start = datetime.fromtimestamp(float(host.run("date +%s.%N").stdout), UTC)
    set_hairpin(port.interface, port.netns, on=False)
    try:
        wait_until(lambda: read_events(host, last), timeout=60, interval=0.5)
        lost = read_events(host, last)
    finally:
        set_hairpin(port.interface, port.netns, on=True)
    wait_until(lambda: len(read_events(host, last)) > 1, timeout=60, interval=0.5)
    assert [event["kind"] for event in lost] == ["hairpin-lost"]
    assert [event["kind"] for event in read_events(host, last)] == list(KINDS)
    seconds = (datetime.fromisoformat(lost[0]["time"]) - start).total_seconds()
    print(f"\nhairpin-lost after {seconds:.1f} s")
