"""A job whose guest has ended is ended too if the controller has forgotten that."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.fleet import forgotten, slurm
from orchestrator.fleet.job import Job
from orchestrator.fleet.journal import Entry, What
from orchestrator.fleet.records import Record, read_ended, read_record, remove_record, write_record

RECORD = Record("host1-n0", 7, "web", "order-1")
RUNNING = Job(7, "RUNNING", "host1-n0", "web", "", "order-1", entries=(Entry("2026-11-27T09:40:00Z", "started", "x"),))


class Controller:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, job: Job | None) -> None:
        self.job, self.cancelled, self.notes = job, list[int](), list[Entry]()
        monkeypatch.setattr(slurm, "read_job", lambda number: self.job if self.job and number == self.job.number else None)
        monkeypatch.setattr(slurm, "cancel_jobs", self.cancelled.extend)
        monkeypatch.setattr(slurm, "write_entries", lambda _number, _id, entries: self.notes.extend(entries))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the record of a guest that has ended."""
    write_record(tmp_path, RECORD)
    assert not list(read_ended(tmp_path, RECORD.node))
    remove_record(tmp_path, RECORD)
    assert read_record(tmp_path, RECORD.node, RECORD.job) is None
    return tmp_path


def age(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (0, 0))


def test_job_whose_end_was_forgotten_is_ended_with_a_note(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, RUNNING)
    age(folder)
    assert forgotten.end_forgotten_jobs(folder, RECORD.node) == (7,)
    assert controller.cancelled == [7]
    assert [entry.what for entry in controller.notes] == ["started", What.FAILED]
    controller.job = replace(RUNNING, state="CANCELLED")
    assert forgotten.end_forgotten_jobs(folder, RECORD.node) == ()
    assert list(folder.iterdir()), "the controller can forget this, too"
    age(folder)
    assert forgotten.end_forgotten_jobs(folder, RECORD.node) == ()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "job",
    [
        None,
        replace(RUNNING, state="COMPLETING"),
        replace(RUNNING, state="CONFIGURING"),
        replace(RUNNING, state="COMPLETED"),
        replace(RUNNING, guest_id="order-2"),
        replace(RUNNING, node="host2-n0"),
    ],
)
def test_other_jobs_are_not_ended(folder: Path, monkeypatch: pytest.MonkeyPatch, job: Job | None) -> None:
    controller = Controller(monkeypatch, job)
    assert forgotten.end_forgotten_jobs(folder, RECORD.node) == ()
    assert len(list(read_ended(folder, RECORD.node))) == 1, "the controller may not have saved it"
    age(folder)
    assert forgotten.end_forgotten_jobs(folder, RECORD.node) == ()
    assert not controller.cancelled
    assert not list(folder.iterdir())


def test_records_of_other_nodes_and_of_guests_that_run_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, RUNNING)
    assert forgotten.end_forgotten_jobs(folder, "host1-n1") == ()
    (folder / "host1-n0.8.ended").write_text("{")
    next(folder.glob("*.7.ended")).unlink()
    write_record(folder, RECORD)
    assert forgotten.end_forgotten_jobs(folder, RECORD.node) == ()
    assert not controller.cancelled
