"""Guests as jobs of a real Slurm (munge, slurmctld, slurmd), with a real manager on a fake host behind each host of the fleet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from orchestrator.host.run import Completed
from orchestrator.values import CpuSet
from tests.harness.slurm import Cluster, running

pytestmark = [pytest.mark.soak, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and an overlay")]

KILLS = int(os.environ.get("NOHYPE_FLEET_KILLS", "20"))
SEED = int(os.environ.get("NOHYPE_FLEET_SEED", "1"))
_IN_FLIGHT = 4


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


def kill_something(cluster: Cluster, rng: Random) -> str:
    """Kills one program, and starts it again after a while."""
    scripts = cluster.find_processes("fleet step job")
    what = rng.choice(("controller", "controller", "slurmd", *(["job script"] if scripts else [])))
    if what == "controller":
        cluster.kill_controller()
        time.sleep(rng.uniform(0, 2))
        cluster.start_controller()
    elif what == "slurmd":
        node = rng.choice(cluster.node_names())
        cluster.kill_slurmd(node)
        time.sleep(rng.uniform(0, 2))
        cluster.start_slurmd(node)
        what += f" of {node}"
    else:
        cluster.run("kill", "-9", rng.choice(scripts), check=False)
    return what


def test_programs_killed_at_random_lose_and_double_no_guest(cluster: Cluster) -> None:
    rng, faults, log, names = Random(SEED), [], [], iter(f"guest{number}" for number in range(1000))
    results: dict[str, Future[Completed]] = {}
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        for _ in range(KILLS):
            while sum(not result.done() for result in results.values()) < _IN_FLIGHT and len(cluster.guests()) < 10:
                name = next(names)
                results[name] = pool.submit(submit, cluster, name, "--cores", str(rng.choice((1, 1, 2))), check=False)
                time.sleep(rng.uniform(0, 0.5))
            time.sleep(rng.uniform(0, 3))
            log.append(kill_something(cluster, rng))
            faults += cluster.find_faults()
            for name in rng.sample(sorted(cluster.guests()), min(1, len(cluster.guests()))):
                if rng.random() < 0.4:
                    cluster.nohype("fleet", "cancel", name, check=False)
        done = {name: result.result(300) for name, result in results.items()}

    def is_settled() -> bool:
        """Each running job has its guest, and each guest its job, on the same host."""
        jobs = {name: [node.rpartition("-")[0] for node in nodes] for name, nodes in cluster.jobs().items()}
        return jobs == cluster.guests() and not any("comp" in state for state in cluster.node_states().values())

    cluster.wait_for(is_settled, f"jobs and guests agree after {log}", timeout=120)
    faults += cluster.find_faults()
    shown = {job["name"]: job for job in json.loads(cluster.nohype("fleet", "list", "--json").stdout)}
    for name, result in done.items():  # each caller has learnt what became of the guest
        if result.status == 0 and name not in shown:
            faults.append(f"{name} was confirmed and is forgotten")
        if result.status and name in shown and not result.stderr:
            faults.append(f"{name} was refused without a message")
    counts = {state: sum(job["state"] == state for job in shown.values()) for state in {job["state"] for job in shown.values()}}
    reasons = cluster.run("sinfo", "-R", "--noheader").stdout
    print(f"seed {SEED}: {log}, {len(done)} guests submitted, states {counts}, nodes {cluster.node_states()} {reasons}")
    assert not faults, (SEED, log, faults)
    for name in cluster.jobs():
        cluster.nohype("fleet", "cancel", name)
    cluster.wait_for(lambda: not cluster.guests(), "the end of all guests")
