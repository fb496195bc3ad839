"""What a terminal shows while a command waits for the manager."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.model.proof import Proof
from tests.harness.api_server import PROOF, Served, serve
from tests.harness.terminal import COMMAND, run_on_terminal


@pytest.fixture
def release() -> threading.Event:
    return threading.Event()


@pytest.fixture
def served(tmp_path: Path, release: threading.Event) -> Iterator[Served]:
    def audit(_frames: int, **_: object) -> tuple[Proof, ...]:
        release.wait(120)
        return (PROOF,)

    with serve(tmp_path, audit=audit) as served:
        yield served
    release.set()


def test_long_wait_is_shown_and_removed(served: Served, release: threading.Event) -> None:
    with run_on_terminal("--socket", str(served.path), "audit") as terminal:
        terminal.until(b"measuring, 2 s")
        release.set()
        assert terminal.wait() == 1
        terminal.until(b"\r\x1b[K")
        assert terminal.shown.index(b"\r\x1b[KPROOF") > terminal.shown.index(b"measuring, 2 s")


def test_guest_that_is_created_is_named(served: Served, monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> None:
    create = served.manager.create
    monkeypatch.setattr(served.manager, "create", lambda *given: release.wait(120) and create(*given))
    words = ("guest", "create", "web", "--memory", "64M", "--image", "minimal")
    with run_on_terminal("--socket", str(served.path), *words) as terminal:
        terminal.until(b"creating guest web, 2 s")
        release.set()
        assert terminal.wait() == 0
        terminal.until(b"running")


def test_nothing_is_shown_without_a_terminal(served: Served, release: threading.Event) -> None:
    with subprocess.Popen(
        [*COMMAND, "--socket", str(served.path), "audit"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as command:  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(4)
        release.set()
        output, errors = command.communicate(timeout=60)
    assert output.startswith(b"PROOF")
    assert errors == b""
