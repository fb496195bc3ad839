"""`nohype demo --fleet`, in labs of its own: a fleet of two hosts, one of which is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli.demo import FLEET_NAMES
from orchestrator.errors import LabLost
from orchestrator.host import netlink
from orchestrator.lab.fleet_demo import GUESTS
from orchestrator.lab.paths import list_folders
from orchestrator.lab.switch import netns_of

pytestmark = [pytest.mark.soak, pytest.mark.lab, pytest.mark.timeout(3600)]


def test_demo_passes_and_leaves_nothing(tmp_path: Path) -> None:
    argv = [Path(sys.executable).with_name("nohype"), "demo", "--fleet", "--report", tmp_path / "report.json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=3500, check=False)
    if done.returncode == 3:
        raise LabLost(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [host["name"] for host in report["hosts"]] == list(FLEET_NAMES)
    assert sorted(guest["name"] for host in report["hosts"] for guest in host["guests"]) == sorted(guest.name for guest in GUESTS)
    for host in report["hosts"]:
        assert len(host["guests"]) == 2, "each host has guests of its own"
        assert {proof["verdict"] for proof in host["proofs"]} == {"pass"}
    assert all(check["passed"] for check in report["checks"])
    assert not {folder.name for folder in list_folders()} & set(FLEET_NAMES)
    assert not netlink.netns_exists(netns_of(FLEET_NAMES[0]))
