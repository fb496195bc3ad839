"""What a program in the sandbox can reach, with programs that try."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images import sandbox
from orchestrator.images.sandbox import Limits, Output, run_confined
from orchestrator.waiting import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a sandbox needs root")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    (folder / "image").write_text("content")
    return folder


def shell(folder: Path, script: str, **options: object) -> Output:
    return run_confined(folder, ["sh", "-c", script], **options)  # type: ignore[arg-type]


def test_program_sees_usr_and_its_folder_only(folder: Path) -> None:
    assert shell(folder, "echo /*").stdout.split() == ["/bin", "/dev", "/lib", "/lib64", "/out", "/sbin", "/usr", "/work"]
    assert shell(folder, "cat image").stdout == ""  # the program starts in /
    assert shell(folder, "cat /work/image").stdout == "content"
    assert list(folder.parent.iterdir()) == [folder]  # nothing is left


@pytest.mark.parametrize("path", ["/etc/shadow", "/proc/1/status", "/old/etc/shadow", "/dev/mem", "/sys/kernel", "/run", "/home"])
def test_file_of_the_host_is_out_of_reach(folder: Path, path: str) -> None:
    assert "No such file" in shell(folder, f"ls {path}").stderr


def test_program_has_no_privileges(folder: Path) -> None:
    assert shell(folder, "id -u; id -g").stdout.split() == ["65534", "65534"]
    for command in ("unshare --user true", "unshare --mount true", "chroot / true", "mount --bind /usr /work"):
        assert shell(folder, f"{command} 2>/dev/null && echo allowed").stdout == ""
    program = "import ctypes, os; print(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))"  # PR_GET_NO_NEW_PRIVS
    assert run_confined(folder, ["python3", "-c", program]).stdout.strip() == "1"


def test_program_has_no_network_and_no_other_processes(folder: Path) -> None:
    program = """
import os, socket
try:
    socket.socket().connect(("127.0.0.1", 22))
except OSError as error:
    print(error.errno == 101)
print(socket.if_nameindex())
print(os.getppid() < 10)
"""
    assert run_confined(folder, ["python3", "-c", program]).stdout.split("\n")[:3] == ["True", "[(1, 'lo')]", "True"]


@pytest.mark.parametrize("path", ["/work/new", "/work/image", "/usr/new", "/new", "/out/new"])
@pytest.mark.parametrize("writable", [True, False])
def test_program_cannot_write(folder: Path, path: str, *, writable: bool) -> None:
    done = shell(folder, f"echo x >{path}", writable=writable)
    assert done.status
    assert sorted(file.name for file in folder.iterdir()) == ["image"]


def test_program_writes_the_files_that_are_given_to_it(folder: Path) -> None:
    target = folder / "target"
    target.touch(0o600)
    os.chown(target, sandbox.USER, sandbox.USER)
    assert not shell(folder, "echo x >/work/target", writable=True).status
    assert target.read_text() == "x\n"
    assert shell(folder, "echo y >/work/target").status  # read-only otherwise


def test_output_goes_into_a_file(folder: Path) -> None:
    assert shell(folder, "echo text; echo problem >&2; exit 3", output="out") == Output(3, "", "problem\n")
    assert (folder / "out").read_text() == "text\n"


def test_environment_is_not_inherited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOHYPE_TOKEN", "secret")
    assert "secret" not in shell(folder, "env").stdout


@pytest.mark.parametrize("output", [None, "out"])
def test_endless_output_is_stopped(folder: Path, output: str | None) -> None:
    with pytest.raises(ImageError, match=r"reached its limit of output"):
        run_confined(folder, ["yes"], limits=Limits(output=100_000), output=output)


def test_endless_messages_are_cut(folder: Path) -> None:
    program = "import sys\nfor _ in range(100): sys.stderr.write('x' * 9999 + '\\n')"
    assert len(run_confined(folder, ["python3", "-c", program]).stderr) <= 65536


def test_endless_loop_is_stopped(folder: Path) -> None:
    with pytest.raises(ImageError, match="limit of CPU time"):
        shell(folder, "while :; do :; done", limits=Limits(seconds=1))


def test_memory_is_limited(folder: Path) -> None:
    done = run_confined(folder, ["python3", "-c", "x = bytearray(300 << 20)"])
    assert "MemoryError" in done.stderr


def test_killed_program_is_reported(folder: Path) -> None:
    with pytest.raises(ImageError, match="sh was killed by SIGSEGV"):
        shell(folder, "kill -SEGV $$")


def test_programs_end_with_the_caller(folder: Path) -> None:
    """Also after SIGKILL."""
    program = (
        "import sys; from pathlib import Path; from orchestrator.images.sandbox import Limits, run_confined\n"
        "run_confined(Path(sys.argv[1]), ['sh', '-c', 'echo started; sleep 4711'], output='out')"
    )
    caller = subprocess.Popen([sys.executable, "-c", program, str(folder)])
    out = folder / "out"
    wait_until(lambda: out.exists() and out.read_text() == "started\n", timeout=60, interval=0.05)
    assert find("4711")
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    wait_until(lambda: not find("4711"), timeout=60, interval=0.05)
    assert not find("4711")


def find(word: str) -> str:
    return subprocess.run(["pgrep", "-f", f"sleep {word}"], capture_output=True, text=True, check=False).stdout


def test_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="qemu-img") as error:
        sandbox.check_programs()
    assert "apt-get install e2fsprogs mtools qemu-utils" in error.value.hint
