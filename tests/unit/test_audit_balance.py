"""Invariants of frame counters: what breaks them, and what must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.audit.balance import Sample, compare, finish, take_sample
from orchestrator.audit.uplink import SwitchCount, prove_vepa
from orchestrator.host.root import HostRoot
from orchestrator.model.proof import Verdict
from orchestrator.model.switch import PortCounters
from orchestrator.model.uplink import EdgeReading, FrameCounts, InvariantReading, QueueCounts, Traffic, VepaReadings

EDGES = tuple(EdgeReading(f"nh-{number}", "macvtap-vepa", "", (), "nic0") for number in (1, 2))
ZERO = FrameCounts(0, 0, 0, 0, 0, 0)
START = Sample(dict.fromkeys(("nh-1", "nh-2", "nic0"), ZERO), dict.fromkeys(("nh-1", "nh-2", "nic0"), ZERO),
               PortCounters(0, 0, 0, 0, 0, 0), QueueCounts(0, 0))  # fmt: skip


def sample(one: int, two: int, uplink: int, back: int, *, into: int = -1, out: int = -1, dropped: int = 0) -> Sample:
    counts = {
        "nh-1": FrameCounts(one, 0, 0, 0, 0, 0), "nh-2": FrameCounts(two, 0, 0, 0, 0, 0),
        "nic0": FrameCounts(uplink, back, 0, 0, dropped, 0),
    }  # fmt: skip
    port = PortCounters(uplink if into < 0 else into, back if out < 0 else out, 0, 0, 0, 0)
    return Sample(counts, counts, port, QueueCounts(0, 0))


def judge(end: Sample, start: Sample = START, edges: tuple[EdgeReading, ...] = EDGES) -> dict[str, bool | None]:
    return {one.invariant: one.holds for one in compare("nic0", edges, start, end)}


HOLD = {"guests-uplink": True, "uplink-switch": True, "switch-reflected": True}


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
    assert [one.holds for one in found] == [holds, None, None]
    assert "guests sent 40 frames" in found[0].text


def test_frames_that_a_member_of_a_bond_drops_are_no_finding() -> None:
    queues = {"nic0": IDLE, "eth0": QueueCounts(15, 0), "eth1": QueueCounts(0, 5)}
    end = take_sample(make_host([sample(20, 20, 20, 0)], queues), "nic0", "no switch", is_start=False)
    assert end.queue == QueueCounts(15, 5)
    assert judge(end)["guests-uplink"] is True
