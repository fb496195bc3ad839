"""Rates between two readings of the host."""

from __future__ import annotations

from typing import cast

import pytest

from orchestrator.cli.host_rates import OtherRate, measure_others, measure_rates
from orchestrator.cli.top_pages import Line, Reading, draw_spark, show_guests
from orchestrator.client.host_shapes import Host


def reading(clock: float, *vcpus: tuple[float | None, float | None, dict[str, int] | None], version: int = 1) -> Host:
    activity = [
        {"cpu": 4 + number, "ran": ran, "waited": waited, "exits": exits} for number, (ran, waited, exits) in enumerate(vcpus)
    ]
    host = {"clock": clock, "activity": [{"guest": "web", "vcpus": activity, "why": ""}]}
    return cast("Host", {**host, "guests": [{"name": "web", "version": version, "state": "running"}]})


def test_rates_are_differences_per_second() -> None:
    before = reading(100.0, (1.0, 0.5, {"hlt": 10, "msr": 5}))
    (vcpu,) = measure_rates(before, reading(102.0, (2.0, 0.6, {"hlt": 14, "msr": 5, "io": 2})))["web"]
    assert (vcpu.cpu, vcpu.ran, vcpu.exits) == (4, 0.5, 3.0)
    assert vcpu.waited == pytest.approx(0.05)
    assert vcpu.reasons == {"hlt": 2.0, "msr": 0.0, "io": 1.0}
    assert vcpu.classes == {"halt": 2.0, "msr": 0.0, "io": 1.0}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(None, reading(2.0, (2.0, 0.0, {"hlt": 1})), id="first reading"),
        pytest.param(reading(2.0, (1.0, 0.0, {})), reading(2.0, (1.0, 0.0, {})), id="the same reading"),
        pytest.param(reading(1.0, (1.0, 0.0, {})), reading(2.0, (9.0, 0.0, {}), version=2), id="restarted"),
        pytest.param(reading(1.0, (5.0, 5.0, {"hlt": 9})), reading(2.0, (1.0, 1.0, {"hlt": 1})), id="counts fell"),
        pytest.param(reading(1.0, (1.0, 0.0, {}), (1.0, 0.0, {})), reading(2.0, (2.0, 0.0, {})), id="other number of vCPUs"),
        pytest.param(reading(1.0, (None, None, None)), reading(2.0, (2.0, 0.0, {})), id="not measured before"),
        pytest.param(reading(1.0, (1.0, 0.0, {})), reading(2.0, (None, None, None)), id="not measured now"),
    ],
)
def test_what_cannot_be_compared_has_no_rate(before: Host | None, after: Host) -> None:
    for vcpu in measure_rates(before, after)["web"]:
        assert (vcpu.ran, vcpu.waited, vcpu.exits, vcpu.classes) == (None, None, None, None)


ENDS = {"pid": None, "unit": ""}
Counts = dict[tuple[int, int, str], int]
"""(CPU, thread id, name) → switches."""


def of_threads(clock: float, counts: Counts | None) -> Host:
    host = reading(clock, (clock, clock / 100, {}))
    others = [
        {
            "cpu": cpu,
            "tid": tid,
            "name": name,
            "count": count,
            **({"pid": 4711, "unit": "backup.service"} if tid == 4712 else ENDS),
        }
        for (cpu, tid, name), count in (counts or {}).items()
    ]
    host["activity"][0]["others"] = None if counts is None else others  # type: ignore[typeddict-item]
    return host


BACKUP, ENDED, QUIET = (4, 4712, "backup"), (5, 99, "cc"), (4, 8, "migration/4")


def test_threads_that_ran_are_named_the_most_frequent_first() -> None:
    before = of_threads(100.0, {BACKUP: 10, QUIET: 7})
    after = of_threads(102.0, {BACKUP: 40, (5, 4712, "backup"): 10, ENDED: 3, QUIET: 7})
    assert measure_others(before, after)["web"] == (
        OtherRate("backup", 4712, 4711, "backup.service", 20.0),
        OtherRate("cc", 99, None, "", 1.5),
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(None, {BACKUP: 1}, id="not counted before"),
        pytest.param({BACKUP: 1}, None, id="not counted now"),
        pytest.param({BACKUP: 9}, {BACKUP: 1}, id="begun anew: fewer"),
        pytest.param({BACKUP: 9, ENDED: 1}, {BACKUP: 10}, id="begun anew: one is missing"),
    ],
)
def test_threads_that_cannot_be_compared_are_not_measured(before: Counts | None, after: Counts | None) -> None:
    assert measure_others(of_threads(1.0, before), of_threads(2.0, after)) == {"web": None}


def test_first_reading_has_no_threads() -> None:
    assert measure_others(None, of_threads(2.0, {BACKUP: 1})) == {"web": None}


def test_threads_of_a_restarted_guest_are_not_compared() -> None:
    """The vCPUs of its last run are threads of others now, with all their time slices."""
    after = of_threads(2.0, {BACKUP: 1, (4, 50, "CPU 0/KVM"): 900})
    after["guests"][0]["version"] = 2
    assert measure_others(of_threads(1.0, {BACKUP: 1}), after) == {"web": None}


def explain(before: Host, after: Host) -> list[Line]:
    """Of the guests' page, the lines about the wait; the guest waits 10 ms/s."""
    rates, others = measure_rates(before, after), measure_others(before, after)
    fields = {"cpus": [4], "exit_policy": None}
    host = after | {"lights": [], "guests": [{**guest, **fields} for guest in after["guests"]]}
    return [line for line in show_guests(Reading(cast("Host", host), rates, {}, others=others)) if "waited" in line[0]]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ({BACKUP: 10}, {BACKUP: 40}, "backup (4712 of process 4711, backup.service) 30.0/s"),
        ({}, {ENDED: 3}, "cc (99, ended) 3.0/s"),
        ({BACKUP: 10}, {BACKUP: 10}, "none"),
        ({BACKUP: 10}, None, "not measured"),
        ({}, {(4, tid, "x"): 1 for tid in range(20, 28)}, "x (20, ended) 1.0/s, x (21, ended) 1.0/s, x (22, ended) 1.0/s, "
         "x (23, ended) 1.0/s, x (24, ended) 1.0/s, 3 more"),
    ],
)  # fmt: skip
def test_wait_of_a_guest_is_explained(before: Counts, after: Counts | None, text: str) -> None:
    wanted = f"! guest web waited; other threads on its cores, in time slices per second: {text}"
    assert explain(of_threads(1.0, before), of_threads(2.0, after)) == [(wanted, "red")]


def test_guest_that_did_not_wait_needs_no_explanation() -> None:
    before, after = of_threads(1.0, {BACKUP: 1}), of_threads(2.0, {BACKUP: 30})
    after["activity"][0]["vcpus"][0]["waited"] = before["activity"][0]["vcpus"][0]["waited"]
    assert explain(before, after) == []


def test_bars() -> None:
    assert draw_spark([0, 5, 10]) == "▁▅█"
    assert draw_spark([0, 0]) == "▁▁"
    assert draw_spark([]) == ""
