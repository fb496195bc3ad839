"""Rates between two readings of the host."""

from __future__ import annotations

from typing import cast

import pytest

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


def test_bars() -> None:
    assert draw_spark([0, 5, 10]) == "▁▅█"
    assert draw_spark([0, 0]) == "▁▁"
    assert draw_spark([]) == ""
