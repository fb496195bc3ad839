"""Invariants of frame counters: what breaks them, and what must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.audit.balance import Sample, compare, finish, take_sample
from orchestrator.audit.edge import list_addresses
from orchestrator.audit.uplink import SwitchCount, prove_vepa
from orchestrator.host.edge.returns import count_returns
from orchestrator.host.root import Chain, HostRoot
from orchestrator.model.proof import Verdict
from orchestrator.model.switch import PortCounters
from orchestrator.model.uplink import (
    EdgeReading,
    FrameCounts,
    InvariantReading,
    QueueCounts,
    ReturnCounts,
    Traffic,
    VepaReadings,
)
from orchestrator.values import MacAddress

EDGES = tuple(EdgeReading(f"nh-{number}", "macvtap-vepa", "", (), "nic0") for number in (1, 2))
ZERO = FrameCounts(0, 0, 0, 0, 0, 0)
START = Sample(dict.fromkeys(("nh-1", "nh-2", "nic0"), ZERO), dict.fromkeys(("nh-1", "nh-2", "nic0"), ZERO),
               PortCounters(0, 0, 0, 0, 0, 0), QueueCounts(0, 0))  # fmt: skip
MACS = tuple(MacAddress.parse(f"02:4e:48:00:00:0{number}") for number in (1, 2))


def sample(one: int, two: int, uplink: int, back: int, *, into: int = -1, out: int = -1, dropped: int = 0) -> Sample:
    counts = {
        "nh-1": FrameCounts(one, 0, 0, 0, 0, 0), "nh-2": FrameCounts(two, 0, 0, 0, 0, 0),
        "nic0": FrameCounts(uplink, back, 0, 0, dropped, 0),
    }  # fmt: skip
    port = PortCounters(uplink if into < 0 else into, back if out < 0 else out, 0, 0, 0, 0)
    return Sample(counts, counts, port, QueueCounts(0, 0))


def judge(end: Sample, start: Sample = START, edges: tuple[EdgeReading, ...] = EDGES) -> dict[str, bool | None]:
    return {one.invariant: one.holds for one in compare("nic0", edges, start, end)}


HOLD = {"guests-uplink": True, "uplink-switch": True, "switch-reflected": True, "must-return": None}


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(sample(0, 0, 0, 0), id="idle"),
        pytest.param(sample(20, 20, 40, 40), id="each frame once"),
        pytest.param(sample(20, 20, 90, 90), id="the host sends too, or segments"),
        pytest.param(sample(10**9, 10**9, 2 * 10**9, 2 * 10**9), id="flood"),
    ],
)
def test_frames_that_leave_hold_all_invariants(end: Sample) -> None:
    assert judge(end) == HOLD


def test_frames_that_were_switched_in_the_host_break_the_first() -> None:
    assert judge(sample(20, 20, 0, 0))["guests-uplink"] is False
    assert judge(sample(20, 20, 39, 39))["guests-uplink"] is False


@pytest.mark.parametrize(
    ("left", "back", "holds"),
    [
        (0, 0, True),
        (40, 40, True),
        (40, 41, True),
        (40, 39, None),
        (9, 0, None),
        (10, 0, False),
        (10**9, 0, False),
        (-1, 0, None),
    ],
)
def test_frames_between_guests_that_all_stay_away_break_the_last(left: int, back: int, holds: bool | None) -> None:
    """Of a flood some are dropped, and a single frame may be; that a switch floods a frame to more ports adds some."""
    start, end = (replace(START, returns=ReturnCounts(7 + one, 5 + two)) for one, two in ((0, 0), (left, back)))
    assert judge(end, start)["must-return"] is holds
    assert judge(replace(end, returns="nft is not installed"), start)["must-return"] is None


def test_frames_that_were_on_their_way_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.audit.balance.POLL_SECONDS", 0.0)
    host, counts = make_host([sample(0, 0, 0, 0)] * 9, {"nic0": IDLE}), iter([(0, 0), (20, 0), (25, 8), (90, 40)])
    tables: dict[str, tuple[Chain, ...]] = {}
    net: Any = host.net
    net.replace_table, net.read_table = lambda name, *chains: tables.update({name: chains}), tables.get
    net.count_packets = lambda _: dict(zip(("must-return", "returned"), next(counts), strict=True))
    count_returns(host, "nic0", MACS)
    start = take_sample(host, "nic0", "no switch", MACS, is_start=True)
    found = {one.invariant: one for one in finish(host, "nic0", "no switch", EDGES, start)}["must-return"]
    text = "20 frames between guests left through nic0, 8 came back; not measured: frames may have been dropped or merged"
    assert (found.holds, found.text) == (None, text)
    other = take_sample(host, "nic0", "no switch", MACS[:1], is_start=True)
    assert other.returns == "the rules that count frames between these guests are missing"


@pytest.mark.parametrize("how", ["device", "queue", "waiting", "between the readings"])
def test_frames_that_were_dropped_or_wait_are_no_finding(how: str) -> None:
    end = sample(600, 600, 1000, 1000, dropped=200 if how == "device" else 0)
    if how in ("queue", "waiting"):
        end = replace(end, queue=QueueCounts(200 * (how == "queue"), 200 * (how == "waiting")))
    if how == "between the readings":
        end = replace(end, outer=sample(700, 700, 1200, 1000).outer)
    assert judge(end)["guests-uplink"] is True


@pytest.mark.parametrize(
    ("end", "edges"),
    [
        pytest.param(sample(20, 20, -5, 0), EDGES, id="reset of the uplink"),
        pytest.param(sample(-1, 20, 40, 0), EDGES, id="tap made again"),
        pytest.param(sample(20, 20, 40, 40), (*EDGES, replace(EDGES[0], interface="nh-3")), id="guest started meanwhile"),
        pytest.param(sample(20, 20, 0, 0), (replace(EDGES[0], mode="nft-vepa"),), id="counted before the rules"),
        pytest.param(replace(START, outer={}, inner={}), EDGES, id="all gone"),
    ],
)
def test_what_cannot_be_compared_is_not_measured(end: Sample, edges: tuple[EdgeReading, ...]) -> None:
    assert judge(end, edges=edges)["guests-uplink"] is None


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        pytest.param(sample(20, 20, 40, 40, into=10), (None, None), id="late counters"),
        pytest.param(sample(20, 20, 40, 25), (True, None), id="frames to other hosts"),
        pytest.param(sample(20, 20, 40, 0), (True, None), id="hairpin off: not told from frames to other hosts"),
        pytest.param(replace(sample(20, 20, 40, 40), port="the switch does not respond"), (None, None), id="unreadable"),
        pytest.param(sample(20, 20, 40, 40, into=40, out=-100), (True, True), id="default"),
    ],
)
def test_counters_of_the_switch_are_never_a_finding(end: Sample, expected: tuple[bool | None, bool | None]) -> None:
    found = judge(end)
    assert (found["uplink-switch"], found["switch-reflected"]) == expected


def test_broken_invariant_fails_the_proof_without_test_frames_and_with_them() -> None:
    broken: tuple[InvariantReading, ...] = compare("nic0", EDGES, START, sample(20, 20, 0, 0))
    for traffic in (None, Traffic("a", "b", 248, 20, 20, 0, {}, 0, True, True, 40, 40)):
        proof = prove_vepa(VepaReadings(EDGES, traffic, invariants=broken), SwitchCount("p", 20, 20) if traffic else None)
        assert proof.verdict == Verdict.FAIL
        assert proof.evidence[0] == "guests-uplink: guests sent 40 frames, 0 left through nic0, which dropped 0"


def test_invariants_that_hold_do_not_replace_test_frames() -> None:
    holding = compare("nic0", EDGES, START, sample(20, 20, 40, 40))
    assert prove_vepa(VepaReadings(EDGES, None, invariants=holding), None).verdict == Verdict.NOT_MEASURED


def make_host(readings: Sequence[Sample], queues: dict[str, QueueCounts]) -> HostRoot:
    """Its counters are those of the samples, one per reading; nic0 is a bond of the other interfaces with a queue."""
    left = list(readings)
    links = [SimpleNamespace(name=name, master="nic0" if name != "nic0" else None, parent=None) for name in queues]
    net = SimpleNamespace(
        read_counters=lambda: (left.pop(0) if len(left) > 1 else left[0]).inner, read_queue=queues.get, read_links=lambda: links
    )
    return HostRoot(Path("/"), net)


IDLE = QueueCounts(0, 0)


@pytest.mark.parametrize(("counted", "holds"), [(40, True), (39, False)])
def test_uplink_that_counts_late_is_no_finding(monkeypatch: pytest.MonkeyPatch, counted: int, holds: bool) -> None:
    monkeypatch.setattr("orchestrator.audit.balance.POLL_SECONDS", 0.01)
    monkeypatch.setattr("orchestrator.audit.balance.LATE_SECONDS", 0.2)
    ends = [sample(20, 20, 0, 0)] * 3 + [sample(30, 30, 10, 0), sample(40, 40, counted, 0)]
    found = finish(make_host(ends, {"nic0": IDLE}), "nic0", "no switch", EDGES, START)
    assert [one.holds for one in found] == [holds, None, None, None]
    assert "guests sent 40 frames" in found[0].text


def test_frames_that_a_member_of_a_bond_drops_are_no_finding() -> None:
    queues = {"nic0": IDLE, "eth0": QueueCounts(15, 0), "eth1": QueueCounts(0, 5)}
    end = take_sample(make_host([sample(20, 20, 20, 0)], queues), "nic0", "no switch", is_start=False)
    assert end.queue == QueueCounts(15, 5)
    assert judge(end)["guests-uplink"] is True


def test_uplink_of_a_guest_with_an_odd_address_is_compared_nevertheless() -> None:
    """As another program gives them: its frames are not counted apart, but those of the uplink are compared."""
    nics = [SimpleNamespace(interface=f"nh-{number}", mac=mac) for number, mac in ((1, str(MACS[0])), (2, "odd"), (3, "odd"))]
    guests: Any = [SimpleNamespace(nics=nics), SimpleNamespace(nics=[])]
    edges = (*EDGES, EdgeReading("nh-3", "nft-vepa", "", (), "nic1"), EdgeReading("nh-3", None, "does not exist"))
    assert list_addresses(guests, edges) == {"nic0": (MACS[0],), "nic1": ()}
