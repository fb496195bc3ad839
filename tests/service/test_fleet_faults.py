"""Faults of the fleet's machines, with a real Slurm: hosts that are cut off or forgotten, full disks, wrong keys and clocks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.host.run import Completed
from tests.harness.large_folder import large_folder
from tests.harness.slurm import Cluster, FleetHost, running
from tests.harness.slurm_root import RELEASES

pytestmark = [
    pytest.mark.soak, pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and an overlay"),
]  # fmt: skip


@pytest.fixture(scope="module", params=RELEASES)
def fleet(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    # On the disk: memory is small in many containers, and an overlay must not be the upper layer of another one.
    with large_folder("cluster-faults") as folder, running(folder, release=request.param) as found:
        yield found


@pytest.fixture
def cluster(fleet: Cluster) -> Iterator[Cluster]:
    """As each test must leave it: without guests, records and running jobs, and with all nodes idle."""
    yield fleet
    fleet.run("scancel", "--user=nohype-fleet")
    fleet.wait_idle()
    assert not fleet.guests()
    fleet.wait_for(lambda: not fleet.find_records(), "the end of the Epilogs")
    assert not fleet.find_violations()


def submit(cluster: Cluster, name: str, *words: str, check: bool = True) -> Completed:
    return cluster.nohype("fleet", "submit", name, "--memory", "64M", "--image", "minimal", *words, check=check)


def start(cluster: Cluster, name: str, *words: str) -> FleetHost:
    """Starts a guest; returns its host."""
    submit(cluster, name, *words)
    cluster.wait_for(lambda: name in cluster.guests(), "the guest")
    (where,) = cluster.guests()[name]
    return next(host for host in cluster.hosts if host.name == where)


def show(cluster: Cluster, name: str) -> dict[str, Any]:
    return dict(json.loads(cluster.nohype("fleet", "show", name, "--json").stdout))


def use_only(cluster: Cluster, node: str) -> None:
    for other in cluster.node_names():
        if other != node:
            cluster.run("scontrol", "update", f"NodeName={other}", "State=DRAIN", "Reason=test")


def wait_down(cluster: Cluster, node: str) -> None:
    cluster.wait_for(lambda: cluster.node_states()[node].startswith("down"), f"{node} is down", timeout=120)


def test_host_that_is_cut_off_keeps_its_guest_and_ends_it_when_it_is_back(cluster: Cluster) -> None:
    host = start(cluster, "far", "--id", "order-1")
    cluster.cut(host)
    try:
        for node in host.nodes:
            wait_down(cluster, node.name)
        assert cluster.guests() == {"far": [host.name]}
        assert show(cluster, "far")["state"] == "NODE_FAIL"
        submit(cluster, "far", "--id", "order-1")  # the same id: it could still run
        near = start(cluster, "near")
        assert near != host
        assert cluster.guests() == {"far": [host.name], "near": [near.name]}
    finally:
        cluster.mend(host)
    cluster.wait_for(lambda: "far" not in cluster.guests(), "the end of the guest that was given up", timeout=120)
    assert "near" in cluster.guests()


def test_guest_whose_slurmd_runs_is_ended_if_the_controller_has_forgotten_it(cluster: Cluster) -> None:
    start(cluster, "web")
    cluster.forget_jobs()
    cluster.wait_for(lambda: not cluster.guests(), "the guest's end", timeout=120)


def test_host_that_comes_back_with_guests_that_the_controller_has_forgotten_ends_them(cluster: Cluster) -> None:
    host = start(cluster, "web")
    cluster.kill_host(host)
    cluster.forget_jobs()
    assert cluster.guests() == {"web": [host.name]}
    for node in host.nodes:
        cluster.start_slurmd(node.name)
    cluster.wait_for(lambda: not cluster.guests(), "the guest's end", timeout=120)


def test_host_that_comes_back_keeps_guests_that_the_controller_knows(cluster: Cluster) -> None:
    host = start(cluster, "web")
    for node in host.nodes:
        cluster.kill_slurmd(node.name)
    for node in host.nodes:
        cluster.start_slurmd(node.name)
    cluster.wait_for(lambda: "mixed" in cluster.node_states().values(), "the host is back")
    assert show(cluster, "web")["state"] == "RUNNING"
    assert cluster.guests() == {"web": [host.name]}


def restart_with(cluster: Cluster, host: FleetHost, munge: str, skew: str = "") -> None:
    for node in host.nodes:
        cluster.kill_slurmd(node.name)
        cluster.start_slurmd(node.name, munge, skew)


@pytest.mark.parametrize(("key", "skew"), [(b"another key of the fleet, 32 bytes", ""), (b"", "+2h"), (b"", "-2h")])
def test_host_with_a_wrong_key_or_clock_is_not_used(cluster: Cluster, key: bytes, skew: str) -> None:
    host = start(cluster, "first")
    munge = cluster.start_munge("other", key, skew)
    restart_with(cluster, host, munge, skew)
    try:
        for node in host.nodes:
            wait_down(cluster, node.name)
        assert cluster.guests() == {"first": [host.name]}
        assert start(cluster, "second") != host
    finally:
        cluster.run("sh", "-c", f"kill $(cat {munge}/pid-file)")
        restart_with(cluster, host, "/run/munge")
    # The controller has given the guest up meanwhile.
    cluster.wait_for(lambda: list(cluster.guests()) == ["second"], "the end of the first guest", timeout=120)


def test_clock_that_differs_less_than_the_life_of_a_credential_has_no_effect(cluster: Cluster) -> None:
    """munged accepts credentials for 300 s (munged(8), --max-ttl)."""
    host = cluster.hosts[0]
    munge = cluster.start_munge("late", skew="+120s")
    restart_with(cluster, host, munge, "+120s")
    try:
        cluster.wait_idle()
        assert start(cluster, "web") == host
        cluster.nohype("fleet", "cancel", "web")
        cluster.wait_for(lambda: not cluster.guests(), "the guest's end")
    finally:
        cluster.run("sh", "-c", f"kill $(cat {munge}/pid-file)")
        restart_with(cluster, host, "/run/munge")


@pytest.mark.parametrize("folder", ["/var/lib/slurm/slurmd.host1-n0", "/var/lib/nohype/fleet-host1"])
def test_full_disk_of_a_host_refuses_a_guest_and_loses_none(cluster: Cluster, folder: str) -> None:
    node = "host1-n0"
    cluster.kill_slurmd(node)
    cluster.start_slurmd(node, small=folder)
    use_only(cluster, node)
    try:
        start(cluster, "first")
        full = cluster.run_beside_slurmd(node, f"cat /dev/zero > {folder}/filler")
        assert "No space left" in full.stderr
        submit(cluster, "second", check=False)
        cluster.wait_for(lambda: "drain" in cluster.node_states()[node], "the refusal")
        assert any(reason in cluster.nohype("fleet", "hosts").stdout for reason in ("is full", "No space left"))
        assert list(cluster.guests()) == ["first"]
        cluster.nohype("fleet", "cancel", "first")
        cluster.wait_for(lambda: not cluster.guests(), "the guest's end on the full disk")
    finally:
        cluster.run_beside_slurmd(node, f"rm {folder}/filler")
        cluster.wait_for(lambda: cluster.run_beside_slurmd(node, f"! ls {folder} | grep json").status == 0, "the Epilogs", 120)
        cluster.kill_slurmd(node)
        cluster.start_slurmd(node)
        cluster.run("scancel", "--user=nohype-fleet")
        cluster.wait_for(lambda: set(cluster.node_states().values()) <= {"idle", "drained"}, "the end of the jobs")
        cluster.resume()


def test_full_disk_of_the_controller_refuses_a_guest_and_loses_none(cluster: Cluster) -> None:
    """It cannot store that it starts a guest. The small disk is only for that, so that its log and state are not lost."""
    start(cluster, "first")
    marks = "/var/lib/slurm/slurmctld/nohype-started"
    cluster.run("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", marks)
    try:
        submit(cluster, "second")
        cluster.wait_for(lambda: show(cluster, "second")["state"] == "CANCELLED", "the refusal")
        assert "the controller cannot store that it starts the guest: check the space in" in show(cluster, "second")["note"]
        assert list(cluster.guests()) == ["first"]
    finally:
        cluster.run("umount", marks)
    start(cluster, "third")
    assert sorted(cluster.guests()) == ["first", "third"]
