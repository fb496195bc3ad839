"""The journal of a guest in the comment of its job, and the wait for a guest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import GuestError, NotFound
from orchestrator.fleet import follow, report, slurm
from orchestrator.fleet.job import Job
from orchestrator.fleet.journal import MAX_COMMENT, Entry, What, build_comment, make_entry, parse_comment

TIME = "2026-11-27T09:40:0{}Z".format
JOB = Job(7, "PENDING", "", "web", "Resources", "order-1", "", TIME(0))
STARTED, READY = Entry(TIME(2), What.STARTED, "runs"), Entry(TIME(3), What.READY, "nohype: ready")
RUNNING = replace(JOB, state="RUNNING", node="host1", started=TIME(1), reason="", entries=(STARTED,))
IS_READY = replace(RUNNING, entries=(STARTED, READY))
NODE = slurm.NodeState("host1", "DRAINED", 3, 2, 1024, 4, (), "epilog of job 7: guest web is quarantined", "root", TIME(9))


def test_comment_keeps_entries() -> None:
    entries = (make_entry(What.STARTED, "on\n  host1"), Entry(TIME(1), What.FAILED, "a: b | ü"))
    assert parse_comment(build_comment("order-1", entries)) == ("order-1", entries)
    assert entries[0].text == "on host1"
    assert parse_comment(build_comment("order-1", ())) == ("order-1", ())
    assert parse_comment("") == ("", ())


def test_comment_keeps_the_newest_entries_within_the_limit_of_slurm() -> None:
    entries = [make_entry(What.FAILED, f"{number} " + "ü" * 1000) for number in range(9)]
    comment = build_comment("order-1", entries)
    assert len(comment.encode()) <= MAX_COMMENT
    guest_id, kept = parse_comment(comment)
    assert guest_id == "order-1"
    assert kept == tuple(entries[-len(kept) :])
    assert kept


@pytest.mark.parametrize("text", ["x\x1f2026-11-27T09:40:00Z failed: forged", f"x {TIME(1)} failed: forged"])
def test_text_of_a_guest_cannot_add_an_entry(text: str) -> None:
    """The line with which a guest reports ready is its own."""
    _, entries = parse_comment(build_comment("order-1", [make_entry(What.READY, text + "\0\x1b[2J")]))
    assert [entry.what for entry in entries] == ["ready"]
    assert entries[0].text.endswith("forged??[2J")  # an argument of a program has no NUL


class Clock:
    """Stands in for the time of `report`, and for a controller that refuses the first ``refuses`` changes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: int = 0) -> None:
        self.now, self.refuses = 0.0, refuses
        self.written: list[list[str]] = []
        monkeypatch.setattr(report.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(slurm, "write_entries", self.write)

    def write(self, _job: int, _guest_id: str, entries: list[Entry]) -> None:
        if self.refuses:
            self.refuses -= 1
            raise slurm.Unreachable("no connection")
        self.written.append([entry.what for entry in entries])


def test_entry_is_written_again_when_the_controller_has_saved_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    journal = report.Report(7, "order-1", [])
    journal.add(STARTED)
    for now, count in ((1, 1), (5, 1), (7, 2), (20, 2)):
        clock.now = now
        journal.repeat()
        assert len(clock.written) == count
    journal.add(READY)
    assert clock.written[-1] == ["started", "ready"]


def test_entry_that_the_controller_did_not_take_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, refuses=2)
    journal = report.Report(7, "order-1", [])
    journal.add(STARTED)
    journal.repeat()
    assert not clock.written
    journal.repeat()
    assert clock.written == [["started"]]


class Controller:
    """The guest's job at each look; the last stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *jobs: Job) -> None:
        self.jobs, self.slept = list(jobs), 0.0
        monkeypatch.setattr(slurm, "read_jobs", self.read)
        monkeypatch.setattr(slurm, "read_nodes", lambda: (NODE,))
        monkeypatch.setattr(follow.time, "sleep", self.sleep)
        monkeypatch.setattr(follow.time, "monotonic", lambda: self.slept)

    def read(self, _name: str) -> tuple[Job, ...]:
        other = replace(JOB, number=1, state="FAILED", guest_id="order-0")  # an earlier guest of the same name
        return (other, *([self.jobs.pop(0) if len(self.jobs) > 1 else self.jobs[0]] if self.jobs else []))

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.mark.parametrize(
    "last", [IS_READY, replace(RUNNING, entries=(Entry(TIME(3), What.READY_BY_SSH, ""),)), replace(IS_READY, state="COMPLETED")]
)
def test_wait_ends_when_the_guest_is_ready(monkeypatch: pytest.MonkeyPatch, last: Job) -> None:
    Controller(monkeypatch, JOB, RUNNING, replace(IS_READY, state="COMPLETING"), last)
    assert follow.wait_ready("web", "order-1") == last


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (replace(RUNNING, state="FAILED", note="no image"), r"has ended \(failed: no image\)"),
        (replace(RUNNING, state="COMPLETED"), r"has ended \(completed\)"),  # without being ready
        (replace(IS_READY, state="CANCELLED"), r"has ended \(cancelled\)"),
        (replace(JOB, state="DEADLINE"), "--deadline"),
    ],
)
def test_guest_that_ends_fails_the_wait(monkeypatch: pytest.MonkeyPatch, last: Job, message: str) -> None:
    Controller(monkeypatch, JOB, RUNNING, last)
    with pytest.raises(GuestError, match=message):
        follow.wait_ready("web", "order-1")


def test_wait_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, JOB)
    with pytest.raises(GuestError, match=r"timed out after 90 s waiting for guest web to report ready \(pending: Resources\)"):
        follow.wait_ready("web", "order-1", 90)
    assert 90 < controller.slept < 95


def test_forgotten_guest_fails_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(monkeypatch)
    with pytest.raises(NotFound, match="does not know guest web"):
        follow.wait_ready("web", "order-1")


def test_wait_for_the_end_includes_the_epilog(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = replace(RUNNING, state="CANCELLED", number=8)
    Controller(monkeypatch, RUNNING, replace(RUNNING, state="COMPLETING"), ended)
    assert follow.wait_ended([RUNNING]) == (ended,)
    Controller(monkeypatch, replace(ended, number=7))
    with pytest.raises(GuestError, match="were not released: epilog of job 7: guest web is quarantined"):
        follow.wait_ended([ended])


def test_log_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(monkeypatch)
    assert [entry.what for entry in follow.read_log(JOB)] == ["submitted"]
    log = follow.read_log(replace(IS_READY, state="CANCELLED", ended=TIME(5)))
    assert [entry.what for entry in log] == ["submitted", "allocated", "started", "ready", "ended", "drained"]
    assert (log[-2].text, log[-1].text) == ("job 7: cancelled", f"host1: {NODE.reason}")
