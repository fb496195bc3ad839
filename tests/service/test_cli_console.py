"""`nohype guest console` on a real terminal: keys and output pass, and the terminal is left as it was, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.model.access import OPERATOR
from tests.harness.api_server import Served, serve
from tests.harness.guests import until
from tests.harness.terminal import COMMAND, Terminal, run_on_terminal

GOOD = {"name": "web", "memory": "64M", "image": "minimal"}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        served.world.hypervisor.watch_ends(served.manager.reconciler.on_guest_ended)
        served.client.create(GOOD)
        served.world.hypervisor.write("web", b"booted\r\n")
        yield served


@pytest.fixture
def guest(served: Served) -> Iterator[int]:
    """The guest's side of its console."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    served.world.hypervisor.ptys["web"] = Path(os.ttyname(theirs))
    yield ours
    os.close(theirs)
    os.close(ours)


@pytest.fixture
def terminal(served: Served) -> Iterator[Terminal]:
    with run_on_terminal("--socket", str(served.path), "guest", "console", "web") as terminal:
        terminal.until(b"booted")
        until(lambda: terminal.is_raw)
        yield terminal


def run(served: Served, *words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, "--socket", str(served.path), "guest", "console", *words],
        input=input,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_keys_and_output_pass_until_the_escape_key(served: Served, guest: int, terminal: Terminal) -> None:
    terminal.type(b"ls\r\x03\x04\x1a")
    assert read(guest, 6) == b"ls\r\x03\x04\x1a", "Ctrl-C, Ctrl-D and Ctrl-Z are the guest's"
    served.world.hypervisor.write("web", b"\x1b[32mfile\x1b]52;c;aGk=\x07\x1b[6n\r\n")
    terminal.until(b"\x1b[32mfile\r\n")
    terminal.type(b"last\x1dnot sent")
    assert terminal.wait() == 0
    assert read(guest, 4) == b"last"
    assert terminal.mode == terminal.before
    assert b"console of guest web; leave with Ctrl-]" in terminal.shown
    assert terminal.shown.endswith(b"\x1b[m"), "colours are changed back"
    assert b"\x1b[6n" not in terminal.shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_terminal_is_restored_after_a_signal(terminal: Terminal, number: signal.Signals) -> None:
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    assert terminal.mode == terminal.before


def test_terminal_is_restored_while_suspended(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTSTP)
    until(lambda: terminal.mode == terminal.before)
    terminal.process.send_signal(signal.SIGCONT)
    until(lambda: terminal.is_raw)
    terminal.type(b"\x1d")
    assert terminal.wait() == 0
    assert terminal.mode == terminal.before


@pytest.mark.parametrize("end", ["kill", "delete", "manager"])
def test_end_of_the_guest_ends_the_command(served: Served, terminal: Terminal, end: str) -> None:
    if end == "manager":
        served.server.should_exit = True
        terminal.type(b"\x1d")
        assert terminal.wait() == 0, "it waits for the manager until the user leaves"
    else:
        getattr(served.client, end)("web")
        assert terminal.wait() == 1
        text = {"kill": b"nohype: guest web has ended", "delete": b"nohype: guest web ended or was replaced"}[end]
        assert text in terminal.shown
    assert terminal.mode == terminal.before


def test_history_alone_needs_no_terminal(served: Served) -> None:
    served.world.hypervisor.write("web", b"\x1b]0;title\x07one\r\ntwo\r\n")
    done = run(served, "web", "--no-follow", "--history", "2")
    assert (done.returncode, done.stdout) == (0, b"one\r\ntwo\r\n")
    assert run(served, "web", "--no-follow", "--history", "2", "--raw").stdout == b"\x1b]0;title\x07one\r\ntwo\r\n"
    served.client.kill("web")
    assert run(served, "web", "--no-follow", "--history", "1").stdout == b"two\r\n"
    done = run(served, "web", "--history", "1")
    assert (done.returncode, done.stdout) == (1, b"two\r\n")
    assert b"nohype: guest web is stopped\n  hint: start it: nohype guest start web" in done.stderr


def test_input_comes_from_a_pipe_too(served: Served, guest: int) -> None:
    with subprocess.Popen(
        [*COMMAND, "--socket", str(served.path), "guest", "console", "web"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"typed\x1d")
        process.stdin.close()
        assert read(guest, 6) == b"typed\x1d", "in a pipe the escape key is a byte as any other"
        served.world.hypervisor.write("web", b"reply\n")
        seen = b""
        while b"reply" not in seen:
            seen += process.stdout.read1()
        process.terminate()


def test_reader_of_the_output_that_ends_is_no_error(served: Served) -> None:
    with subprocess.Popen(
        [*COMMAND, "--socket", str(served.path), "guest", "console", "web", "--no-input"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        served.world.hypervisor.write("web", b"more\n")
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("web", "--escape", "xy"), b"'xy' is not a character, ^ followed by a character, or none"),
        (("web", "--escape", "\u00e4"), b"is not a character"),
        (("web", "--history", "-1"), b"--history"),
    ],
)
def test_wrong_options_are_usage_errors(served: Served, words: tuple[str, ...], message: bytes) -> None:
    done = run(served, *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_unknown_guest_is_a_clear_error(served: Served) -> None:
    done = run(served, "nix")
    assert done.returncode == 1
    assert done.stderr.startswith(b"nohype: no guest named nix")
    assert served.manager.guest(OPERATOR, "web").state == "running"


def read(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(descriptor, size - len(data))
    return data
