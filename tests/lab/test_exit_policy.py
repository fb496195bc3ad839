"""The end of a guest's boot, and what happens to a guest that floods the host with VM exits afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator.waiting import wait_until
from tests.lab.conftest import LabHost
from tests.lab.test_exits import read_exits

KINDS = ("cpuid", "io", "hypercall", "msr", "mmio")
"""Floods of the image's program, whose budgets have the same names."""
SECONDS = 3
# A lab on a loaded machine makes 1,000 exits per second at least, and a command on the console fewer than 300.
BUDGETS = [word for kind in KINDS for word in ("--exit-budget", f"housekeeping:{kind}=500/s")]


@contextmanager
def disengaged(host: LabHost, name: str, *options: str) -> Iterator[None]:
    """A guest whose boot is over."""
    host.nohype("guest", "create", name, "--memory", "128M", "--image", "minimal", "--wait", "300", *options)
    try:
        assert wait_until(lambda: show(host, name)["disengaged"], timeout=120, interval=1)
        yield
    finally:
        host.nohype("guest", "delete", name, check=False)


def show(host: LabHost, name: str) -> Any:
    return json.loads(host.nohype("guest", "show", name, "--json").stdout)


def reports(host: LabHost, name: str) -> list[str]:
    events = json.loads(host.nohype("events", "--json").stdout)
    return [event["detail"] for event in events if (event["kind"], event["subject"]) == ("exit-policy", name)]


def in_run(host: LabHost, name: str) -> list[dict[str, int]]:
    """Exits since the boot was over, by vCPU and reason."""
    report = json.loads(host.nohype("exits", name, "--phase", "run", "--json").stdout)
    assert report["why"] == ""
    return [vcpu["reasons"] for vcpu in report["vcpus"]]


def count_io(host: LabHost, name: str) -> int:
    return sum(vcpu.get("io", 0) for vcpu in in_run(host, name))


def test_guest_of_the_image_ends_its_boot_itself(host: LabHost, guests: list[dict[str, Any]]) -> None:
    name = guests[0]["name"]
    assert wait_until(lambda: show(host, name)["disengaged"], timeout=120, interval=1)
    before = show(host, name)["disengaged"]
    assert before["signal"] == "call", "of a program in ring 3, which KVM refuses"
    boot = json.loads(host.nohype("exits", name, "--phase", "boot", "--json").stdout)
    assert sum(vcpu["reasons"].get("io", 0) for vcpu in boot["vcpus"]) > 100
    host.run("systemctl restart nohyped")
    assert show(host, name)["disengaged"] == before
    run = in_run(host, name)
    total = read_exits(host, name)["vcpus"]  # read last: they are more by then
    for both, first, rest in zip(total, boot["vcpus"], run, strict=True):
        # KVM's total at the end of the boot is read after the reasons, and contains some that these do not.
        assert both["total"] >= sum(first["reasons"].values()) + sum(rest.values())


@pytest.mark.soak
def test_floods_are_reported_and_neighbours_do_not_notice(host: LabHost, guests: list[dict[str, Any]]) -> None:
    neighbour = guests[0]["name"]
    with disengaged(host, "flood", *BUDGETS):
        # The serial port can still be sending what the guest's boot has written.
        assert wait_until(lambda: count_io(host, "flood") == count_io(host, "flood"), timeout=60, interval=0.1)
        assert reports(host, "flood") == []
        kinds = ("io", "cpuid", "hypercall")
        before = [[vcpu.get(kind, 0) for kind in kinds] for vcpu in in_run(host, neighbour)]
        for kind in KINDS:
            answer = host.nohype("guest", "tell", "flood", f"exits {kind} {SECONDS}").stdout
            assert answer.startswith(f"nohype: done exits kind={kind}")
            found = [f" of {kind} in " in text for text in reports(host, "flood")]
            assert any(found), f"{kind}: not reported while it lasted"
        assert [[vcpu.get(kind, 0) for kind in kinds] for vcpu in in_run(host, neighbour)] == before


def test_flood_is_killed(host: LabHost, guests: list[dict[str, Any]]) -> None:
    with disengaged(host, "flood", "--exit-budget", "housekeeping:npf=2000/s", "--exit-action", "kill"):
        flood = host.nohype("guest", "tell", "flood", "exits npf 60", check=False)
        assert flood.status != 0, "the guest ended before its flood"
        assert wait_until(lambda: show(host, "flood")["state"] == "stopped", timeout=60, interval=1)
        text = reports(host, "flood")[-1]  # the guest of the test before had the same name
        assert " exits of npf in " in text
        assert text.endswith("allowed 2000 per second; killed")
        assert show(host, guests[0]["name"])["state"] == "running"
