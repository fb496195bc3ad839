"""vepa: edge modes, traffic and the count at the switch, judged in one place or in two."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from orchestrator.audit.catalogue import VEPA
from orchestrator.audit.uplink import SIZE, SwitchCount, complete_vepa, find_guest_address, parse_ping, prove_vepa
from orchestrator.errors import GuestError
from orchestrator.model.plain import from_plain, to_plain
from orchestrator.model.proof import Measurement, Proof, Verdict
from orchestrator.model.uplink import CountWay, EdgeReading, Traffic, VepaReadings
from tests.fakes.root import build_host
from tests.harness.audit_data import GUEST1

EDGE = EdgeReading("nic0", "vepa", "PF 0000:41:00.0 DTXSWC (BAR0+0x3500) is 0x0000efef, loopback bit 31 clear: vepa")
VEB = EdgeReading("nic0", "veb", "PF 0000:41:00.0 DTXSWC (BAR0+0x3500) is 0x8000efef, loopback bit 31 set: veb")
TRAFFIC = Traffic("guest1", "guest2", SIZE, 20, 20, 0, {}, 0)
SWITCH = SwitchCount("labexp", 20, 20)


def judge(traffic: Traffic | None = TRAFFIC, switch: SwitchCount | None = SWITCH, edge: EdgeReading = EDGE) -> Measurement:
    return prove_vepa(VepaReadings((edge,), traffic), switch)


def test_every_frame_exactly_twice_passes() -> None:
    proof = judge()
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert "port labexp: 20 in from the host, 20 out to it" in proof.evidence


def test_nic_back_in_veb_mode_fails_whatever_was_counted() -> None:
    assert (judge(edge=VEB).verdict, judge(edge=VEB).figure) == (Verdict.FAIL, None)
    proof = judge(None, None, VEB)
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, None)
    assert "nic0 switches locally between VFs (VEB)" in proof.evidence[0]


@pytest.mark.parametrize(
    ("traffic", "switch", "figure"),
    [
        pytest.param(TRAFFIC, SwitchCount("p", 0, 0), 20, id="switched inside the NIC"),
        pytest.param(TRAFFIC, SwitchCount("p", 19, 19), 1, id="one frame took another way"),
        pytest.param(replace(TRAFFIC, received=0), SwitchCount("p", 20, 0), 20, id="hairpin off"),
        pytest.param(replace(TRAFFIC, received=0), SwitchCount("p", 20, 20), 20, id="returned, and then lost in the NIC"),
        pytest.param(TRAFFIC, SwitchCount("p", 40, 40), 20, id="frames doubled before the switch"),
        pytest.param(TRAFFIC, SwitchCount("p", 20, 40), 20, id="frames doubled by the switch"),
        pytest.param(TRAFFIC, SwitchCount("p", 20, 19), 1, id="switch lost one"),
        pytest.param(replace(TRAFFIC, duplicates=3), SWITCH, 3, id="inside and outside"),
        pytest.param(replace(TRAFFIC, in_host={"nic0": 2}), SWITCH, 2, id="seen by the host"),
    ],
)
def test_wrong_counts_fail(traffic: Traffic, switch: SwitchCount, figure: int) -> None:
    proof = judge(traffic, switch)
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, figure)


@pytest.mark.parametrize(
    ("traffic", "switch", "edge"),
    [
        pytest.param(None, None, EDGE, id="no traffic"),
        pytest.param(None, SWITCH, EDGE, id="switch watched, nothing sent"),
        pytest.param(TRAFFIC, None, EDGE, id="switch not watched"),
        pytest.param(replace(TRAFFIC, sent=0, received=0), SwitchCount("p", 0, 0), EDGE, id="guest sent nothing"),
        pytest.param(replace(TRAFFIC, received=19), SWITCH, EDGE, id="a reply lost"),
        pytest.param(replace(TRAFFIC, dropped=1), SWITCH, EDGE, id="capture in the host lost frames"),
        pytest.param(TRAFFIC, SwitchCount("p", 18, 17, dropped=5), EDGE, id="capture at the switch lost frames"),
        pytest.param(TRAFFIC, SWITCH, EdgeReading("nic0", None, "no way to tell"), id="edge mode unknown"),
    ],
)
def test_missing_parts_are_not_measured(traffic: Traffic | None, switch: SwitchCount | None, edge: EdgeReading) -> None:
    proof = judge(traffic, switch, edge)
    assert (proof.verdict, proof.figure) == (Verdict.NOT_MEASURED, None)


def test_guest_without_a_known_pf_is_not_measured() -> None:
    assert prove_vepa(VepaReadings((), TRAFFIC), SWITCH).verdict == Verdict.NOT_MEASURED


def test_one_of_two_pfs_in_veb_mode_fails() -> None:
    edges = (EDGE, replace(VEB, interface="nic1"))
    assert prove_vepa(VepaReadings(edges, TRAFFIC), SWITCH).verdict == Verdict.FAIL


def measured_on_host(edge: EdgeReading = EDGE, traffic: Traffic | None = TRAFFIC, gaps: tuple[str, ...] = ()) -> Proof:
    """The host's proof as the manager sends it to the observer at the switch."""
    measured = prove_vepa(VepaReadings((edge,), traffic, gaps), None)
    proof = Proof(VEPA.name, "host", measured.verdict, measured.figure, VEPA.unit, measured.evidence, measured.readings)
    return from_plain(Proof, json.loads(json.dumps(to_plain(proof))))


def test_host_half_is_completed_with_the_switch_count() -> None:
    half = measured_on_host()
    assert half.verdict == Verdict.NOT_MEASURED
    whole = complete_vepa(half, SWITCH)
    assert (whole.name, whole.subject, whole.unit) == (half.name, half.subject, half.unit)
    assert (whole.verdict, whole.figure, whole.evidence) == (judge().verdict, judge().figure, judge().evidence)
    assert complete_vepa(half, SwitchCount("labexp", 20, 0)).verdict == Verdict.FAIL


def test_readings_survive_json() -> None:
    readings = VepaReadings((EDGE,), replace(TRAFFIC, in_host={"nic0": 2}), ("a gap",))
    proof = measured_on_host(EDGE, readings.traffic, readings.gaps)
    assert proof.readings == readings
    assert not any("in_host" in line for line in proof.evidence), "readings are a field, not a line of evidence"


def test_completion_keeps_the_findings_of_the_host() -> None:
    assert complete_vepa(measured_on_host(VEB), SWITCH).verdict == Verdict.FAIL
    whole = complete_vepa(measured_on_host(EDGE, None, ("guest1 did not respond",)), SwitchCount("labexp", 0, 0))
    assert whole.verdict == Verdict.NOT_MEASURED
    assert whole.evidence[0] == "guest1 did not respond"


def test_proof_without_readings_stays_not_measured() -> None:
    half = VEPA.unmeasured("libvirt does not respond")
    proof = complete_vepa(half, SWITCH)
    assert (proof.verdict, proof.evidence) == (Verdict.NOT_MEASURED, ("libvirt does not respond",))


def test_counts_of_the_guests_reply() -> None:
    answer = "noise\nnohype: done flood sent=20 received=19 duplicates=1 min=4.2 avg=5.0 max=9.1\n"
    assert parse_ping(answer) == {"sent": 20, "received": 19, "duplicates": 1}


@pytest.mark.parametrize(
    "answer", ["", "nohype: error ping there is no network interface\n", "nohype: done mac 02:00:00:00:00:01\n"]
)
def test_reply_without_counts_is_an_error(answer: str) -> None:
    with pytest.raises(GuestError, match="the guest could not ping"):
        parse_ping(answer)


@pytest.mark.parametrize(
    ("append", "address"),
    [
        ("console=ttyS0 nohype.name=guest1 nohype.address=10.9.0.11/24", IPv4Address("10.9.0.11")),
        ("nohype.address=10.9.0.11/24 quiet", IPv4Address("10.9.0.11")),
        ("console=ttyS0 xnohype.address=10.9.0.11/24", None),
        ("console=ttyS0", None),
    ],
)
def test_address_of_a_running_guest(tmp_path, append, address) -> None:  # type: ignore[no-untyped-def]
    host = build_host(tmp_path, "")
    host.add(f"proc/{GUEST1.pid}/cmdline", "\0".join(["qemu-system-x86_64", "-append", append, "-nodefaults"]))
    assert find_guest_address(host, GUEST1) == address


COUNTERS = SwitchCount("swp1", 40, 40, way=CountWay.PORT)
"""20 requests and 20 replies, each in and out."""


@pytest.mark.parametrize("way", [CountWay.PORT, CountWay.PAIRS])
@pytest.mark.parametrize("others", [0, 19])
def test_counters_of_the_switch_complete_the_proof(way: CountWay, others: int) -> None:
    """Some other frames, such as ARP, are no finding; that they are counted too is a limit of the proof."""
    count = replace(COUNTERS, way=way, into_switch=40 + others, out_of_switch=40 + others)
    proof = judge(switch=count)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert any(line.startswith("weaker, because port swp1 counts") for line in proof.evidence)


@pytest.mark.parametrize(
    ("count", "figure", "text"),
    [
        pytest.param(
            replace(COUNTERS, into_switch=0, out_of_switch=0), 40, "40 of 40 frames did not reach", id="switched inside"
        ),
        pytest.param(replace(COUNTERS, into_switch=39), 1, "1 of 40 frames did not reach", id="one frame"),
        pytest.param(replace(COUNTERS, out_of_switch=0), 40, "did not reflect 40 of 40", id="hairpin off"),
        pytest.param(replace(COUNTERS, out_of_switch=39, others=500), 1, "did not reflect 1 of 40", id="busy port"),
    ],
)
def test_counters_below_the_frames_fail(count: SwitchCount, figure: int, text: str) -> None:
    proof = judge(switch=count)
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, figure)
    assert any(text in line for line in proof.evidence)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(replace(COUNTERS, others=20), id="as many others in the quiet time"),
        pytest.param(replace(COUNTERS, into_switch=60, out_of_switch=60), id="as many others at the same time"),
        pytest.param(replace(COUNTERS, into_switch=1_000_000, out_of_switch=1_000_000, others=900_000), id="flood"),
    ],
)
def test_counters_of_a_busy_port_prove_nothing(count: SwitchCount) -> None:
    proof = judge(switch=count)
    assert (proof.verdict, proof.figure) == (Verdict.NOT_MEASURED, None)
    assert any("other frames beside 40 test frames" in line for line in proof.evidence)


def test_count_of_the_driver_completes_the_proof_and_must_agree_with_an_observer() -> None:
    readings = VepaReadings((EDGE,), TRAFFIC, switch=COUNTERS)
    assert prove_vepa(readings, None).verdict == Verdict.PASS
    assert prove_vepa(readings, SWITCH).verdict == Verdict.PASS
    assert prove_vepa(readings, SwitchCount("labexp", 20, 0)).verdict == Verdict.FAIL
    lying = replace(readings, switch=replace(COUNTERS, out_of_switch=0))
    assert prove_vepa(lying, SWITCH).verdict == Verdict.FAIL
    assert from_plain(VepaReadings, json.loads(json.dumps(to_plain(readings)))) == readings


def test_reason_without_a_count_is_shown_until_an_observer_counts() -> None:
    readings = VepaReadings((EDGE,), TRAFFIC, switch_gap="switch sw1 is not registered")
    proof = prove_vepa(readings, None)
    assert proof.verdict == Verdict.NOT_MEASURED
    assert "the frames were not counted at the external switch: switch sw1 is not registered" in proof.evidence
    assert prove_vepa(readings, SWITCH).verdict == Verdict.PASS
