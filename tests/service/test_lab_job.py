"""`nohype lab run` with a stand-in for QEMU: exit statuses, files, and that nothing is left however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import LabError
from orchestrator.lab import control
from orchestrator.lab.lab import keeping_connection
from orchestrator.lab.paths import LabDir, is_locked
from orchestrator.lab.progress import Timeline
from orchestrator.lab.server import LabServer
from tests.service.test_lab_control import ROOT, assert_nothing_left, name, parts, stand_in, wait_until

__all__ = ["name", "stand_in"]

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

# The command itself, with images that are not built. The stand-in runs commands on this machine: files go to another folder.
PROGRAM = """
import functools, sys
from pathlib import Path
from orchestrator.cli import lab
from orchestrator.cli.main import main
from orchestrator.errors import LabError
from orchestrator.lab import control
from orchestrator.lab.lab import keeping_connection
from tests.service.test_lab_control import parts
name, folder = sys.argv[1], Path(sys.argv[2])
lab.job_lab = lambda server, timeline: control.attached(name, parts(folder), timeline)
lab.Files = functools.partial(lab.Files, remote=str(folder / "remote"))
sys.argv[1:] = ["lab", "run", *sys.argv[3:]]
main()
"""


def wait_for_end(name: str) -> str:
    """Shell that runs as long as the lab exists: the stand-in does not end what it runs."""
    return f"while [ -e {LabDir(name).lock} ]; do sleep 0.1; done"


@contextmanager
def running(name: str, tmp_path: Path, *words: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", PROGRAM, name, str(tmp_path), *words]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    process = subprocess.Popen(argv, cwd=ROOT, text=True, start_new_session=True, **settings)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(name: str, tmp_path: Path, *words: str, **options: object) -> tuple[int, str, str]:
    with running(name, tmp_path, *words, **options) as process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    assert_nothing_left(name)
    return process.returncode, out, err


def test_status_and_output_are_those_of_the_command(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    status, out, err = run(name, tmp_path, "--", "echo out; echo err >&2; cat; exit 7")
    assert (status, out) == (7, "out\n")
    assert "err\n" in err


def test_words_and_input_reach_the_command(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    (tmp_path / "input").write_text("typed\n")
    with (tmp_path / "input").open() as file:
        status, out, _ = run(name, tmp_path, "--stdin", "--", "sh", "-c", 'cat; echo "$1"', "x", "a  b", stdin=file)
    assert (status, out) == (0, "typed\na  b\n")


def test_input_that_stays_open_delays_neither_output_nor_timeout(
    name: str, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    words = ("--stdin", "--timeout", "5", "--", f"head -n 1; {wait_for_end(name)}")
    with running(name, tmp_path, *words, stdin=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("typed\n")
        process.stdin.flush()
        assert process.stdout.readline() == "typed\n"
        assert process.wait(60) == 124


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    for path in ("kept", "changed", "removed", "sub/touched", "sub/moved"):
        (work / path).write_text(f"{path}\n")
    return work


CHANGE = """
cat kept; echo new > changed; rm removed; echo x > fresh; mkdir -p out/deep; echo y > out/deep/file; ln -s fresh link
mv sub renamed; touch -d @0 renamed/touched; exit 3
"""


def test_changed_and_new_files_come_back(name: str, tmp_path: Path, work: Path, stand_in: Callable[[str], None]) -> None:
    before = (work / "kept").stat().st_ino
    status, out, err = run(name, tmp_path, "--copy", str(work), "--", CHANGE)
    assert (status, out) == (3, "kept\n")
    # changed, fresh, out/deep/file, link, renamed/touched, renamed/moved
    assert f"6 changed or new files were copied to {work}" in err
    assert (work / "changed").read_text() == "new\n"
    assert (work / "out/deep/file").read_text() == "y\n"
    assert (work / "link").readlink() == Path("fresh")
    assert (work / "renamed/moved").read_text() == "sub/moved\n"
    assert (work / "renamed/touched").stat().st_mtime == 0
    assert (work / "removed").read_text() == "removed\n", "files are not removed here"
    assert (work / "kept").stat().st_ino == before, "it has not changed"


def test_files_come_back_to_another_folder(name: str, tmp_path: Path, work: Path, stand_in: Callable[[str], None]) -> None:
    status, _, _ = run(name, tmp_path, "--copy", str(work), "--output", str(tmp_path / "a" / "b"), "echo x > fresh; rm kept")
    assert status == 0
    assert [path.name for path in (tmp_path / "a" / "b").rglob("*")] == ["fresh"]
    assert sorted(path.name for path in work.iterdir()) == ["changed", "kept", "removed", "sub"]


def test_server_of_the_fixture_runs_commands_and_copies_files(
    name: str, tmp_path: Path, work: Path, stand_in: Callable[[str], None]
) -> None:
    remote = tmp_path / "remote"
    with control.attached(name, parts(tmp_path), Timeline()) as lab, keeping_connection(lab) as connected:
        server = LabServer(connected)
        server.copy(work, str(remote / "work"))
        server.copy(work / "kept", str(remote / "file"))
        assert server.run("cat", str(remote / "work" / "sub" / "moved"), str(remote / "file")).stdout == "sub/moved\nkept\n"
        server.fetch(str(remote / "work"), tmp_path / "back")
        server.fetch(str(remote / "file"), tmp_path / "back")
        assert (server.run("exit 4", check=False).status, server.run("cat", input=b"x").stdout) == (4, "x")
        with pytest.raises(LabError, match="'exit 5' in lab .* exited with status 5"):
            server.run("exit 5")
        with pytest.raises(LabError, match="neither a file nor a folder"):
            server.copy(tmp_path / "no", "/root/no")
        with pytest.raises(LabError, match="neither a file, a folder nor a symbolic link"):
            server.fetch(str(remote / "no"), tmp_path / "back")
    assert (tmp_path / "back" / "work" / "sub" / "moved").read_text() == "sub/moved\n"
    assert (tmp_path / "back" / "file").read_text() == "kept\n"
    assert_nothing_left(name)


def test_command_that_hangs_is_stopped(name: str, tmp_path: Path, work: Path, stand_in: Callable[[str], None]) -> None:
    status, out, err = run(
        name, tmp_path, "--copy", str(work), "--timeout", "2", "--", f"echo begun | tee log; {wait_for_end(name)}"
    )
    assert (status, out) == (124, "begun\n")
    assert "the command was stopped after 2 s" in err
    assert (work / "log").read_text() == "begun\n", "the files come back nevertheless"


@pytest.mark.parametrize(
    ("mode", "words", "status", "message"),
    [
        ("die", ("true",), 125, "QEMU exited immediately with status 1"),
        ("", ("--copy", "/nonexistent", "true"), 125, "/nonexistent is not a directory"),
        ("", ("--copy", "/etc/hostname", "true"), 125, "/etc/hostname is not a directory"),
        ("", ("--output", "/tmp", "true"), 2, "--output requires --copy"),
        ("", ("--spec", "nonsense", "true"), 125, "no lab spec named 'nonsense'"),
        ("", (), 2, "Missing argument"),
        (
            "",
            ("kill -KILL $(cat /run/nohype-lab/NAME/state.json | sed -n 's/.*\"qemu\": //p' | tr -d ,); sleep 60",),
            3,
            "is lost",
        ),
    ],
)
def test_failure_of_the_lab_has_its_own_status(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], mode: str, words: tuple[str, ...], status: int, message: str
) -> None:
    stand_in(mode)
    found, _, err = run(name, tmp_path, *(word.replace("NAME", name) for word in words))
    assert (found, message in err) == (status, True), err


def test_closed_streams_are_not_used(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    argv = [sys.executable, "-c", PROGRAM, name, str(tmp_path), "--stdin", "--", "cat; echo out; exit 7"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    assert (done.returncode, "Traceback" in done.stderr) == (7, False), done.stderr
    assert_nothing_left(name)


def test_output_that_cannot_be_written_is_one_error(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    with open("/dev/full", "wb") as full:
        status, _, err = run(name, tmp_path, "--", f"echo out; {wait_for_end(name)}", stdout=full)
    assert (status, "No space left on device" in err) == (125, True), err


@pytest.mark.parametrize("mode", ["mute", ""], ids=["boot", "command"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_job_leaves_nothing(
    name: str, tmp_path: Path, stand_in: Callable[[str], None], number: signal.Signals, mode: str
) -> None:
    """Also of the program: the stand-in runs it on this machine."""
    stand_in(mode)
    begun = tmp_path / "begun"
    with running(name, tmp_path, "--", f"touch {begun}; {wait_for_end(name)}") as process:
        wait_until(begun.exists if not mode else LabDir(name).state.exists, "it has begun")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    wait_until(lambda: not LabDir(name).lock.exists(), "the keeper has cleaned up")
    assert_nothing_left(name)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    assert (f"interrupted by {number.name}" in err) == (number != signal.SIGKILL)


def test_signal_that_is_ignored_stays_ignored(name: str, tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go-on"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(name, tmp_path, "--", f"touch {begun}; until [ -e {go_on} ]; do sleep 0.1; done; exit 5") as process:
            wait_until(begun.exists, "it has begun")
            process.send_signal(signal.SIGHUP)
            go_on.touch()
            process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.returncode == 5


def test_leftovers_of_a_job_that_was_killed_with_its_keeper_are_removed(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    name = f"run-{os.getpid():08x}"
    with running(name, tmp_path, "--", f"touch {tmp_path}/begun; {wait_for_end(name)}") as process:
        wait_until((tmp_path / "begun").exists, "it has begun")
        for pid in (process.pid, control.find_lab(name).state.pid):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_locked(LabDir(name)), "its keeper has ended")  # a killed process needs a moment
    assert LabDir(name).path.exists()
    control.remove_dead(re.compile("run-other"), print)
    assert LabDir(name).path.exists()
    control.remove_dead(re.compile(name), pytest.fail)
    assert_nothing_left(name)
