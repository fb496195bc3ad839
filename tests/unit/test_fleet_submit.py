"""What a guest asks of Slurm, how Slurm's answers are read, and that a guest is submitted once or never."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CommandError, Conflict, NoRoom, NotFound, OrchestratorError, RequestError
from orchestrator.fleet import apart, journal, slurm, submit
from orchestrator.fleet import wish as wishes
from orchestrator.fleet.job import Job
from orchestrator.fleet.journal import What
from orchestrator.host.run import Completed
from orchestrator.values import CpuSet

FIELDS: dict[str, Any] = {"name": "web", "memory": "256M", "image": "minimal", "id": "order-1"}
# Recorded with Slurm 22.05.8; shortened.
SHOWN = """\
JobId=1 JobName=web
   UserId=nohype-fleet(999) GroupId=nohype-fleet(995) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   NumNodes=1 NumCPUs=4 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   JOB_GRES=vf:1
     Nodes=host1-n0 CPU_IDs=0-3 Mem=64 GRES=vf:1(IDX:0)
   Features=sriov DelayBoot=00:00:00
   Command=(null)
   Comment=order-1
"""
NODES = """\
host1-n0|idle|1:3:2|1024|vf:4|sriov,pages-2M|Unknown|Unknown|none
host1-n1|drained|1:4:2|2048|(null)|edge,pages-1G|root|2026-11-27T09:31:16|Prolog error
host2|down*|1:2:1|512|vf:1|sriov,pages-2M|slurm|2026-11-27T09:40:00|Not responding | since
"""


def test_allocation_is_read() -> None:
    allocation = slurm.parse_allocation(1, SHOWN)
    assert allocation == slurm.Allocation("host1-n0", CpuSet.parse("0-3"), CpuSet.parse("0"), 64, "web", "order-1")


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("", ""),
        ("vf:1(IDX:3)", "3"),
        ("vf:3(IDX:0-1,5)", "0-1,5"),
        ("gpu:1(IDX:0),vf:1(IDX:2)", "2"),
        ("vf:nic0:1(IDX:4)", "4"),
        ("vf:1(IDX:2),apart7:1", "2"),
    ],
)
def test_indexes_of_vfs_are_read(gres: str, expected: str) -> None:
    found = slurm.parse_allocation(1, SHOWN.replace("GRES=vf:1(IDX:0)", f"GRES={gres}"))
    assert found.vfs == CpuSet.parse(expected)


@pytest.mark.parametrize("text", [SHOWN.replace("Comment=", "Comment2="), SHOWN.replace("JobName=web", "JobName=Web X")])
def test_job_that_is_not_a_guest_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="job 1 is not a guest of the fleet"):
        slurm.parse_allocation(1, text)


@pytest.mark.parametrize("text", [SHOWN.replace("CPU_IDs", "CPUs"), ""])
def test_job_without_a_place_is_not_found(text: str) -> None:
    with pytest.raises(NotFound, match="job 1 does not have a place"):
        slurm.parse_allocation(1, text)


def test_nodes_are_read() -> None:
    first, second, third = slurm.parse_nodes(NODES)
    assert (first.cores, first.threads, first.memory, first.vfs, first.features) == (3, 2, 1024, 4, ("sriov", "pages-2M"))
    assert (first.responds, second.responds, third.responds) == (True, True, False)
    assert (second.vfs, second.reason, second.by, second.since) == (0, "Prolog error", "root", "2026-11-27T09:31:16Z")
    assert (first.reason, first.by, first.since) == ("", "", "")
    assert third.reason == "Not responding | since"
    assert [node.is_drained for node in (first, second, third)] == [False, True, False]


@pytest.mark.parametrize(
    ("state", "node", "what", "is_explained"),
    [
        ("CANCELLED", "a", None, True),
        ("CANCELLED", "a", What.WAITING, True),
        ("CANCELLED", "a", What.STARTED, False),
        ("CANCELLED", "a", What.READY, False),  # the oldest entries can have been dropped
        ("CANCELLED", "", None, False),
        ("RUNNING", "a", None, False),
    ],
)
def test_guest_that_slurm_ended_before_its_start_is_explained(
    state: str, node: str, what: What | None, *, is_explained: bool
) -> None:
    """slurmd cancels a job if it has lost the controller just then; no program of ours runs that could report it."""
    comment = journal.build_comment("order-1", [journal.make_entry(what, "text")] if what else [])
    (job,) = slurm.parse_jobs(f"7|{state}|{node}|web|(null)|10|N/A|N/A|N/A|Prolog|{comment}\n")
    assert ("has not reported a start" in job.note, "has not reported a start" in job.explanation) == (is_explained,) * 2


def test_jobs_are_read_with_their_notes() -> None:
    comment = journal.build_comment("order-1", [journal.make_entry(What.FAILED, "no image | with\na bar")])
    time = "2026-11-27T09:40:0{}".format
    text = (
        f"7|FAILED|host1-n0|web|acme|10|{time(0)}|{time(1)}|{time(2)}|NonZeroExitCode|{comment}\n"
        f"8|PENDING||db|(null)|0|{time(0)}|{time(5)}|N/A|Resources|order-2\n9|TIMEOUT|b|c|(null)|10|{time(0)}|{time(1)}|{time(2)}|TimeLimit|order-3\n"
    )
    failed, waiting, timed_out = slurm.parse_jobs(text)
    assert (failed.guest_id, failed.note, failed.has_ended) == ("order-1", "no image | with a bar", True)
    assert (failed.submitted, failed.started, failed.ended) == tuple(f"{time(second)}Z" for second in (0, 1, 2))
    assert (waiting.node, waiting.reason, waiting.note, waiting.has_ended) == ("", "Resources", "", False)
    assert (waiting.started, waiting.ended) == ("", "")  # Slurm estimates the start
    assert [job.explanation for job in (failed, waiting)] == ["no image | with a bar", "Resources"]
    assert "--minutes" in timed_out.explanation
    assert [(job.tenant, job.is_held) for job in (failed, waiting)] == [("acme", False), ("", True)]


def test_options_ask_for_whole_cores_vfs_and_features() -> None:
    fields = {**FIELDS, "cores": 2, "nics": [{}, {}, {"network": "blue"}], "page_size": "2M"}
    wish = wishes.read_wish(fields, ["rack-1"], 90)
    options = wishes.build_options(wish)
    for option in (
        "--ntasks=2", "--ntasks-per-core=1", "--gres=vf:3", "--mem=256M", "--constraint=sriov&pages-2M&network-blue&rack-1",
        "--time=90", "--no-requeue", "--dependency=singleton", "--comment=order-1",
    ):  # fmt: skip
        assert option in options


def test_guest_with_a_software_edge_takes_no_vf_and_goes_to_a_node_without_vfs() -> None:
    options = wishes.build_options(wishes.read_wish({**FIELDS, "accept": ["software-edge"]}))
    assert not [option for option in options if option.startswith("--gres")]
    assert "--constraint=edge" in options


def test_guests_of_a_group_request_the_same_slot() -> None:
    found = [
        next(option for option in wishes.build_options(wishes.read_wish(FIELDS, group=group)) if "gres" in option)
        for group in ("web", "web", "db")
    ]
    assert found[0] == found[1] != found[2]
    assert found[0] == f"--gres=vf:1,apart{apart.find_slot('web')}:1"
    assert {apart.find_slot(f"group{number}") for number in range(1000)} == set(range(apart.SLOTS))


@pytest.mark.parametrize("group", ["", "A", "a,b", "-a", "a" * 41])
def test_invalid_name_of_a_group_is_refused(group: str) -> None:
    with pytest.raises(RequestError, match="not the name of a group"):
        wishes.read_wish(FIELDS, group=group)


def test_deadline_is_given_in_utc_and_without_a_time_of_its_own() -> None:
    """An unlimited time would make Slurm ignore the deadline."""
    limit = "2030-01-31T18:00+02:00"
    options = wishes.build_options(wishes.read_wish(FIELDS, deadline=limit))
    assert "--deadline=2030-01-31T16:00:00" in options
    assert not [option for option in options if option.startswith("--time")]
    both = wishes.build_options(wishes.read_wish(FIELDS, minutes=5, deadline=limit))
    assert {"--deadline=2030-01-31T16:00:00", "--time=5"} <= set(both)
    assert wishes.parse_deadline("2030-01-31T18:00Z") == "2030-01-31T18:00:00Z"
    local = datetime(2030, 1, 31, 18).astimezone()
    assert datetime.fromisoformat(wishes.parse_deadline("2030-01-31T18:00")) == local
    for text in ("tomorrow", "", "0001-01-01T00:00+23:59"):
        with pytest.raises(RequestError, match="is not a time"):
            wishes.parse_deadline(text)


def test_deadline_that_cannot_be_kept_is_refused_but_a_guest_is_found_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch)
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    with pytest.raises(RequestError, match="guest web cannot end by"):
        submit.submit(wishes.read_wish(FIELDS, minutes=10, deadline=soon))
    assert not controller.submitted
    controller.add(5, state="DEADLINE")
    assert submit.submit(wishes.read_wish(FIELDS, minutes=10, deadline=soon)).number == 5


@pytest.mark.parametrize("cmdline", ["a=REQUEST", "x='y' `reboot` $HOME \\", 'quote"'])
def test_script_contains_the_request_on_one_line(cmdline: str) -> None:
    script = wishes.build_script(wishes.read_wish({**FIELDS, "cmdline": cmdline}))
    lines = script.splitlines()
    assert [lines[0], lines[2], lines[4]] == ["#!/bin/sh", "exec /etc/slurm/nohype-job <<'REQUEST'", "REQUEST"]
    assert json.loads(lines[3])["cmdline"] == cmdline


@pytest.mark.parametrize(
    "field",
    [
        {"placement": {"cpus": "2-3"}}, {"disks": [{"serial": "S5GX"}]}, {"cache_ways": 2}, {"bandwidth": "40%"},
        {"user_data": "#cloud-config\n"}, {"network_config": "version: 2\n"}, {"restart": "on-failure"},
        {"nics": [{"uplink": "nic0"}]},
    ],
)  # fmt: skip
def test_what_slurm_cannot_allocate_or_must_not_store_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="cannot be"):
        wishes.read_wish({**FIELDS, **field})


@pytest.mark.parametrize("feature", ["a&b", "a|b", "[x]", "", "a b"])
def test_feature_with_an_operator_is_refused(feature: str) -> None:
    with pytest.raises(RequestError, match="not a feature"):
        wishes.read_wish(FIELDS, [feature])


def test_reasons_are_given_only_if_no_node_can_have_the_guest() -> None:
    nodes = tuple(slurm.parse_nodes(NODES))
    assert not wishes.find_reasons(wishes.read_wish({**FIELDS, "cores": 3}), nodes)
    assert wishes.find_reasons(wishes.read_wish({**FIELDS, "cores": 4, "memory": "2G"}), nodes) == (
        "host1-n0: 3 cores, 4 requested, 1024 MiB of huge pages, 2048 requested",
        "host1-n1: 0 VFs, 1 requested, lacks the feature sriov",
        "host2: 2 cores, 4 requested, 512 MiB of huge pages, 2048 requested",
    )
    slot = apart.find_slot("web")
    assert wishes.find_reasons(wishes.read_wish(FIELDS, group="web"), nodes) == (
        f"host1-n0: does not have slot {slot} of group web",
        f"host1-n1: 0 VFs, 1 requested, lacks the feature sriov, does not have slot {slot} of group web",
        f"host2: does not have slot {slot} of group web",
    )
    gres = ",".join(apart.build_gres([slot]))
    assert not wishes.find_reasons(
        wishes.read_wish(FIELDS, group="web"), tuple(slurm.parse_nodes(NODES.replace("vf:1", f"vf:1,{gres}")))
    )


class FakeController:
    """A controller that forgets the first ``forgets`` acknowledged jobs, as one that is killed within its save interval does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, forgets: int = 0, nodes: str = NODES) -> None:
        self.jobs: list[Job] = []
        self.submitted: list[list[str]] = []
        self.cancelled: list[int] = []
        self.slept = 0.0
        self._forgets, self._numbers = forgets, itertools.count(1)
        monkeypatch.setattr(slurm, "check_version", lambda: None)
        monkeypatch.setattr(slurm, "read_jobs", lambda name="": tuple(job for job in self.jobs if name in ("", job.name)))
        monkeypatch.setattr(slurm, "read_nodes", lambda: tuple(slurm.parse_nodes(nodes)))
        monkeypatch.setattr(slurm, "submit_job", self.accept)
        monkeypatch.setattr(slurm, "cancel_jobs", self.cancelled.extend)
        monkeypatch.setattr(submit.time, "sleep", self.sleep)
        monkeypatch.setattr(submit.time, "monotonic", lambda: self.slept)

    def accept(self, options: list[str], _script: str) -> int:
        self.submitted.append(options)
        number = next(self._numbers)
        if len(self.submitted) > self._forgets:
            self.add(number)
        return number

    def add(self, number: int, guest_id: str = "order-1", state: str = "PENDING") -> None:
        self.jobs.append(Job(number, state, "", "web", "", guest_id))
        self.jobs.sort(key=lambda job: job.number)

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


UP = NODES.splitlines()[0] + "\n"


def test_guest_is_submitted_once_and_confirmed_after_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch)
    wish = wishes.read_wish(FIELDS)
    assert submit.submit(wish).number == 1
    assert controller.slept >= slurm.SAVE_SECONDS
    assert submit.submit(wish).number == 1  # the same id
    assert len(controller.submitted) == 1


@pytest.mark.parametrize(("age", "slept"), [(0, 6.0), (-30, 6.0), (3600, 0.0)])  # the clock of the controller can be ahead
def test_repeated_command_returns_when_the_guest_is_saved(monkeypatch: pytest.MonkeyPatch, age: float, slept: float) -> None:
    controller = FakeController(monkeypatch)
    submitted = f"{datetime.now(UTC) - timedelta(seconds=age):%Y-%m-%dT%H:%M:%SZ}"
    controller.jobs.append(Job(1, "PENDING", "", "web", "", "order-1", submitted=submitted))
    assert submit.submit(wishes.read_wish(FIELDS)).number == 1
    assert (controller.slept, controller.submitted) == (slept, [])


def test_guest_that_was_acknowledged_and_forgotten_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch, forgets=1, nodes=UP)
    assert submit.submit(wishes.read_wish(FIELDS)).number == 2
    assert controller.slept >= submit.ORPHAN_SECONDS  # the forgotten guest has been ended by then


def test_forgotten_guest_is_not_submitted_again_while_a_node_does_not_respond(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch, forgets=1)
    with pytest.raises(OrchestratorError, match="forgot guest web, which may run on host2"):
        submit.submit(wishes.read_wish(FIELDS))
    assert len(controller.submitted) == 1


def test_ended_guest_is_not_started_again_under_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch)
    controller.add(5, state="FAILED")
    assert submit.submit(wishes.read_wish(FIELDS)).state == "FAILED"
    assert not controller.submitted


def test_name_of_another_guest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch)
    controller.add(5, "order-0", "RUNNING")
    with pytest.raises(Conflict, match="another guest web, job 5"):
        submit.submit(wishes.read_wish(FIELDS))
    controller.jobs.clear()
    controller.add(6, "order-0", "COMPLETED")  # it has ended
    assert submit.submit(wishes.read_wish(FIELDS)).number == 1


def test_id_of_another_guest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that has ended: the controller would refuse it when it starts."""
    controller = FakeController(monkeypatch)
    controller.add(5, state="COMPLETED")
    with pytest.raises(Conflict, match="id order-1 of guest db is that of guest web"):
        submit.submit(wishes.read_wish({**FIELDS, "name": "db"}))
    assert not controller.submitted


def test_of_two_guests_that_come_at_the_same_time_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch)
    controller.sleep = lambda seconds: controller.add(0, "order-0")  # type: ignore[method-assign]
    monkeypatch.setattr(submit.time, "sleep", controller.sleep)
    with pytest.raises(Conflict, match="job 0"):
        submit.submit(wishes.read_wish(FIELDS))
    assert controller.cancelled == [1]


@pytest.mark.parametrize("forgets", [0, 1, 2])
def test_cancel_is_repeated_until_the_controller_has_saved_it(monkeypatch: pytest.MonkeyPatch, forgets: int) -> None:
    controller = FakeController(monkeypatch)
    controller.add(3, state="FAILED")  # an earlier guest of this name
    controller.add(5, state="RUNNING")

    def cancel(numbers: list[int]) -> None:
        (number,) = numbers
        controller.cancelled.append(number)
        if len(controller.cancelled) > forgets:
            controller.jobs.pop()
            controller.add(number, state="COMPLETING")

    monkeypatch.setattr(slurm, "cancel_jobs", cancel)
    assert [job.number for job in submit.cancel("web")] == [5]
    assert controller.cancelled == [5] * (forgets + 1)
    assert controller.slept >= slurm.SAVE_SECONDS


def test_cancel_that_is_always_forgotten_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = FakeController(monkeypatch)
    with pytest.raises(NotFound, match="does not have guest web"):
        submit.cancel("web")
    controller.add(5, state="RUNNING")
    with pytest.raises(OrchestratorError, match="forgot 3 times"):
        submit.cancel("web")


@pytest.mark.parametrize("accepted", [False, True])
def test_caller_learns_that_the_outcome_is_unknown(monkeypatch: pytest.MonkeyPatch, accepted: bool) -> None:
    controller = FakeController(monkeypatch)

    def lose(*_: object) -> int:
        def fail(_name: str = "") -> tuple[Job, ...]:
            controller.sleep(30)
            raise slurm.Unreachable("no connection")

        monkeypatch.setattr(slurm, "read_jobs", fail)
        if accepted:
            return 1
        raise slurm.Unreachable("no connection")

    monkeypatch.setattr(slurm, "submit_job", lose)
    with pytest.raises(CommandError, match="not known whether guest web was submitted") as caught:
        submit.submit(wishes.read_wish(FIELDS))
    assert "--id order-1" in caught.value.hint


def test_fleet_without_hosts_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeController(monkeypatch, nodes="")
    with pytest.raises(NoRoom, match="has no nodes"):
        submit.submit(wishes.read_wish(FIELDS))


def answer(monkeypatch: pytest.MonkeyPatch, reply: Callable[[], Completed]) -> None:
    monkeypatch.setattr(slurm, "run", lambda *_words, **_options: reply())


def test_missing_slurm_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CommandError, match="Slurm's command sinfo is not installed"):
        slurm.check_version()
    monkeypatch.setattr(slurm, "JOB_PATH", "/nonexistent")
    with pytest.raises(CommandError, match="Slurm's command sbatch is not installed"):
        slurm.submit_job([], "")


def test_sbatch_gets_none_of_the_variables_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as SBATCH_EXCLUSIVE, which is an option, and secrets, which the job would have."""
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/variables\necho 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("SBATCH_EXCLUSIVE", "1")
    monkeypatch.setattr(slurm, "JOB_PATH", f"{tmp_path}:{os.defpath}")
    assert slurm.submit_job([], "") == 7
    names = {line.partition("=")[0] for line in (tmp_path / "variables").read_text().splitlines()}
    assert names - {"PWD", "_", "SHLVL"} == {"PATH", "TZ"}


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [("slurm 22.05.8", True), ("slurm-wlm 24.11.5", True), ("slurm 20.11.4", False), ("slurm 22.04.1", False), ("what?", False)],
)
def test_version(monkeypatch: pytest.MonkeyPatch, text: str, *, is_accepted: bool) -> None:
    answer(monkeypatch, lambda: Completed(0, text, ""))
    if is_accepted:
        slurm.check_version()
    else:
        with pytest.raises(OrchestratorError, match="requires Slurm 22.05 or later"):
            slurm.check_version()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", slurm.Unreachable),
        ("slurm_load_jobs error: Invalid job id specified", NotFound),
        ("sbatch: error: Batch job submission failed: User's group not permitted to use this partition", CommandError),
    ],
)
def test_errors_of_slurm_keep_their_words(monkeypatch: pytest.MonkeyPatch, text: str, kind: type[OrchestratorError]) -> None:
    answer(monkeypatch, lambda: Completed(1, "", text))
    with pytest.raises(kind) as caught:
        slurm.read_jobs()
    assert type(caught.value) is kind
    assert text in caught.value.message
