"""The texts of the versions of Slurm that the fleet was tested with mean the same.

tests/data/slurm has what the commands of `fleet.slurm` printed in a cluster of tests/harness/slurm.py. Guests web (of a tenant)
and web2 run, web3 waits for a place, and the Epilog of guest bad runs on a node that is being drained. Later, web was cancelled,
web3 has its place, and a slurmd was killed. Ids of guests, a path, and spaces that fill lines of fixed width are replaced.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import CommandError, NotFound
from orchestrator.fleet import apart, slurm, use
from orchestrator.fleet.journal import What
from orchestrator.host.run import Completed
from orchestrator.values import CpuSet

DATA = Path(__file__).parents[1] / "data/slurm"
VERSIONS = ("22.05", "24.11")
RELEASE_ERROR = "Unexpected message received for job 1\nslurm_suspend error: Unexpected message received\n"
SCRIPT_ERROR = "job script retrieval failed: "


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def read(version: str, name: str) -> str:
    return (DATA / version / f"{name}.txt").read_text()


def test_jobs_are_read(version: str) -> None:
    jobs = {job.name: job for job in slurm.parse_jobs(read(version, "squeue"))}
    assert {name: (job.state, job.node, job.guest_id) for name, job in jobs.items()} == {
        "web": ("RUNNING", "host1-n0", "order-1"),
        "web2": ("RUNNING", "host2-n0", "order-2"),
        "web3": ("PENDING", "", "order-3"),
        "bad": ("COMPLETING", "host2-n1", "order-4"),
    }
    assert (jobs["web"].tenant, jobs["web2"].tenant) == ("acme", "")
    assert not any(job.is_held or job.ended for job in jobs.values())
    assert (jobs["web3"].started, jobs["web3"].explanation) == ("", "Resources")
    assert [entry.what for entry in jobs["web"].entries] == [What.STARTED]
    assert jobs["bad"].note.startswith("no guest image 'nothing' in /var/lib/nohype/images; available:")
    assert jobs["bad"].is_ending
    later = {job.name: job for job in slurm.parse_jobs(read(version, "squeue-later"))}
    assert {name: job.state for name, job in later.items()} == {
        "web": "CANCELLED", "web2": "RUNNING", "web3": "RUNNING", "bad": "FAILED",
    }  # fmt: skip
    assert later["web"].ended
    assert not later["web2"].ended, "the time is that of its limit"


def test_uses_are_read(version: str) -> None:
    found = {use.number: (use.cores, use.memory, use.vfs) for use in slurm.parse_uses(read(version, "uses"))}
    assert found == {1: (2, 64, 1), 2: (1, 64, 2), 3: (1, 64, 1), 4: (1, 64, 1)}


def test_nodes_are_read(version: str) -> None:
    nodes = {node.name: node for node in slurm.parse_nodes(read(version, "sinfo"))}
    assert {name: node.state for name, node in nodes.items()} == {
        "host1-n0": "MIXED", "host1-n1": "IDLE", "host2-n0": "MIXED", "host2-n1": "DRAINING",
    }  # fmt: skip
    assert {(node.cores, node.threads, node.memory, node.vfs) for node in nodes.values()} == {(3, 2, 1024, 4), (4, 2, 1024, 4)}
    assert nodes["host1-n0"].slots == apart.share_slots(0, 2)
    assert nodes["host2-n1"].is_drained
    assert (nodes["host2-n1"].reason, nodes["host2-n1"].by) == ("new disk | at noon", "root")
    assert {(node.reason, node.by, node.since) for name, node in nodes.items() if name != "host2-n1"} == {("", "", "")}
    lost = {node.name: node for node in slurm.parse_nodes(read(version, "sinfo-later"))}["host1-n1"]
    assert (lost.state, lost.reason, lost.by, lost.responds) == ("DOWN*", "Not responding", "slurm", False)


def test_comments_of_nodes_are_read(version: str) -> None:
    names = [f"host{host}-n{node}" for host in (1, 2) for node in (0, 1)]
    assert slurm.parse_comments(read(version, "comments")) == dict.fromkeys(names, slurm.CHECK_PASSED)


def test_places_are_read(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "run", lambda *_, **__: Completed(0, read(version, "jobs"), ""))
    texts = slurm.read_all_jobs()
    assert [slurm.parse_allocation(number, texts[number - 1]).guest_id for number in (1, 2, 4)] == [
        "order-1",
        "order-2",
        "order-4",
    ]
    with pytest.raises(NotFound, match="does not have a place"):
        slurm.parse_allocation(3, texts[2])
    places = {
        place.guest: (node, place.cores, place.vfs) for node, place in use.parse_places(texts, {"host1-n0": 2, "host2-n0": 2})
    }
    assert places == {
        "web": ("host1-n0", CpuSet.parse("0-1"), CpuSet.parse("0")),
        "web2": ("host2-n0", CpuSet.parse("0"), CpuSet.parse("0-1")),
    }


@pytest.mark.parametrize(
    ("call", "status", "text", "kind"),
    [
        ("read_script", 0, f"{SCRIPT_ERROR}Invalid job id specified\n", NotFound),
        ("read_script", 0, f"{SCRIPT_ERROR}Unable to contact slurm controller (connect failure)\n", slurm.Unreachable),
        ("release_jobs", 1, RELEASE_ERROR, slurm.Unreachable),
        ("read_allocation", 1, "slurm_load_jobs error: Invalid job id specified\n", NotFound),
        ("cancel_jobs", 8, "scancel: error: Kill job error on job id 1: Unable to contact slurm controller (connect failure)\n",
         slurm.Unreachable),
    ],
)  # fmt: skip
def test_errors_are_recognized(
    call: str, status: int, text: str, kind: type[CommandError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are the same in both versions; `scontrol write batch_script` has the status 0 whatever happens."""
    monkeypatch.setattr(slurm, "run", lambda *_, **__: Completed(status, "", text))
    with pytest.raises(kind):
        getattr(slurm, call)([1] if call.endswith("_jobs") else 1)
