"""A guest with the profile `tickless`: its application vCPUs hardly exit, whatever they compute."""

from __future__ import annotations

import time

import pytest

from orchestrator.waiting import wait_until
from tests.lab.conftest import LabHost
from tests.lab.test_exit_policy import disengaged, in_run

SECONDS = 60


@pytest.mark.soak
def test_busy_application_vcpus_hardly_exit(host: LabHost) -> None:
    """At most one exit per second. Each busy housekeeping vCPU has its tick: two exits 250 times per second, fewer in a lab."""
    options = ("--cores", "2", "--housekeeping", "0-1", "--profile", "tickless")
    with disengaged(host, "busy", *options):
        tell = f"nohype guest tell busy 'burn {3 * SECONDS}' --timeout {6 * SECONDS}"
        host.run(f"systemd-run --unit=test-burn --collect {tell}")
        try:
            # What starts the loops makes exits.
            assert wait_until(lambda: max(measure(host, 2)[2:]) < 5 and min(measure(host, 2)[:2]) > 20, timeout=60, interval=0.1)
            more = measure(host, SECONDS)
        finally:
            host.run("systemctl stop test-burn", check=False)
    assert min(more[:2]) > 10 * SECONDS, "the housekeeping vCPUs are busy, too"
    assert max(more[2:]) <= SECONDS


def measure(host: LabHost, seconds: float) -> list[int]:
    """Exits of each vCPU in at least this time."""
    before = in_run(host, "busy")
    time.sleep(seconds)
    return [sum(new.values()) - sum(old.values()) for new, old in zip(in_run(host, "busy"), before, strict=True)]
