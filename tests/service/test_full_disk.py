"""On a disk that is full guests can be ended and a manager can start: in `full_disk`, on a disk of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import full_disk

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    # In a mount namespace: it is gone with the program, however that ends.
    script = 'mount -t tmpfs -o "size=$3" tmpfs "$2/disk" && exec "$1" -m tests.harness.full_disk "$2"'
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*argv, sys.executable, tmp_path, str(full_disk.SIZE)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not any((tmp_path / "disk").iterdir())
