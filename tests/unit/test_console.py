"""The guests' consoles: what is waited for, who answers, and when waiting is no use. With a real pty."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.console import READY, read_console, tell, wait_for
from orchestrator.errors import GuestError


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A pty with a guest behind it that answers each line in its log, as QEMU's chardev does; and that log."""
    ours, theirs = os.openpty()
    log = tmp_path / "guest.log"
    log.write_text("nohype: ready name=guest\nnohype: done mac old\n")

    def answer() -> None:
        while line := os.read(ours, 512).decode().strip():
            if line == "halt":
                return
            with log.open("a") as file:
                file.write(f"noise\nnohype: done {line}\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield Path(os.ttyname(theirs)), log
    os.write(theirs, b"halt\n")
    thread.join(5)
    os.close(theirs)
    os.close(ours)


def test_an_answer_is_what_came_after_the_question(guest: tuple[Path, Path]) -> None:
    console, log = guest
    assert tell(console, log, "mac", timeout=5) == "noise\nnohype: done mac\n"


def test_no_answer_shows_the_end_of_the_console(guest: tuple[Path, Path]) -> None:
    console, log = guest
    with pytest.raises(GuestError, match=r"did not answer 'mac' within 0.3 s; its console shows:\n    noise"):
        tell(console, log, "mac", until="never", timeout=0.3)


def test_a_guest_that_is_not_ready_yet_is_waited_for(guest: tuple[Path, Path]) -> None:
    """It would not hear what is typed: nobody reads the console before."""
    console, log = guest
    log.write_text("booting\n")
    with pytest.raises(GuestError, match="did not say that it is ready within 0.3 s"):
        tell(console, log, "mac", timeout=0.3)
    threading.Timer(0.3, lambda: log.write_text("booting\nnohype: ready name=guest\n")).start()
    assert tell(console, log, "mac", timeout=5) == "noise\nnohype: done mac\n"


def test_a_guest_whose_log_was_put_aside_is_ready(guest: tuple[Path, Path]) -> None:
    console, log = guest
    log.rename(f"{log}.0")
    assert tell(console, log, "mac", timeout=5) == "noise\nnohype: done mac\n"


def test_no_console(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="cannot open the guest's console"):
        tell(tmp_path / "pty", tmp_path / "log", "mac", timeout=1)


def test_ready_is_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("boot\nnohype: ready name=one cp")
    with pytest.raises(GuestError, match="did not get ready"):
        wait_for(log, READY, "get ready", timeout=0.3)
    log.write_text("boot\nnohype: ready name=one cpus=2\n")
    assert wait_for(log, READY, "get ready", timeout=0.3).endswith("cpus=2\n")


def test_a_guest_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(GuestError, match="has ended before it could get ready"):
        wait_for(tmp_path / "none", READY, "get ready", timeout=60, alive=lambda: False)
    assert time.monotonic() - start < 30


def test_a_log_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("nohype: done mac\n")
    assert wait_for(log, "^nohype: done .*$", "answer", since=10_000, timeout=1) == "nohype: done mac\n"


def test_nothing_that_a_guest_prints_moves_the_readers_cursor(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("nohype: ready \x1b]0;title\x07 \x9b2J\u202e\x00 ä\tb\n")
    assert read_console(log) == "nohype: ready \ufffd]0;title\ufffd \ufffd2J\ufffd\ufffd ä\tb\n"


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_console(tmp_path / "none") == ""
