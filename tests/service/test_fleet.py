"""Guests as jobs of a real Slurm (munge, slurmctld, slurmd), with a real manager on a fake host behind each host of the fleet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.host.run import Completed
from orchestrator.values import CpuSet
from tests.harness.fleet_kills import run_kills
from tests.harness.slurm import Cluster, running

pytestmark = [pytest.mark.soak, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and an overlay")]

KILLS = int(os.environ.get("NOHYPE_FLEET_KILLS", "20"))
SEED = int(os.environ.get("NOHYPE_FLEET_SEED", "1"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from tempfile import TemporaryDirectory

    # On the disk: memory is small in many containers, and an overlay must not be the upper layer of another one.
    with TemporaryDirectory(dir="/var/tmp") as folder, running(Path(folder)) as fleet:
        yield fleet


def submit(cluster: Cluster, name: str, *words: str, check: bool = True) -> Completed:
    request = ("--memory", "64M", "--image", "minimal", *words)
    return cluster.nohype("fleet", "submit", name, *request, check=check)


def show(cluster: Cluster, name: str) -> dict[str, object]:
    shown: dict[str, object] = json.loads(cluster.nohype("fleet", "show", name, "--json").stdout)
    return shown


def test_guest_runs_on_what_slurm_allocated_and_is_gone_after_cancel(cluster: Cluster) -> None:
    submit(cluster, "web", "--cores", "2", "--id", "order-1")
    assert cluster.guests() == {"web": ["host1"]}
    host = cluster.hosts[0]
    guest, node = host.served.client.guest("web"), host.nodes[0]
    allocation = cluster.run("sh", "-c", "scontrol show job --details | grep CPU_IDs=").stdout
    assert "CPU_IDs=0-3" in allocation
    assert CpuSet.of(guest["cpus"]) == node.map_cpus(CpuSet.parse("0-3")) == CpuSet.parse("2-5")
    assert guest["vf"]
    assert guest["vf"]["address"] == str(node.vfs[0])
    assert guest["id"] == "order-1"
    again = submit(cluster, "web", "--cores", "2", "--id", "order-1")  # a repetition shows the same job
    assert json.loads(cluster.nohype("fleet", "show", "web", "--json").stdout)["number"] == 1
    assert "job:    1" in again.stdout
    cluster.nohype("fleet", "cancel", "web")
    cluster.wait_for(lambda: not cluster.guests(), "the guest's end")
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the Epilog")
    assert show(cluster, "web")["state"] == "CANCELLED"
    assert not host.served.client.guests()


def test_constraint_that_no_host_can_meet_is_refused_with_a_reason_per_node(cluster: Cluster) -> None:
    refused = submit(cluster, "big", "--cores", "4", "--nic", "", "--nic", "", "--feature", "gpu", check=False)
    assert refused.status == 1
    assert "host1-n0: 3 cores, 4 requested, lacks the feature gpu" in refused.stderr
    assert refused.stderr.count("lacks the feature gpu") == 4


def test_failed_start_is_explained_and_leaves_nothing(cluster: Cluster) -> None:
    submit(cluster, "bad", "--image", "nothing")
    assert "no guest image 'nothing'" in str(show(cluster, "bad")["note"])
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the Epilog")
    assert not cluster.guests()


def test_host_that_lacks_a_vf_is_taken_out_of_use(cluster: Cluster) -> None:
    """The configuration promises what the host no longer has."""
    files = Path(cluster.folder) / "etc/nohype-nodes.conf"
    text = files.read_text()
    files.write_text(text.replace("RealMemory=1024", "RealMemory=2048"))  # read by the Prolog; Slurm has read the file before
    try:
        submit(cluster, "late")
        cluster.wait_for(lambda: any("drain" in state for state in cluster.node_states().values()), "the Prolog's refusal")
        assert not cluster.guests()
        assert "RealMemory=2048" in str(show(cluster, "late")["note"])
        assert "RealMemory=2048 in nohype-nodes.conf, the host has 1024" in cluster.nohype("fleet", "hosts").stdout
    finally:
        files.write_text(text)
        for name, state in cluster.node_states().items():
            if "drain" in state:
                cluster.wait_for(lambda name=name: cluster.node_states()[name] in ("drained", "idle"), "the drain")  # type: ignore[misc]
                cluster.run("scontrol", "update", f"NodeName={name}", "state=resume")
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the nodes")


def test_programs_killed_at_random_lose_and_double_no_guest(cluster: Cluster) -> None:
    outcome = run_kills(cluster, KILLS, SEED, lambda _line: None)
    print(f"seed {SEED}: {outcome}")
    assert not outcome.faults, (SEED, outcome)
    assert outcome.started
