"""Prolog, job script and Epilog with a real manager on a fake host; what Slurm says of a job is given."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import Client
from orchestrator.client.transport import Unreachable
from orchestrator.errors import Conflict, GuestError, HostError, NotFound, OrchestratorError, ReadyBySsh
from orchestrator.fleet import check, slurm, steps
from orchestrator.fleet.check import Checked, Orphan, check_host, end_orphan, find_orphans
from orchestrator.fleet.job import Job
from orchestrator.fleet.journal import Entry
from orchestrator.fleet.node import build_nodes
from orchestrator.fleet.records import Record, read_record, read_records, remove_record, write_record
from orchestrator.values import CpuSet
from orchestrator.waiting import wait_until
from tests.fakes.server import Server
from tests.harness.api_server import Served
from tests.harness.fleet_site import serve_host, write_site

SERVER = Server(cores=8, nodes=2, vfs=2, pages=256)
NODE, JOB = "a-n1", 7
FIELDS: dict[str, Any] = {"name": "web", "memory": "64M", "image": "minimal", "id": "order-1"}
ALLOCATION = slurm.Allocation(NODE, CpuSet.parse("2-3"), CpuSet.parse("1"), 64, "web", "order-1")
CPUS = "10-11"
"""The second core of NUMA node 1."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve_host(tmp_path, SERVER) as found:
        yield found


@pytest.fixture
def site(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> steps.Site:
    monkeypatch.setattr(slurm, "read_allocation", lambda _job: ALLOCATION)
    for name, seconds in {"PROLOG_SECONDS": 0.2, "SETTLE_SECONDS": 0.3, "POLL_SECONDS": 0.05, "RETRY_SECONDS": 0.02}.items():
        monkeypatch.setattr(steps, name, seconds)
    monkeypatch.setattr(check, "PROLOG_SECONDS", 0.2)
    return write_site(tmp_path, served.client)


def create(client: Client, **fields: Any) -> None:
    client.create({**FIELDS, "placement": {"cpus": CPUS}, **fields})


def record() -> Record:
    return Record(NODE, JOB, "web", "order-1")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HostError("the manager\ndoes not respond", "start it"), "the manager does not respond; start it"),
        (HostError("the manager does not respond"), "the manager does not respond"),
    ],
)
def test_error_is_one_line(error: OrchestratorError, line: str) -> None:
    assert steps.summarize(error) == line


def test_prolog_admits_a_job_and_records_its_guest(site: steps.Site) -> None:
    assert steps.run_prolog(site, NODE, JOB) == record()
    assert steps.run_prolog(site, NODE, JOB) == record()  # Slurm may run it again
    assert read_record(site.records, NODE, JOB) == record()


def test_prolog_refuses_what_a_guest_has(site: steps.Site) -> None:
    vf = build_nodes(site.client.host(), "a")[1].vfs[1]
    for fields, message in (
        ({"name": "other", "id": "x"}, r"other \(running\) already has CPUs 10-11\n"),
        ({"placement": {"cpus": "12-13"}, "id": "x"}, "already has its name"),
        ({"name": "other", "placement": {"cpus": "12-13"}}, "already has its id"),
        ({"name": "other", "id": "x", "placement": {"cpus": "12-13", "vf": str(vf)}}, f"already has VF {vf}"),
    ):
        create(site.client, **fields)
        with pytest.raises(Conflict, match=message) as caught:
            steps.run_prolog(site, NODE, JOB)
        assert "\n" not in steps.summarize(caught.value)
        site.client.delete(fields.get("name", "web"))
    assert read_record(site.records, NODE, JOB) is None


def test_prolog_refuses_a_place_of_a_stopped_guest(site: steps.Site) -> None:
    create(site.client, name="other", id="x")
    site.client.kill("other")
    with pytest.raises(Conflict, match=r"other \(stopped\) already has CPUs 10-11"):
        steps.run_prolog(site, NODE, JOB)


def test_prolog_refuses_a_job_number_whose_guest_was_not_ended(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(site.records, replace(record(), guest_id="order-0"))
    job = Job(JOB, "RUNNING", NODE, "web", "", "order-0", "")
    monkeypatch.setattr(slurm, "read_job", lambda _number: job)
    with pytest.raises(Conflict, match="job 7 still has guest web"):
        steps.run_prolog(site, NODE, JOB)


def test_prolog_ends_a_forgotten_guest_that_has_the_place(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash, the controller gives a number and a place a second time."""
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    new = replace(ALLOCATION, name="new", guest_id="order-2")
    monkeypatch.setattr(slurm, "read_allocation", lambda _job: new)
    monkeypatch.setattr(slurm, "read_job", lambda number: Job(number, "RUNNING", NODE, "new", "", "order-2", ""))
    steps.run_prolog(site, NODE, JOB)
    assert not site.client.guests()
    assert read_record(site.records, NODE, JOB) == Record(NODE, JOB, "new", "order-2")


def test_prolog_refuses_missing_pages(site: steps.Site, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "read_allocation", lambda _job: replace(ALLOCATION, memory=1024))
    with pytest.raises(HostError, match="256 huge pages of 2M are free on NUMA node 1, 512 requested"):
        steps.run_prolog(site, NODE, JOB)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("nohype-nodes.conf", "RealMemory=512", "RealMemory=1024", "RealMemory=1024"),
        ("nohype-nodes.conf", "CoresPerSocket=4", "CoresPerSocket=5", "CoresPerSocket=5"),
        ("gres.conf", "File", "Count", "gres.conf has 2 VFs"),
    ],
)
def test_prolog_refuses_a_configuration_that_is_not_that_of_the_host(
    site: steps.Site, file: str, old: str, new: str, message: str
) -> None:
    path = site.configuration / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(HostError, match=message):
        steps.run_prolog(site, NODE, JOB)


def test_prolog_refuses_a_vf_that_is_gone(site: steps.Site, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    host = site.client.host()
    host["survey"]["pfs"][1]["vfs"].pop()
    monkeypatch.setattr(site.client, "host", lambda: host)
    with pytest.raises(HostError, match="Gres=vf:2 in nohype-nodes.conf, the host has vf:1"):
        steps.run_prolog(site, NODE, JOB)


def test_prolog_refuses_without_a_manager_and_without_files(
    site: steps.Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OrchestratorError, match="manager"):
        steps.run_prolog(replace(site, client=Client(tmp_path / "none.sock")), NODE, JOB)
    with pytest.raises(HostError, match="cannot read .*nohype-nodes.conf"):
        steps.run_prolog(replace(site, configuration=tmp_path / "none"), NODE, JOB)
    monkeypatch.setattr(slurm, "read_allocation", lambda _job: replace(ALLOCATION, node="a-n9"))
    with pytest.raises(HostError, match="a-n9 is not a node of host a"):
        steps.run_prolog(site, "a-n9", JOB)


def _forget(_job: int) -> slurm.Allocation:
    raise NotFound("scontrol: Invalid job id specified")


@pytest.mark.parametrize("answer", [_forget, lambda _job: replace(ALLOCATION, node="a-n0")], ids=["forgotten", "elsewhere"])
def test_job_that_the_controller_started_elsewhere_is_left_to_it(
    site: steps.Site, entries: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], slurm.Allocation]
) -> None:
    """A Prolog that fails has the controller end the job, also where it runs; a note would be that of the other start."""
    monkeypatch.setattr(slurm, "read_allocation", answer)
    assert steps.run_prolog(site, NODE, JOB) is None
    assert read_record(site.records, NODE, JOB) is None
    with pytest.raises(HostError, match=f"did not start guest web .* as job 7 on {NODE}, or forgot it") as error:
        steps.run_job(site, NODE, JOB, FIELDS)
    steps.report_error(NODE, JOB, steps.What.FAILED, error.value)
    assert not site.client.guests()
    assert not entries


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is stored with the job."""
    found: list[tuple[str, str]] = []

    def write(_job: int, guest_id: str, entries: list[Entry]) -> None:
        assert guest_id == "order-1"
        found[:] = [(entry.what, entry.text) for entry in entries]

    monkeypatch.setattr(slurm, "write_entries", write)
    return found


def test_reason_reaches_a_controller_that_restarts(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, stored = iter([slurm.Unreachable("it restarts"), None]), []

    def write(_job: int, guest_id: str, entries: list[Entry]) -> None:
        if error := next(answers):
            raise error
        stored.append((guest_id, entries[-1].what, entries[-1].text))

    monkeypatch.setattr(slurm, "write_entries", write)
    steps.report_error(NODE, JOB, steps.What.REFUSED, HostError("no pages"))
    assert stored == [("order-1", "refused", "no pages")]


def run_job(site: steps.Site) -> threading.Thread:
    def work() -> None:
        try:
            steps.run_job(site, NODE, JOB, FIELDS)
        except OrchestratorError as error:
            steps.report_error(NODE, JOB, steps.What.FAILED, error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_running(site: steps.Site) -> None:
    done = threading.Event()
    for _ in range(500):
        if (guest := steps.find_guest(site.client, "web", "order-1")) and guest["state"] == "running":
            return
        done.wait(0.02)
    raise AssertionError("the guest does not run")


def test_guest_runs_on_what_slurm_allocated_until_it_ends(
    site: steps.Site, served: Served, entries: list[tuple[str, str]]
) -> None:
    thread = run_job(site)
    wait_running(site)
    guest = site.client.guest("web")
    assert (CpuSet.of(guest["cpus"]), guest["id"]) == (CpuSet.parse(CPUS), "order-1")
    assert guest["vf"]
    assert guest["vf"]["address"] == str(build_nodes(site.client.host(), "a")[1].vfs[1])
    site.client.kill("web")
    thread.join(60)
    assert [what for what, _ in entries] == ["started", "ended"]
    assert "CPUs 10-11 of a" in entries[0][1]
    assert entries[1][1].startswith("stopped")  # the words of the manager


def test_guest_that_reports_ready_is_noted(
    site: steps.Site, entries: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [ReadyBySsh("by SSH only"), "nohype: ready", GuestError("timed out")]

    def wait_ready(_name: str, _seconds: float) -> str:
        answer = answers.pop() if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(site.client, "wait_ready", wait_ready)
    thread = run_job(site)
    assert wait_until(lambda: ("ready", "nohype: ready") in entries, timeout=60, interval=0.02)
    site.client.delete("web")
    thread.join(60)
    assert [what for what, _ in entries] == ["started", "ready", "ended"]  # asked no more once it was ready


def test_guest_that_cannot_be_started_is_noted(site: steps.Site, entries: list[tuple[str, str]]) -> None:
    create(site.client, name="other", id="x")
    run_job(site).join(60)
    assert [what for what, _ in entries] == ["failed"]
    assert not [guest for guest in site.client.guests() if guest["name"] == "web"]


def test_job_of_another_guest_is_refused(site: steps.Site) -> None:
    with pytest.raises(HostError, match="did not start guest web"):
        steps.run_job(site, NODE, JOB, {**FIELDS, "id": "order-2"})
    assert not site.client.guests()


def test_number_of_vfs_must_be_that_of_the_interfaces(site: steps.Site) -> None:
    node = build_nodes(site.client.host(), "a")[1]
    with pytest.raises(Conflict, match="2 network interfaces, and Slurm allocated 1 VFs"):
        steps.build_request({**FIELDS, "nics": [{}, {}]}, node, ALLOCATION)


def test_epilog_ends_the_guest_and_can_be_repeated(site: steps.Site) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    for _ in range(2):
        steps.run_epilog(site, NODE, JOB)
        assert not site.client.guests()
        assert read_record(site.records, NODE, JOB) is None


def test_steps_tolerate_a_manager_that_restarts_between_any_two_requests(
    site: steps.Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second request fails."""
    monkeypatch.setattr(steps, "PROLOG_SECONDS", 60.0)
    for name in ("host", "guests", "guest"):
        call, answers = getattr(site.client, name), itertools.count()

        def ask(*words: str, call: Any = call, answers: Any = answers) -> Any:
            if next(answers) % 2 == 0:
                raise Unreachable("the manager does not respond")
            return call(*words)

        monkeypatch.setattr(site.client, name, ask)
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    steps.run_epilog(site, NODE, JOB)
    assert read_record(site.records, NODE, JOB) is None


def test_epilog_leaves_other_guests_alone(site: steps.Site) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client, id="order-2")  # of the same name, on the same cores
    steps.run_epilog(site, NODE, JOB)
    assert [guest["id"] for guest in site.client.guests()] == ["order-2"]


@pytest.mark.parametrize("error", [Unreachable("the manager does not respond"), Conflict("the guest has changed")])
def test_epilog_repeats_a_deletion_that_failed(
    site: steps.Site, monkeypatch: pytest.MonkeyPatch, error: OrchestratorError
) -> None:
    """Such as that of a manager that is killed just then: the guest still runs, and the node must not be drained for that."""
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    delete, asked = site.client.delete, itertools.count()

    def fail_first(name: str, **words: Any) -> None:
        if next(asked) < 2:
            raise error
        delete(name, **words)

    monkeypatch.setattr(site.client, "delete", fail_first)
    steps.run_epilog(site, NODE, JOB)
    assert not site.client.guests()
    assert next(asked) == 3


def test_epilog_ends_a_guest_whose_creation_a_killed_job_script_has_left_behind(
    site: steps.Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.run_prolog(site, NODE, JOB)
    monkeypatch.setattr(steps, "SETTLE_SECONDS", 60.0)
    timer = threading.Timer(0.3, lambda: create(site.client))
    timer.start()
    steps.run_epilog(site, NODE, JOB)
    timer.join()
    assert not site.client.guests()


def test_epilog_fails_and_keeps_the_record_while_the_place_is_not_free(
    site: steps.Site, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    guest = {**site.client.guest("web"), "state": "quarantined"}
    with monkeypatch.context() as patch:
        patch.setattr(steps, "find_guest", lambda *_: guest)
        with pytest.raises(HostError, match="web is quarantined"):
            steps.run_epilog(site, NODE, JOB)
    assert read_record(site.records, NODE, JOB) == record()
    monkeypatch.setattr(steps, "EPILOG_SECONDS", 0.2)
    with pytest.raises(OrchestratorError, match="manager"):
        steps.run_epilog(replace(site, client=Client(site.records / "none.sock")), NODE, JOB)
    assert read_record(site.records, NODE, JOB) == record()


def test_damaged_record_is_an_error(site: steps.Site) -> None:
    write_record(site.records, record())
    (site.records / f"{NODE}.{JOB}.json").write_text('{"node":')
    with pytest.raises(HostError, match="is damaged"):
        steps.run_epilog(site, NODE, JOB)


def job(**fields: Any) -> Job:
    return replace(Job(JOB, "RUNNING", NODE, "web", "", "order-1"), **fields)


def test_guests_that_the_controller_has_forgotten_are_ended(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    for found in (job(), job(state="COMPLETING")):
        monkeypatch.setattr(slurm, "read_job", lambda _number, found=found: found)
        assert not steps.end_guests_without_job(site)
        assert find_orphans(site.client, site.records) == ()
    assert site.client.guests()
    for other in (None, job(guest_id="order-2"), job(state="NODE_FAIL"), job(node="b")):  # b: submitted again, started elsewhere
        monkeypatch.setattr(slurm, "read_job", lambda _number, found=other: found)
        assert steps.find_records_without_job(site.records) == (record(),)
        assert find_orphans(site.client, site.records) == (Orphan("web", "running", "order-1", JOB, NODE),)
    monkeypatch.setattr(slurm, "read_job", lambda _number: None)
    assert steps.end_guests_without_job(site) == (record(),)
    assert not site.client.guests()
    assert not steps.find_records_without_job(site.records)


@contextmanager
def child_of(parent: Path, environment: dict[str, str]) -> Iterator[None]:
    """A process with this environment, whose parent is a script of this name."""
    parent.write_text("#!/bin/sh\nsleep 1000 &\necho ready\nwait\n")
    parent.chmod(0o755)
    with subprocess.Popen([parent], env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_forgotten_job_whose_script_still_runs_is_left_to_its_epilog(
    site: steps.Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without its record, the Epilog would not end a guest that the script is about to start."""
    monkeypatch.setattr(slurm, "write_comment", lambda _node, _text: None)
    monkeypatch.setattr(slurm, "read_job", lambda _number: None)
    job = 1_000_000 + os.getpid()  # tests of other processes see this script, too
    own = replace(record(), job=job)
    prolog = {"SLURM_SCRIPT_CONTEXT": "prolog_slurmd"}
    is_root = os.geteuid() == 0
    for parent, node, more, found in (
        ("slurmstepd", "a-n0", {}, (own,)),
        ("slurmstepd", NODE, prolog, (own,)),
        ("sh", NODE, {}, (own,)),  # any user can set the variables
        ("slurmstepd", NODE, {}, () if is_root else (own,)),
    ):
        steps.run_prolog(site, NODE, job)
        environment = {"SLURM_JOB_ID": str(job), "SLURMD_NODENAME": node, "PATH": os.environ["PATH"], **more}
        with child_of(tmp_path / parent, environment):
            assert steps.end_guests_without_job(site) == found
            assert check_host(site, NODE).ended == ()
    assert steps.end_guests_without_job(site) == ((own,) if is_root else ())


def test_guests_keep_running_while_the_controller_does_not_respond(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)

    def fail(_number: int) -> Job:
        raise slurm.Unreachable("Slurm's controller does not respond")

    monkeypatch.setattr(slurm, "read_job", fail)
    for end in (lambda: steps.end_guests_without_job(site), lambda: check_host(site, NODE)):
        with pytest.raises(slurm.Unreachable):
            end()
    assert site.client.guests()


def test_record_of_another_guest_is_kept(site: steps.Site) -> None:
    """The controller gave the number of the job again while its first guest was ended."""
    other = replace(record(), guest_id="order-2")
    write_record(site.records, other)
    remove_record(site.records, record())
    assert read_record(site.records, NODE, JOB) == other


def test_guest_created_at_the_host_has_no_job(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    create(site.client, id="local")
    orphan = Orphan("web", "running", "local", None, "")
    assert find_orphans(site.client, site.records) == (orphan,)
    assert end_orphan(site.client, site.records, "web") == orphan
    assert not site.client.guests()


@pytest.mark.parametrize("reads", [[(), True], [True, ()]])
def test_guest_that_starts_or_ends_while_guests_are_read_has_a_job(
    site: steps.Site, monkeypatch: pytest.MonkeyPatch, reads: list[Any]
) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    monkeypatch.setattr(slurm, "read_job", lambda _number: job())
    answers = iter([(record(),) if read else () for read in reads])
    monkeypatch.setattr(check, "read_records", lambda _folder: next(answers))
    assert find_orphans(site.client, site.records) == ()


def test_only_a_guest_without_a_job_can_be_ended(site: steps.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    monkeypatch.setattr(slurm, "read_job", lambda _number: job())
    with pytest.raises(Conflict, match="guest web has a job"):
        end_orphan(site.client, site.records, "web")
    monkeypatch.setattr(slurm, "read_job", lambda _number: None)
    with pytest.raises(NotFound, match="no guest named other"):
        end_orphan(site.client, site.records, "other")
    assert len(site.client.guests()) == 1
    assert end_orphan(site.client, site.records, "web").job == JOB
    assert not site.client.guests()
    assert read_record(site.records, NODE, JOB) is None


@pytest.fixture
def comments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the check stores with the node."""
    found: list[str] = []
    monkeypatch.setattr(slurm, "write_comment", lambda _node, text: found.append(text))
    return found


def test_health_check_reports_what_prevents_guests(site: steps.Site, comments: list[str]) -> None:
    assert check_host(site, NODE) == Checked((), ())
    create(site.client)
    path = site.configuration / "nohype-nodes.conf"
    path.write_text(path.read_text().replace("RealMemory=512", "RealMemory=1024"))
    first, second = check_host(site, NODE).findings
    assert "RealMemory=1024" in first
    assert "guest web (running) has no job" in second
    assert site.client.guests()  # it has no record
    (silent,) = check_host(replace(site, client=Client(site.records / "none.sock")), NODE).findings
    assert "manager" in silent
    assert comments == ["check passed", f"check failed: {first}; {second}", f"check failed: {silent}"]


def test_health_check_ends_guests_with_a_record_and_without_a_job(
    site: steps.Site, comments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    monkeypatch.setattr(slurm, "read_job", lambda _number: job())
    assert check_host(site, NODE) == Checked((), ())
    assert site.client.guests()
    monkeypatch.setattr(slurm, "read_job", lambda _number: None)
    assert check_host(site, NODE) == Checked((record(),), ())
    assert not site.client.guests()
    assert comments == ["check passed"] * 2


def test_health_check_ends_the_other_guests_if_one_cannot_be_ended(
    site: steps.Site, comments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.run_prolog(site, NODE, JOB)
    create(site.client)
    first = replace(record(), job=1, guest_id="order-0")
    write_record(site.records, first)

    def end(site: steps.Site, found: Record, seconds: float) -> None:
        if found == first:
            raise HostError("guest web is quarantined")
        steps.end_guest(site, found, seconds)

    monkeypatch.setattr(check, "end_guest", end)
    monkeypatch.setattr(slurm, "read_job", lambda _number: None)
    assert check_host(site, NODE) == Checked((record(),), ("a guest without a job was not ended: guest web is quarantined",))
    assert not site.client.guests()


def test_health_check_reports_a_damaged_record(site: steps.Site, comments: list[str]) -> None:
    site.records.mkdir(exist_ok=True)
    (site.records / f"{NODE}.3.json").write_text("{")
    (finding,) = check_host(site, NODE).findings
    assert "is damaged" in finding


def test_records_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot read the records"):
        read_records(tmp_path / "file")
    assert read_records(tmp_path / "none") == ()
