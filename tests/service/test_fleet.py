"""Guests as jobs of a real Slurm (munge, slurmctld, slurmd), with a real manager on a fake host behind each host of the fleet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.fleet.hostlist import expand
from orchestrator.host.run import Completed
from orchestrator.values import CpuSet
from tests.harness.fleet_kills import run_kills
from tests.harness.large_folder import large_folder
from tests.harness.slurm import Cluster, FleetHost, running
from tests.harness.slurm_root import DEBIAN_13, RELEASES

pytestmark = [pytest.mark.soak, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces and an overlay")]

KILLS = int(os.environ.get("NOHYPE_FLEET_KILLS", "20"))
SEED = int(os.environ.get("NOHYPE_FLEET_SEED", "1"))


@pytest.fixture(scope="module", params=RELEASES)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    # On the disk: memory is small in many containers, and an overlay must not be the upper layer of another one.
    with large_folder("cluster") as folder, running(folder, release=request.param) as fleet:
        assert request.param != DEBIAN_13 or fleet.read_version().startswith("slurm-wlm 24.11.")
        yield fleet


def submit(cluster: Cluster, name: str, *words: str, check: bool = True) -> Completed:
    request = ("--memory", "64M", "--image", "minimal", *words)
    return cluster.nohype("fleet", "submit", name, *request, check=check)


def show(cluster: Cluster, name: str) -> dict[str, object]:
    shown: dict[str, object] = json.loads(cluster.nohype("fleet", "show", name, "--json").stdout)
    return shown


def test_guest_runs_on_what_slurm_allocated_and_is_gone_after_cancel(cluster: Cluster) -> None:
    submit(cluster, "web", "--cores", "2", "--id", "order-1")
    cluster.wait_for(lambda: cluster.guests(), "the guest")
    assert cluster.guests() == {"web": ["host1"]}
    host = cluster.hosts[0]
    guest, node = host.served.client.guest("web"), host.nodes[0]
    allocation = cluster.run("sh", "-c", "scontrol show job --details | grep CPU_IDs=").stdout
    assert "CPU_IDs=0-3" in allocation
    assert CpuSet.of(guest["cpus"]) == node.map_cpus(CpuSet.parse("0-3")) == CpuSet.parse("2-5")
    assert guest["vf"]
    assert guest["vf"]["address"] == str(node.vfs[0])
    assert guest["id"] == "order-1"
    code = "from orchestrator.fleet.processes import find_job_scripts; print(*find_job_scripts())"
    scripts = cluster.run("env", f"PYTHONPATH={Path.cwd()}", sys.executable, "-c", code).stdout
    assert scripts == "('host1-n0', 1)\n"
    again = submit(cluster, "web", "--cores", "2", "--id", "order-1")  # a repetition shows the same job
    assert json.loads(cluster.nohype("fleet", "show", "web", "--json").stdout)["number"] == 1
    assert "job:       1\n" in again.stdout
    cluster.nohype("fleet", "cancel", "web")
    cluster.wait_for(lambda: not cluster.guests(), "the guest's end")
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the Epilog")
    assert show(cluster, "web")["state"] == "CANCELLED"
    assert not host.served.client.guests()


def test_start_that_the_controller_forgets_is_not_repeated(cluster: Cluster) -> None:
    """It saves its state every 5 s; here the guest waits for longer, and starts just before the controller is killed."""
    for node in cluster.node_names():
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    submit(cluster, "once")
    cluster.resume()
    cluster.wait_for(lambda: cluster.guests(), "the guest")
    starts = [life.start for host in cluster.hosts for life in host.served.world.hypervisor.lives()]
    cluster.kill_controller()
    cluster.start_controller()
    cluster.resume()  # it may have forgotten this, too
    cluster.wait_for(lambda: show(cluster, "once")["state"] in ("CANCELLED", "RUNNING"), "the decision of the controller")
    if show(cluster, "once")["state"] == "CANCELLED":
        assert "a guest with this id was already started on host" in str(show(cluster, "once")["note"])
        cluster.wait_for(lambda: not cluster.guests(), "the end of the guest")
    else:  # it was slow, and has saved the start
        assert [life.start for host in cluster.hosts for life in host.served.world.hypervisor.lives()] == starts
        cluster.nohype("fleet", "cancel", "once")
    cluster.wait_idle()


def test_end_that_the_controller_forgets_is_reported_again_by_the_host(cluster: Cluster) -> None:
    submit(cluster, "brief")
    cluster.wait_for(lambda: show(cluster, "brief")["state"] == "RUNNING" and cluster.guests(), "the guest")
    newer = "touch /run/seen; until [ /var/lib/slurm/slurmctld/job_state -nt /run/seen ]; do sleep 0.1; done"
    cluster.run("sh", "-c", newer)  # the controller has saved that it runs
    cluster.run("kill", "-9", *cluster.find_processes("fleet step job"), check=False)
    cluster.wait_for(lambda: not cluster.jobs(), "the end of the job")
    cluster.kill_controller()
    cluster.start_controller()
    cluster.wait_for(lambda: show(cluster, "brief")["state"] in ("CANCELLED", "FAILED"), "the end", timeout=120)
    found = show(cluster, "brief")
    assert found["state"] == "FAILED" or "forgot that" in str(found["note"])  # FAILED: the controller has saved it
    cluster.wait_idle()


def test_second_start_of_a_job_is_refused_by_the_controller(cluster: Cluster) -> None:
    submit(cluster, "twice")
    cluster.wait_for(lambda: cluster.guests(), "the guest")
    number = show(cluster, "twice")["number"]
    comment = cluster.run("squeue", "--noheader", "--name=twice", "--format=%k").stdout.strip()
    words = (f"SLURM_JOB_ID={number}", f"SLURM_JOB_COMMENT={comment}", "SLURM_JOB_NODELIST=host2-n0", "/etc/slurm/nohype-start")
    assert cluster.run("env", "--ignore-environment", *words, check=False).status == 1
    assert "a guest with this id was already started on host1-n0; the controller does not know that guest any more" in str(
        show(cluster, "twice")["note"]
    )
    cluster.nohype("fleet", "cancel", "twice", "--wait")


def test_batch_is_submitted_once_and_cancelled_together(cluster: Cluster) -> None:
    names = [f"many{number}" for number in range(8)]
    text = json.dumps([{"name": name, "memory": "64M", "image": "minimal", "minutes": 60} for name in names])
    for _ in range(2):
        done = cluster.nohype("fleet", "submit-all", "-", "--id", "batch-1", "--json", input=text)
        assert [(one["name"], one["error"]) for one in json.loads(done.stdout)] == [(name, "") for name in names]
        cluster.wait_for(lambda: sorted(cluster.guests()) == names, "the guests")
    assert all(len(hosts) == 1 for hosts in cluster.guests().values())
    ended = names[:2]
    cluster.nohype("fleet", "cancel", *ended, "--wait", "--timeout", "120")
    again = cluster.nohype("fleet", "submit-all", "-", "--id", "batch-2", "--only-ended", "--json", input=text)
    assert [one["guest_id"] for one in json.loads(again.stdout)] == [
        f"batch-{2 if name in ended else 1}:{name}" for name in names
    ]
    cluster.wait_for(lambda: sorted(cluster.guests()) == names, "the guests")
    too_big = json.dumps([*json.loads(text), {"name": "big", "memory": "64G", "image": "minimal"}]).replace("many", "more")
    refused = cluster.nohype("fleet", "submit-all", "-", check=False, input=too_big)
    assert refused.status == 1
    assert "no host of the fleet can have guest big" in refused.stderr
    cluster.nohype("fleet", "cancel", *names, "--wait", "--timeout", "120")
    assert not cluster.guests()
    assert cluster.nohype("fleet", "cancel", "many0", "absent", check=False).status == 1
    cluster.wait_idle()


@pytest.mark.parametrize("text", ["a,b-n0", "h[08-11]", "h[001,3-4,007]", "h[1-2]-n[0]", "rack[1-2]h[1-2],x"])
def test_ranges_are_those_of_slurm(cluster: Cluster, text: str) -> None:
    assert cluster.run("scontrol", "show", "hostnames", text).stdout.split() == expand(text)


def test_job_of_a_user_outside_the_group_is_refused(cluster: Cluster) -> None:
    """A job that waits would have a name and an id, which would stand for a guest."""
    words = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "sbatch", "--job-name=foreign", "--chdir=/")
    refused = cluster.run(*words, input="#!/bin/sh\n", check=False)
    assert (refused.status, "not permitted to use this partition" in refused.stderr) == (1, True)
    assert not cluster.run("squeue", "--noheader", "--states=all", "--name=foreign").stdout


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


def list_log(cluster: Cluster, name: str) -> list[str]:
    return [entry["what"] for entry in json.loads(cluster.nohype("fleet", "logs", name, "--json").stdout)]


def test_wait_for_a_guest_until_it_is_ready_and_until_its_resources_are_released(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(submit, cluster, "waited", "--wait", "--timeout", "120")
        cluster.wait_for(lambda: cluster.guests(), "the guest")
        (host,) = cluster.guests()["waited"]
        world = next(one.served.world for one in cluster.hosts if one.name == host)
        cluster.wait_for(lambda: "started" in list_log(cluster, "waited"), "the report of the host")
        assert not result.done()
        world.hypervisor.write("waited", b"nohype: ready name=waited\n")
        assert "state:     running" in result.result(300).stdout
    cluster.nohype("fleet", "cancel", "waited", "--wait")
    assert not cluster.guests()
    assert set(cluster.node_states().values()) == {"idle"}  # its host has released it
    assert list_log(cluster, "waited") == ["submitted", "allocated", "started", "ready", "ended"]


def test_wait_for_a_guest_that_fails_or_is_not_ready_in_time(cluster: Cluster) -> None:
    failed = submit(cluster, "bad2", "--image", "nothing", "--wait", check=False)
    assert (failed.status, "has ended (failed: no guest image 'nothing'" in failed.stderr) == (1, True)
    assert list_log(cluster, "bad2") == ["submitted", "allocated", "failed", "ended"]
    late = submit(cluster, "late2", "--wait", "--timeout", "1", check=False)
    assert (late.status, "timed out after 1 s waiting for guest late2 to report ready" in late.stderr) == (1, True)
    assert "late2" in cluster.guests()  # it stays
    cluster.nohype("fleet", "cancel", "late2", "--wait")


def test_guests_of_a_group_run_on_different_hosts(cluster: Cluster) -> None:
    """Each host has two nodes and room for more; all four guests are queued at the same time."""
    names = [f"member{number}" for number in range(4)]
    limit = datetime.now(UTC) + timedelta(seconds=80)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: submit(cluster, name, "--anti-affinity", "web"), names))
    cluster.wait_for(lambda: len(cluster.guests()) == 2, "the first guests of the group")
    assert sorted(host for hosts in cluster.guests().values() for host in hosts) == ["host1", "host2"]
    late = submit(cluster, "late", "--anti-affinity", "web", "--deadline", limit.isoformat())
    assert "state:     pending" in late.stdout
    cluster.wait_for(lambda: show(cluster, "late")["state"] == "DEADLINE", "the deadline", timeout=180)
    (gone, hosts), *_ = cluster.guests().items()
    cluster.nohype("fleet", "cancel", gone, "--wait")
    cluster.wait_for(lambda: len(cluster.guests()) == 2, "the next guest of the group")
    assert gone not in cluster.guests()
    assert sorted(host for hosts in cluster.guests().values() for host in hosts) == ["host1", "host2"]
    for name in names:
        cluster.nohype("fleet", "cancel", name)
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the Epilogs")


def test_guest_is_counted_while_it_runs_and_ended_at_its_deadline(cluster: Cluster) -> None:
    limit = datetime.now(UTC) + timedelta(seconds=90)
    submit(cluster, "short", "--cores", "2", "--deadline", limit.isoformat())
    cluster.wait_for(lambda: show(cluster, "short")["state"] == "RUNNING", "the guest")
    node, metrics = show(cluster, "short")["node"], cluster.nohype("fleet", "metrics").stdout
    for kind, count in (("cores", 2), ("memory_bytes", 64 << 20), ("vfs", 1), ("nvme", 0)):
        assert f'nohype_fleet_{kind}{{node="{node}",state="used"}} {count}\n' in metrics
    assert metrics.count(',state="used"} 0\n') == 4 * 4 - 3, "the other nodes, and the NVMe controllers of this one"
    assert "core 0: short" in cluster.nohype("fleet", "map").stdout
    cluster.wait_for(lambda: show(cluster, "short")["state"] == "TIMEOUT", "the deadline", timeout=120)
    assert str(show(cluster, "short")["ended"]) <= f"{limit:%Y-%m-%dT%H:%M:%SZ}"
    cluster.wait_idle()
    assert not cluster.guests()


def test_quota_of_a_tenant_holds_for_guests_that_are_submitted_at_the_same_time(cluster: Cluster) -> None:
    (cluster.folder / "etc/quotas.toml").write_text("[tenants.acme]\ncores = 3\n")
    names = [f"tenant{number}" for number in range(4)]
    words = ("--cores", "1", "--tenant", "acme", "--quotas", "/etc/slurm/quotas.toml")
    with ThreadPoolExecutor(len(names)) as pool:
        results = dict(zip(names, pool.map(lambda name: submit(cluster, name, *words, check=False), names), strict=True))
    (refused,) = (name for name, result in results.items() if result.status)
    assert "quota of tenant acme exceeded\n  - 4 of 3 cores" in results[refused].stderr
    cluster.wait_for(lambda: set(cluster.guests()) == {*names} - {refused}, "the guests within the quota")
    assert show(cluster, next(iter(cluster.guests())))["tenant"] == "acme"
    submit(cluster, "operators")  # guests of no tenant do not count
    late = submit(cluster, "late3", "--id", "late-3", *words, check=False)
    assert (late.status, "4 of 3 cores" in late.stderr) == (1, True)
    cluster.nohype("fleet", "cancel", next(name for name in names if name != refused), "--wait")
    submit(cluster, "late3", "--id", "late-3", *words)  # the refused guest was not submitted, so its id is still free
    cluster.wait_for(lambda: "late3" in cluster.guests(), "the guest")
    for name in cluster.guests():
        cluster.nohype("fleet", "cancel", name)
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the Epilogs")


def test_guest_runs_on_a_host_that_has_its_network(cluster: Cluster) -> None:
    host = cluster.hosts[1]
    host.served.client.create_network({"name": "blue", "vlan": 100})
    file = cluster.folder / "etc/nohype-nodes.conf"
    text = file.read_text()
    file.write_text("".join(
        line.replace(" State=", ",network-blue State=") if host.name in line else line for line in text.splitlines(keepends=True)
    ))  # fmt: skip
    try:
        cluster.run("scontrol", "reconfigure")
        cluster.wait_for(lambda: "network-blue" in find_node(cluster, "host2-n0")["features"], "the new configuration")
        submit(cluster, "joined", "--nic", "network=blue")
        cluster.wait_for(lambda: cluster.guests(), "the guest")
        assert cluster.guests() == {"joined": ["host2"]}
        cluster.nohype("fleet", "cancel", "joined", "--wait")
        host.served.client.delete_network("blue")
        cluster.wait_for(lambda: "does not have this network" in str(find_node(cluster, "host2-n0")["check"]), "the check")
    finally:
        file.write_text(text)
        cluster.run("scontrol", "reconfigure")
    cluster.wait_for(lambda: find_node(cluster, "host2-n0")["check"] is None, "the check")
    refused = submit(cluster, "other", "--nic", "network=blue", check=False)
    assert refused.stderr.count("lacks the feature network-blue") == 4


def test_guest_with_an_emulated_disk_runs_where_the_manager_offers_it(cluster: Cluster) -> None:
    words = ("--disk", "kind=emulated,size=1M")
    submit(cluster, "weaker", *words)
    cluster.wait_for(lambda: show(cluster, "weaker")["state"] == "FAILED", "the refusal", timeout=30)
    assert "an emulated disk is weaker than an NVMe controller" in str(show(cluster, "weaker")["note"])
    submit(cluster, "emulated", *words, "--accept", "emulated-disk")
    cluster.wait_for(lambda: cluster.guests(), "the guest")
    ((name,),) = cluster.guests().values()
    host = next(host for host in cluster.hosts if host.name == name)
    assert [disk["file"] for disk in host.served.client.guest("emulated")["disks"]]
    cluster.nohype("fleet", "cancel", "emulated", "--wait")
    cluster.wait_idle()


def test_second_guest_for_a_controller_waits_for_its_place_and_then_for_the_wipe(cluster: Cluster) -> None:
    refused = submit(cluster, "two", "--disk", "", "--disk", "", check=False)
    assert refused.stderr.count("1 NVMe controllers, 2 requested") == 4
    host, node, others = cluster.hosts[0], cluster.hosts[0].nodes[0], cluster.node_names()[1:]
    cluster.run("scontrol", "update", f"NodeName={','.join(others)}", "State=DRAIN", "Reason=test")
    submit(cluster, "first", "--disk", "")
    cluster.wait_for(lambda: "first" in cluster.guests(), "the first guest")
    (disk,) = host.served.client.guest("first")["disks"]
    assert disk["address"] == str(node.disks[0])
    assert "state:     pending" in submit(cluster, "second", "--disk", "").stdout
    assert find_node(cluster, node.name)["used"]["disks"] == 1
    with host.served.holding_wipes():
        cluster.nohype("fleet", "cancel", "first", "--wait")  # its place is released, except the disk
        cluster.wait_for(lambda: "waiting" in list_log(cluster, "second"), "the start of the second guest")
        submit(cluster, "third")  # the node starts other guests meanwhile
        cluster.wait_for(lambda: set(cluster.guests()) == {"third"}, "the third guest")
        cluster.wait_for(lambda: find_node(cluster, node.name)["check"] is None, "the check")
        assert cluster.node_states()[node.name] == "mixed"
    cluster.wait_for(lambda: "second" in cluster.guests(), "the second guest")
    assert host.served.client.guest("second")["disks"] == [disk]
    assert not cluster.find_violations()
    for name in ("second", "third"):
        cluster.nohype("fleet", "cancel", name, "--wait")
    cluster.resume()
    cluster.wait_idle()


def find_node(cluster: Cluster, name: str) -> dict[str, Any]:
    nodes = json.loads(cluster.nohype("fleet", "hosts", "--json").stdout)
    return next(node for node in nodes if node["name"] == name)


def test_host_is_drained_and_resumed_by_its_name(cluster: Cluster) -> None:
    refused = cluster.nohype("fleet", "drain", "host1", "--reason", "disk", check=False)  # not root
    assert (refused.status, "Invalid user id" in refused.stderr) == (1, True)
    cluster.manage("fleet", "drain", "host1", "--reason", "new disk | at noon")
    node = find_node(cluster, "host1-n1")
    assert (node["state"], node["reason"], node["by"]) == ("DRAINED", "new disk | at noon", "root")
    assert node["since"].endswith("Z")
    submit(cluster, "web")
    cluster.wait_for(lambda: cluster.guests(), "the guest")
    assert cluster.guests() == {"web": ["host2"]}
    cluster.nohype("fleet", "cancel", "web", "--wait")
    cluster.manage("fleet", "resume", "host1")
    assert find_node(cluster, "host1-n1")["reason"] == "", "24.11 keeps it"
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the nodes")


def test_guest_created_at_a_host_is_reported_and_ended_by_the_operator_only(cluster: Cluster) -> None:
    host, node = cluster.hosts[0].name, cluster.hosts[0].nodes[0].name
    cluster.hosts[0].served.client.create({"name": "local", "id": "order-9", "memory": "64M", "image": "minimal"})
    cluster.wait_for(lambda: "guest local (running) has no job" in str(find_node(cluster, node)["check"]), "the check")
    cluster.manage("fleet", "drain", node, "--reason", "test")
    refused = cluster.manage("fleet", "resume", node, check=False)
    assert (refused.status, f"the last health check of {node} failed: guest local" in refused.stderr) == (1, True)
    (orphan,) = json.loads(cluster.manage("fleet", "orphans", "--json", host=host).stdout)
    assert (orphan["name"], orphan["guest_id"], orphan["job"]) == ("local", "order-9", None)
    assert cluster.guests() == {"local": [host]}
    cluster.manage("fleet", "orphans", "--end", "local", host=host)
    assert not cluster.guests()
    cluster.wait_for(lambda: find_node(cluster, node)["check"] is None, "the check")
    cluster.manage("fleet", "resume", node)
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the nodes")


def lose_host(cluster: Cluster, host: FleetHost) -> None:
    """As by a loss of power: slurmd, job scripts and guests of the host are gone. The records stay."""
    cluster.kill_host(host)
    for guest in host.served.client.guests():
        host.served.client.delete(guest["name"])


def test_guests_of_a_lost_host_are_requeued_if_the_host_is_off_and_they_allow_it(cluster: Cluster) -> None:
    first, second = cluster.hosts
    nodes = ",".join(node.name for node in first.nodes)
    cluster.run("scontrol", "update", f"NodeName={nodes}", "State=DRAIN", "Reason=test")
    submit(cluster, "allowed", "--requeue", "--id", "order-5")
    submit(cluster, "forbidden")
    cluster.run("scontrol", "update", f"NodeName={nodes}", "State=RESUME")
    cluster.wait_for(lambda: cluster.guests() == {"allowed": ["host2"], "forbidden": ["host2"]}, "the guests")
    refused = cluster.nohype("fleet", "requeue", "host2", "--host-is-off", check=False)
    assert "host host2 is not off: slurmd responds to the controller on host2-n0, host2-n1" in refused.stderr
    assert cluster.nohype("fleet", "requeue", "host2", check=False).status == 2, "the operator must state it"
    lose_host(cluster, second)
    cluster.wait_for(lambda: show(cluster, "allowed")["state"] == "NODE_FAIL", "the loss of the host", timeout=180)
    assert not cluster.guests(), "Slurm itself starts none again"
    for expected in ("requeued as job", "already requeued as job"):
        found = json.loads(cluster.nohype("fleet", "requeue", "host2", "--host-is-off", "--json").stdout)
        outcomes = {guest["name"]: guest["outcome"] for guest in found}
        assert outcomes["allowed"].startswith(expected)
        assert outcomes["forbidden"] == "not requeued: submitted without --requeue"
    cluster.wait_for(lambda: cluster.guests() == {"allowed": ["host1"]}, "the guest on the other host")
    assert not cluster.find_violations()
    for node in second.nodes:
        cluster.start_slurmd(node.name)
    cluster.nohype("fleet", "cancel", "allowed")
    cluster.wait_for(lambda: not cluster.guests(), "the end of the guest")
    cluster.wait_for(lambda: not cluster.find_records(), "the check of the host that has returned")
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, "the nodes")


@pytest.mark.timeout(600 + 30 * KILLS)
def test_programs_killed_at_random_lose_and_double_no_guest(cluster: Cluster) -> None:
    outcome = run_kills(cluster, KILLS, SEED, lambda _line: None)
    print(f"seed {SEED}: {outcome}")
    assert not outcome.faults, (SEED, outcome)
    assert outcome.started
