"""What `guest show` says about a guest's part of the caches, in units that a reader knows."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cli.guest_show import print_guest
from orchestrator.model.cache import BandwidthUnit

SHOWN: dict[str, Any] = {
    "name": "web", "state": "stopped", "cores": ["2-3"], "node": 0, "cpus": [2, 3], "memory": 1 << 30, "huge_pages": 512,
    "page_size": 2 << 20, "nics": [], "image": "debian", "cmdline": "", "restarts": 0, "restart": "never", "hostname": "web",
    "ssh_keys": 0, "user_data": None, "network_config": None, "owner": "", "id": None, "ssh_host_key": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        (BandwidthUnit.PERCENT, 40, "at most 40% for L3 cache 0, 1"),
        (BandwidthUnit.EIGHTH_GB, 33, "at most 4125 MB/s for L3 cache 0, 1"),
        (BandwidthUnit.MEGABYTES, 4000, "at most 4000 MB/s for L3 cache 0, 1"),
    ],
)
def test_bandwidth_in_a_unit_that_the_reader_knows(
    capsys: pytest.CaptureFixture[str], unit: BandwidthUnit, value: int, text: str
) -> None:
    caches = {"level": 3, "shares": [{"id": 0, "mask": 0xF00}], "bandwidth": value, "unit": str(unit), "throttled": [0, 1]}
    print_guest({**SHOWN, "caches": caches})
    shown = capsys.readouterr().out
    assert text in shown
    assert "ways 0xf00 of L3 cache 0" in shown
