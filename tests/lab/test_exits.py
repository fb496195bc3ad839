"""VM exits by hardware reason, as the lab's kernel counts them."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.conftest import LabHost

INSTANCE = "/sys/kernel/tracing/instances/nohype"


def read_exits(host: LabHost, guest: str) -> Any:
    return json.loads(host.nohype("exits", guest, "--json").stdout)


def test_exits_are_counted_by_reason(host: LabHost, guests: list[dict[str, Any]]) -> None:
    name, cpus = guests[0]["name"], guests[0]["cpus"]
    report = read_exits(host, name)
    assert report["why"] == ""
    assert len(report["vcpus"]) == len(cpus)
    for vcpu in report["vcpus"]:
        assert vcpu["uncounted"] <= 0.01 * vcpu["total"], "counted from the guest's first instruction"
        assert {"msr", "hlt"} <= vcpu["reasons"].keys(), "the names are those of SVM"
    classes = host.nohype("exits", name, "--by", "class").stdout
    assert "halt" in classes
    assert "other" not in classes.split("\n", 1)[0]


def test_restarted_manager_counts_on_and_leaves_other_traces_alone(host: LabHost, guests: list[dict[str, Any]]) -> None:
    """Another program's trigger stays, and the manager's own instance has one trigger."""
    name = guests[0]["name"]
    before = read_exits(host, name)["vcpus"][0]["reasons"]
    trigger = "/sys/kernel/tracing/events/kvm/kvm_exit/trigger"
    with host.changed(f"echo hist:keys=vcpu_id > {trigger}", f"echo '!hist:keys=vcpu_id' > {trigger}"):
        host.run("systemctl restart nohyped")
        assert "keys=vcpu_id" in host.run(f"cat {trigger}").stdout
        report = read_exits(host, name)
        assert report["why"] == ""
        assert all(report["vcpus"][0]["reasons"][reason] >= count for reason, count in before.items())
        lines = host.run(f"grep -v '^#' {INSTANCE}/events/kvm/kvm_exit/trigger").stdout.splitlines()
        assert len(lines) == 1
