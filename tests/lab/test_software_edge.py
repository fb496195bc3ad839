"""Two guests on software edges: virtio NICs on macvtaps or taps of the PF, which the host uses as a plain NIC.

The configuration of the manager is changed while no guest exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.host.netlink import set_hairpin
from orchestrator.lab import switch
from orchestrator.model.proof import Verdict
from orchestrator.waiting import wait_until
from tests.lab.conftest import LabHost
from tests.lab.test_manager import MEMORY, survey

CONFIG = "/etc/nohype/nohype.toml"
ACCEPT = ("--accept", "software-edge")


@pytest.fixture(scope="module", params=["macvtap-vepa", pytest.param("nft-vepa", marks=pytest.mark.soak)])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def software(host: LabHost, mode: str) -> Iterator[LabHost]:
    """The lab host with nic0 configured as a plain NIC, without guests."""
    section = rf'printf "\n[uplinks.nic0]\nedge = \"{mode}\"\n"'
    # Without its last guest the PF loses its VFs, which resets it.
    host.run('for n in $(seq 60); do [ "$(cat /sys/class/net/nic0/carrier)" = 1 ] && break; sleep 1; done')
    before = survey(host)
    with host.changed(
        f"cp -p {CONFIG} {CONFIG}.before && {section} >> {CONFIG} && systemctl restart nohyped",
        f"mv {CONFIG}.before {CONFIG} && systemctl restart nohyped",
    ):
        yield host
        for name in ("edge1", "edge2"):
            host.nohype("guest", "delete", name, check=False)
        assert host.run("ip -br link | grep -E '^n[hb]-'", check=False).stdout == ""
        assert "PROMISC" not in host.run("ip -br link show nic0").stdout
        assert host.run("nft list tables").stdout == ""
    after = survey(host)
    assert {key: after[key] for key in before if after[key] != before[key]} == {}


@pytest.fixture(scope="module")
def edges(software: LabHost) -> list[dict[str, Any]]:
    """Two running guests."""
    for number in (1, 2):
        address = f"10.9.0.{20 + number}/24"
        software.nohype("guest", "create", f"edge{number}", *MEMORY, "--address", address, *ACCEPT)
    return software.await_ready("edge1", "edge2")


def test_software_edge_must_be_accepted(software: LabHost) -> None:
    refused = software.nohype("guest", "create", "no", *MEMORY, check=False)
    assert refused.status == 1
    assert "--accept software-edge" in refused.stderr


def test_no_guest_starts_without_hairpin(software: LabHost) -> None:
    port = switch.port(software.lab.name)
    set_hairpin(port.interface, port.netns, on=False)
    try:
        refused = software.nohype("guest", "create", "no", *MEMORY, *ACCEPT, check=False)
        assert "0 of 5 probe frames came back" in refused.stderr
    finally:
        set_hairpin(port.interface, port.netns, on=True)
    assert json.loads(software.nohype("guest", "list", "--json").stdout) == []


def test_guests_ping_each_other_through_the_switch(software: LabHost, edges: list[dict[str, Any]], mode: str) -> None:
    assert [(one["vf"], one["nics"][0]["edge"], one["waived"]) for one in edges] == [(None, mode, ["software-edge"])] * 2
    assert " received=3 " in software.nohype("guest", "tell", "edge1", "ping 10.9.0.22 3").stdout
    mac = software.nohype("guest", "tell", "edge2", "mac").stdout.strip()
    assert mac.endswith(edges[1]["nics"][0]["mac"])


def test_threads_of_the_nic_run_on_housekeeping_cpus(software: LabHost, edges: list[dict[str, Any]]) -> None:
    tasks = "/proc/$(cat /run/libvirt/qemu/edge1.pid)/task"
    workers = software.run(f"grep -l ^vhost- {tasks}/*/comm").stdout.split()
    assert workers
    for worker in workers:
        allowed = software.run(f"grep Cpus_allowed_list {worker.removesuffix('comm')}status").stdout.split()[1]
        assert allowed == edges[0]["housekeeping"]


def test_proofs_pass_and_say_what_is_weaker(software: LabHost, edges: list[dict[str, Any]]) -> None:
    proofs = software.proofs(frames=30)
    # No device is passed through.
    skipped = {(name, edge["name"]) for name in ("device-isolated", "network-isolated") for edge in edges}
    failed = {key: one.evidence for key, one in proofs.items() if one.verdict != Verdict.PASS and key not in skipped}
    failed = {key: evidence for key, evidence in failed.items() if not key[0].startswith("disk-")}
    assert failed == {}
    assert any("can read every frame" in line for line in proofs["vepa", "host"].evidence)


def test_local_switching_is_reported_and_restored(software: LabHost, edges: list[dict[str, Any]], mode: str) -> None:
    if mode != "macvtap-vepa":
        pytest.skip("the kernel never switches between taps")
    taps = [edge["nics"][0]["tap"] for edge in edges]
    software.run("systemctl kill -s STOP nohyped")
    try:
        for tap in taps:
            software.run(f"ip link set {tap} type macvtap mode bridge")
        assert "mode bridge" in software.run(f"ip -d link show {taps[0]}").stdout
    finally:
        software.run("systemctl kill -s CONT nohyped")
    software.run(f"for n in $(seq 120); do ip -d link show {taps[0]} | grep -q 'mode vepa' && break; sleep 1; done")
    text = "{}: mode is bridge, expected vepa (restored)"

    def are_reported() -> bool:
        events = software.nohype("events").stdout
        return all(text.format(tap) in events for tap in taps)

    assert wait_until(are_reported, timeout=60, interval=0.5)  # written after the change


def test_flushed_rules_are_restored(software: LabHost, edges: list[dict[str, Any]]) -> None:
    """As after the restart of a firewall: the kernel's notification causes it, not the manager's periodic check."""
    tables = [f"nohype-{edge['nics'][0]['tap']}" for edge in edges]
    wait = "; ".join(f"until nft list table netdev {table} >/dev/null 2>&1; do sleep 0.2; done" for table in tables)
    begin = software.run(f"nft flush ruleset; date +%s.%N; {{ timeout 120 sh -c '{wait}'; }} && date +%s.%N").stdout.split()
    print(f"rules were restored after {float(begin[1]) - float(begin[0]):.1f} s")
    says = "nftables table netdev {} are missing or were changed (restored)"

    def are_reported() -> bool:
        events = software.nohype("events").stdout
        return all(says.format(table) in events for table in tables)

    assert wait_until(are_reported, timeout=60, interval=1)


def test_other_macvtap_on_the_uplink_is_named(software: LabHost, edges: list[dict[str, Any]]) -> None:
    del edges
    with software.changed("ip link add stray link nic0 type macvtap mode bridge", "ip link delete stray"):
        evidence = "\n".join(software.proofs()["vepa", "host"].evidence)
    assert "nic0 also carries interfaces that are not of guests: stray (macvtap bridge)" in evidence


def test_adopted_guests_keep_their_taps(software: LabHost, edges: list[dict[str, Any]]) -> None:
    show = f"ip -o -d link show {edges[0]['nics'][0]['tap']} | cut -d: -f1"
    before = software.run(show).stdout
    software.run("systemctl restart nohyped")
    assert {one["state"] for one in json.loads(software.nohype("guest", "list", "--json").stdout)} == {"running"}
    assert software.run(show).stdout == before
    assert " received=3 " in software.nohype("guest", "tell", "edge1", "ping 10.9.0.22 3").stdout


@pytest.mark.soak
def test_hairpin_switched_off_fails_the_proof(software: LabHost, edges: list[dict[str, Any]]) -> None:
    del edges
    port = switch.port(software.lab.name)
    set_hairpin(port.interface, port.netns, on=False)
    try:
        assert software.proofs(frames=5)["vepa", "host"].verdict == Verdict.FAIL
    finally:
        set_hairpin(port.interface, port.netns, on=True)
