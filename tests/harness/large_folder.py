"""Folders of tests on the disk: the temporary folder of a test can be in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.images.cache import remove_tree

_BASE = Path("/var/tmp")


@contextmanager
def large_folder(kind: str, base: Path = _BASE) -> Iterator[Path]:
    """An empty folder, whose name has the id of this process; removes those of runs that were killed.

    Nothing may be mounted in it but in a mount namespace of the test's own, which ends with its processes.
    """
    name = f"nohype-test-{kind}"
    for left in base.glob(f"{name}-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            remove_tree(left)
    folder = base / f"{name}-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        remove_tree(folder)
