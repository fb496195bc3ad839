"""A controller in memory, in place of Slurm's commands."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.fleet import slurm, submit
from orchestrator.fleet.job import Job
from orchestrator.fleet.slurm import Use

NODE = slurm.NodeState("host1", "IDLE", 99, 2, 99_999, 99, ("sriov",), "")


class Controller:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Job] = []
        self.forgets = 0
        self._numbers = itertools.count(1)
        monkeypatch.setattr(slurm, "check_version", lambda: None)
        monkeypatch.setattr(slurm, "read_nodes", lambda: (NODE,))
        monkeypatch.setattr(slurm, "read_jobs", lambda name="": tuple(job for job in self.jobs if name in ("", job.name)))
        monkeypatch.setattr(slurm, "read_tenant_uses", lambda tenant: tuple(
            Use(job.number, 1, 256, 1) for job in self.jobs if job.tenant == tenant and not job.has_ended
        ))  # fmt: skip
        monkeypatch.setattr(slurm, "submit_job", self.accept)
        monkeypatch.setattr(slurm, "release_jobs", self.release)
        monkeypatch.setattr(slurm, "cancel_jobs", self.cancel)
        monkeypatch.setattr(submit.time, "sleep", lambda _seconds: None)

    def accept(self, options: list[str], _script: str) -> int:
        given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
        job = Job(next(self._numbers), "PENDING", "", given["job-name"], "", given["comment"])
        self.jobs.append(replace(job, tenant=given.get("account", ""), is_held="hold" in given))
        return job.number

    def release(self, numbers: Iterable[int]) -> None:
        if self.forgets:
            self.forgets -= 1
            return
        for number in numbers:
            self.change(number, is_held=False)

    def cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.change(number, state="CANCELLED")

    def change(self, number: int, **fields: Any) -> None:
        self.jobs = [replace(job, **fields) if job.number == number else job for job in self.jobs]

    def released(self) -> list[str]:
        return [job.name for job in self.jobs if not job.is_held and not job.has_ended]
