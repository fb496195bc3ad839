"""What guests have of the fleet's nodes, as metrics and as a picture; the texts of Slurm are recorded."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.cli.fleet import fleet
from orchestrator.cli.fleet_svg import draw_fleet
from orchestrator.fleet import metrics, slurm, use
from orchestrator.host.run import Completed
from orchestrator.values import CpuSet

# Recorded with Slurm 22.05.8; shortened.
JOBS = """\
JobId=1 JobName=web
   JobState=RUNNING Reason=None Dependency=(null)
   JOB_GRES=vf:1
     Nodes=host1-n0 CPU_IDs=0-3 Mem=64 GRES=vf:1(IDX:0)
   Comment=order-1

JobId=2 JobName=db
   JobState=COMPLETING Reason=None Dependency=(null)
   JOB_GRES=vf:2
     Nodes=host1-n0 CPU_IDs=4-5 Mem=128 GRES=vf:2(IDX:1,3),nvme(CNT:1)
   Comment=order-2

JobId=3 JobName=old
   JobState=CANCELLED Reason=None Dependency=(null)
     Nodes=host1-n0 CPU_IDs=0-1 Mem=64 GRES=
   Comment=order-3

JobId=4 JobName=late
   JobState=PENDING Reason=Resources Dependency=(null)
   Comment=order-4

"""
QUEUE = """\
1|RUNNING|host1-n0|web|(null)|4294901757|2026-11-27T09:40:00|2026-11-27T09:40:01|N/A|None|order-1
2|COMPLETING|host1-n0|db|(null)|4294901756|2026-11-27T09:40:00|2026-11-27T09:40:01|2026-11-27T09:41:00|None|order-2
3|CANCELLED|host1-n0|old|(null)|4294901755|2026-11-27T09:40:00|2026-11-27T09:40:01|2026-11-27T09:41:00|None|order-3
4|PENDING||late|(null)|4294901754|2026-11-27T09:40:00|N/A|N/A|Resources|order-4
"""
NODES = """\
host1-n0|mixed|1:4:2|1024|vf:4,nvme:2|sriov,pages-2M|Unknown|Unknown|none
host2|down*|1:2:1|512|(null)|edge,pages-2M|slurm|2026-11-27T09:31:16|Not "responding"
"""


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Slurm's commands print; a command that is removed fails."""
    texts = {"sinfo": NODES, "squeue": QUEUE, "scontrol": JOBS}

    def run(words: list[str], **_: object) -> Completed:
        if words[0] not in texts:
            return Completed(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
        return Completed(0, texts[words[0]], "")

    monkeypatch.setattr(slurm, "run", run)
    return texts


def test_use_of_nodes(controller: dict[str, str]) -> None:
    first, second = use.read_uses()
    web, db = first.places
    assert web == use.Place("web", CpuSet.parse("0-1"), CpuSet.parse("0"), 64)
    assert db == use.Place("db", CpuSet.parse("2"), CpuSet.parse("1,3"), 128, 1)
    assert (first.cores, first.memory, first.vfs, first.disks) == (3, 192, 3, 1)
    assert (second.cores, second.memory, second.vfs, second.places) == (0, 0, 0, ())


def test_metrics_can_be_read_by_prometheus(controller: dict[str, str]) -> None:
    text = metrics.write_metrics(use.read_uses(), slurm.read_jobs())
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {metric.name for metric in metrics.METRICS}
    found = {(sample.name, *sample.labels.values()): sample.value for family in families.values() for sample in family.samples}
    assert found["nohype_fleet_up",] == 1
    assert found["nohype_fleet_cores", "host1-n0", "used"] == 3
    assert found["nohype_fleet_cores", "host1-n0", "free"] == 1
    assert found["nohype_fleet_memory_bytes", "host1-n0", "free"] == (1024 - 192) << 20
    assert found["nohype_fleet_vfs", "host2", "free"] == 0
    assert (found["nohype_fleet_nvme", "host1-n0", "free"], found["nohype_fleet_nvme", "host2", "free"]) == (1, 0)
    assert found["nohype_fleet_node_responds", "host2"] == 0
    assert found["nohype_fleet_nodes", "down"] == 1
    assert found["nohype_fleet_guests", "pending"] == 1
    assert found["nohype_fleet_node_guests", "host1-n0"] == 2


def test_metrics_are_written_to_a_file_also_without_a_controller(controller: dict[str, str], tmp_path: Path) -> None:
    runner, file = CliRunner(), tmp_path / "fleet.prom"
    assert "nohype_fleet_up 1\n" in runner.invoke(fleet, ["metrics"], catch_exceptions=False).output
    runner.invoke(fleet, ["metrics", "--file", str(file)], catch_exceptions=False)
    assert "nohype_fleet_up 1\n" in file.read_text()
    controller.clear()
    assert isinstance(runner.invoke(fleet, ["metrics", "--file", str(file)]).exception, slurm.Unreachable)
    assert file.read_text().splitlines()[-1] == "nohype_fleet_up 0"
    assert list(tmp_path.iterdir()) == [file]
    missing = runner.invoke(fleet, ["metrics", "--file", str(tmp_path / "none/fleet.prom")])
    assert "fleet.prom" in str(missing.exception)


def test_hosts_are_listed_with_what_is_used(controller: dict[str, str]) -> None:
    lines = CliRunner().invoke(fleet, ["hosts"], catch_exceptions=False).output.splitlines()
    assert lines[1].split() == ["host1-n0", "mixed", "2", "3/4", "192/1024M", "3/4", "1/2", "sriov,pages-2M", "-", "-", "-"]
    assert "down*" in lines[2]
    assert '2026-11-27T09:31:16Z  slurm  Not "responding"' in lines[2]


def test_picture_shows_each_core_and_vf(controller: dict[str, str]) -> None:
    root = ElementTree.fromstring("".join(draw_fleet(use.read_uses(), 1)))  # noqa: S314 - our own text
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert {"core 0: web", "core 1: web", "core 2: db", "core 3: free", "VF 0: web", "VF 1: db", "VF 2: free"} <= set(titles)
    text = "".join(root.itertext())
    assert "Fleet of 2 nodes: 2 guests run, 1 wait, 3 of 6 cores free" in text
    assert 'Not "responding"' in text
    assert text.count("NVMe") == text.count("NVMe 1 of 2") == 1


def test_job_that_the_controller_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = Completed(1, "", "slurm_load_jobs error: Invalid job id specified")
    monkeypatch.setattr(slurm, "run", lambda _words, **_: unknown)
    assert slurm.read_job(9) is None
    monkeypatch.setattr(slurm, "run", lambda _words, **_: Completed(0, QUEUE.splitlines()[0], ""))
    job = slurm.read_job(1)
    assert job
    assert job.guest_id == "order-1"


def test_picture_without_hosts(controller: dict[str, str]) -> None:
    controller.update({"sinfo": "", "squeue": "", "scontrol": "No jobs in the system\n"})
    assert "Fleet of 0 nodes" in CliRunner().invoke(fleet, ["map"], catch_exceptions=False).output
