"""Large folders of tests are removed, also those of runs that were killed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.harness.large_folder import large_folder


def test_folders_of_ended_runs_are_removed_and_those_of_others_kept(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    with subprocess.Popen(["sleep", "1000"]) as other:
        for pid in (ended.pid, other.pid):
            (tmp_path / f"nohype-test-deb-{pid}").mkdir()
        (tmp_path / "nohype-test-other").mkdir()
        with large_folder("deb", tmp_path) as folder:
            (folder / "file").write_text("text")
            assert not (tmp_path / f"nohype-test-deb-{ended.pid}").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"nohype-test-deb-{other.pid}", "nohype-test-other"]
        other.kill()
