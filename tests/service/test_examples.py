"""The scripts of examples/ when something fails: one message, no guest is left. Their `nohype guest ssh` runs commands here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.images.description import write_description
from orchestrator.images.store import read_image
from orchestrator.waiting import wait_until
from tests.harness.api_server import Served, serve
from tests.harness.guests import until

EXAMPLES = Path(__file__).parents[2] / "examples"
STAND_IN = '#!/bin/sh\n# guest ssh --identity KEY NAME -- WORDS\nshift 6\nexec "$@"\n'


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nohype").write_text(STAND_IN)
    (tmp_path / "bin/nohype").chmod(0o755)
    with serve(tmp_path) as served:
        image = read_image(served.world.folder / "images" / "minimal")
        write_description(image.folder, image.model_copy(update={"configuration": ("credentials",)}))
        yield served


def start(served: Served, name: str, *words: str) -> subprocess.Popen[str]:
    folder = served.path.parent
    environment = {**os.environ, "NOHYPE_SOCKET": str(served.path), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    argv = [sys.executable, str(EXAMPLES / f"{name}.py"), "--image", "minimal", "--memory", "128M", *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)


def names(served: Served) -> list[str]:
    return [guest["name"] for guest in served.client.guests()]


def run(served: Served, name: str, *words: str) -> tuple[int, str, str]:
    """Each guest reports ready as soon as it is there. Returns status, output and messages."""
    with start(served, name, *words) as process:
        ended = threading.Event()

        def report() -> None:
            done: set[str] = set()
            while not ended.wait(0.05):
                for guest in served.client.guests():
                    if guest["state"] == "running" and guest["name"] not in done:
                        served.world.hypervisor.write(guest["name"], b"nohype: ready name=x\n")
                        done.add(guest["name"])

        thread = threading.Thread(target=report)
        thread.start()
        try:
            output, messages = process.communicate(timeout=200)
        finally:
            ended.set()
            thread.join()
    assert names(served) == []
    return process.returncode, output, messages


def test_runs_are_measured(served: Served) -> None:
    status, output, messages = run(served, "reproducibility", "--guests=2", "--repeat=2", "--network=10.9.0.0/24", "true")
    assert (status, messages) == (0, "")
    assert [line.split()[0] for line in output.splitlines()] == ["alone", "side", "ratio"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sh", "-c", "exit 7"), "the command ended with status 7 in guest bench-0 (124: too slow)"),
        (("--limit=1", "sleep", "100"), "the command ended with status 124 in guest bench-0 (124: too slow)"),
    ],
)
def test_command_that_fails_is_one_message(served: Served, words: tuple[str, ...], message: str) -> None:
    first = [word for word in words if word.startswith("--limit")]
    rest = [word for word in words if word not in first]
    found = run(served, "reproducibility", "--guests=2", "--network=10.9.0.0/24", *first, "--", *rest)
    assert found == (1, "", f"reproducibility: {message}\n")


@pytest.mark.parametrize("name", ["reproducibility", "two_tier"])
def test_guest_that_cannot_be_created_is_one_message(served: Served, name: str) -> None:
    words = ("--network=10.9.0.0/24", "--image", "none", *(("true",) if name == "reproducibility" else ()))
    status, output, messages = run(served, name, *words)
    assert (status, output) == (1, "")
    assert messages.startswith(f"{name}: no guest image 'none'")
    assert "Traceback" not in messages


def test_too_small_a_network_is_refused(served: Served) -> None:
    for name, *words in (("reproducibility", "true"), ("two_tier",)):
        status, output, messages = run(served, name, "--network=10.9.0.0/28", *words)
        assert status
        assert (output, "Traceback" in messages) == ("", False)


@pytest.mark.parametrize("name", ["reproducibility", "two_tier", "ci_runner"])
def test_terminated_script_leaves_no_guest(served: Served, name: str) -> None:
    words = ("--address=10.9.0.50/24", "true") if name == "ci_runner" else ("--network=10.9.0.0/24",)
    with start(served, name, *words, *(("true",) if name == "reproducibility" else ())) as process:
        until(lambda: any(guest["state"] == "running" for guest in served.client.guests()))
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=100)
    assert process.returncode == 1
    assert messages.endswith(f"{name}: ended by SIGTERM\n")
    assert wait_until(lambda: names(served), lambda found: not found, timeout=60, interval=0.1) == []
