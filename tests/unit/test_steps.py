"""Steps whose things have gone in the meantime: nothing is left to do, and nothing stands in the way of a release.

What the steps do to VFs is tested with the network: tests/contract/test_host_net.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from orchestrator.host.root import HostRoot
from orchestrator.steps.cores import MoveKernelThread
from orchestrator.values import CpuSet


def test_a_thread_that_has_ended_needs_no_moving(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    step = MoveKernelThread(process.pid, "gone", CpuSet.of(os.sched_getaffinity(0)))
    assert step.read_before(HostRoot(tmp_path)) is None
    step.apply(HostRoot(tmp_path))
