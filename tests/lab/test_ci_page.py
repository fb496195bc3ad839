"""The example of docs/ci.md runs as it is written, on the lab of these tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.lab.paths import LabDir
from tests.lab.conftest import LabHost

ROOT = Path(__file__).parents[2]


def read_example() -> str:
    text = (ROOT / "docs/ci.md").read_text()
    (block,) = re.findall(r"^<!-- tests/lab/test_ci_page.py .*\n\n((?: {4}.*\n)+)", text, re.MULTILINE)
    return re.sub(r"^ {4}", "", block, flags=re.MULTILINE)


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "orchestrator.lab.pytest_plugin", *words, "."]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def test_example_of_the_page_passes(host: LabHost, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_example.py").write_text(read_example())
    done = run_pytest(tmp_path, "--nohype-lab", host.lab.name)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr
    host.run("rm -r /root/scripts* /root/link.txt; true")


@pytest.mark.soak
@pytest.mark.parametrize("words", [("--spec", "small"), ("--spec", "small", "--package", "jq")], ids=["plain", "package"])
def test_command_runs_in_a_server_of_its_own(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Its file comes back, its status is that of the program, and it cannot fill more than its own disk."""
    (tmp_path / "in").write_text("hello\n")
    fill = "fallocate -l $(df --output=avail -B1 / | tail -n 1) /full; dd if=/dev/zero of=/more bs=1M count=64 2> /run/error"
    command = f"cp in out; command -v jq; {fill}; rm /full /more; cp /run/error error; exit 9"
    argv = [
        Path(sys.executable).with_name("nohype"),
        "lab",
        "run",
        *words,
        "--copy",
        str(tmp_path),
        "--timeout",
        "300",
        "--",
        command,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=900)
    assert (done.returncode, done.stdout) == (9, "/usr/bin/jq\n" if "jq" in words else ""), done.stderr
    assert (tmp_path / "out").read_text() == "hello\n"
    assert "No space left on device" in (tmp_path / "error").read_text()
    (name,) = re.findall(r"the lab of this job: (run-[0-9a-f]{8})$", done.stderr, re.MULTILINE)
    assert not LabDir(name).path.exists()
    assert not LabDir(name).lock.exists()
