"""Rates between two readings of the host, and the verdicts of guests in a few words."""

from __future__ import annotations

from typing import Any, cast

import pytest

from orchestrator.cli.attention import format_age, list_attention, show_light
from orchestrator.cli.host_rates import measure_rates
from orchestrator.cli.top_pages import draw_spark
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


def audited(*proofs: tuple[str, bool]) -> Host:
    found = [
        {
            "name": f"p{number}",
            "subject": "web",
            "verdict": verdict,
            "figure": 0,
            "unit": "",
            "finding": "x",
            "outdated": outdated,
        }
        for number, (verdict, outdated) in enumerate(proofs)
    ]
    return cast("Host", {"audit": {"age": 90.0, "proofs": found}})


@pytest.mark.parametrize(
    ("host", "text", "colour"),
    [
        (cast("Host", {"audit": None}), "not audited", "yellow"),
        (audited(), "not audited", "yellow"),
        (audited(("pass", False), ("pass", False)), "2 pass, 1 min ago", "green"),
        (audited(("pass", False), ("not measured", False)), "1 pass, 1 not measured, 1 min ago", "yellow"),
        (audited(("pass", True), ("not measured", False)), "outdated: changed since", "yellow"),
        (audited(("pass", True), ("fail", True)), "FAIL p1, 1 min ago", "red"),
    ],
)
def test_only_a_complete_audit_is_green(host: Host, text: str, colour: str) -> None:
    assert show_light(host, "web") == (text, colour)


def test_oldest_comes_first() -> None:
    parts: dict[str, Any] = {
        "quarantine": [{"name": "b", "since": "2026-02-01T00:00:00", "reasons": ["r"]}],
        "drift": [{"subject": "host", "since": "2026-01-01T00:00:00", "findings": ["f"]}],
        "guests": [{"name": "c", "state": "ended"}],
        "lost": ["nic0"],
        "audit": None,
        "survey": {"findings": [{"severity": "warning", "text": "t", "hint": "h"}]},
    }
    found = list_attention(cast("Host", parts))
    assert [one.command for one in found] == [
        "nohype events", "nohype quarantine clear b", "nohype guest start c", "nohype uplink prove nic0", "h",
    ]  # fmt: skip


def test_ages_and_bars() -> None:
    assert [format_age(seconds) for seconds in (0, 59.9, 60, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
    assert draw_spark([0, 5, 10]) == "▁▅█"
    assert draw_spark([0, 0]) == "▁▁"
    assert draw_spark([]) == ""
