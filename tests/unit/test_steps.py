"""Steps whose things have gone in the meantime: nothing is left to do, and nothing stands in the way of a release. And steps that
fail by themselves: the others are made, and an undo record is left exactly where something was changed.

What the steps do to VFs is tested with the network: tests/contract/test_host_net.py.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import ClassVar

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Ledger
from orchestrator.resources.cores import MoveKernelThread
from orchestrator.resources.step import Arguments, try_steps
from orchestrator.values import CpuSet


def test_a_thread_that_has_ended_needs_no_moving(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    step = MoveKernelThread(process.pid, "gone", CpuSet.of(os.sched_getaffinity(0)))
    assert step.read_before(HostRoot(tmp_path)) is None
    step.apply(HostRoot(tmp_path))


@dataclass(frozen=True)
class SetFile:
    """Writes a file, and fails before or after that."""

    action: ClassVar[str] = "file"
    name: str
    fails: str = ""

    def describe(self) -> str:
        return f"set {self.name}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        if self.fails == "unreadable":
            raise HostError("cannot read it")
        text = host.read(self.name)
        return None if text == "new" else {"name": self.name, "text": text}

    def apply(self, host: HostRoot) -> None:
        if self.fails == "before":
            raise HostError("refused", errno=ENOSPC)
        host.write(self.name, "new" if not self.fails else "odd")
        if self.fails == "after":
            raise HostError("clamped")


def test_steps_that_do_not_need_each_other(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text("old")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    steps = [SetFile("a", "before"), SetFile("b"), SetFile("c", "after"), SetFile("d", "unreadable"), SetFile("e")]
    changed, failed = try_steps(HostRoot(tmp_path), ledger, "host", steps)
    assert changed == ("set b", "set e")
    assert [(step.name, error.errno) for step, error in failed] == [("a", ENOSPC), ("c", 0), ("d", 0)]
    assert sorted(str(record.arguments["name"]) for record in ledger.pending("host")) == ["b", "c", "e"]
    (tmp_path / "b").write_text("old")  # something else keeps reverting it
    try_steps(HostRoot(tmp_path), ledger, "host", [SetFile("b")])
    assert len(ledger.pending("host")) == 3, "it is undone once"
