"""The host role's module that lists guests: of QEMU with and without libvirt, and of other programs with KVM."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.images.wheels import source_tree

_SPEC = importlib.util.spec_from_file_location(
    "nohype_guests", source_tree() / "ansible/roles/nohype_host/library/nohype_guests.py"
)
assert _SPEC
assert _SPEC.loader
GUESTS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(GUESTS)


def add(proc: Path, pid: int, program: str, *words: str, opened: str = "/dev/null") -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "fd/0").symlink_to(opened)
    if program:  # a kernel thread has none
        (folder / "exe").symlink_to(program)
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))


@pytest.mark.parametrize(
    ("program", "words", "opened", "found"),
    [
        ("/usr/bin/qemu-system-x86_64", ["-name", "guest=web,debug-threads=on"], "/dev/null", "qemu-system-x86_64, web"),
        ("/usr/bin/qemu-system-aarch64", ["-name", "web"], "/dev/null", "qemu-system-aarch64, web"),
        ("/usr/libexec/qemu-kvm", [], "/dev/null", "qemu-kvm"),
        ("/usr/bin/qemu-system-x86_64 (deleted)", ["-machine", "q35"], "/dev/null", "qemu-system-x86_64"),
        ("/opt/firecracker", ["-name", "other"], "anon_inode:kvm-vm", "firecracker"),
        ("/usr/bin/qemu-system-x86_64", ["-machine", "none,accel=kvm:tcg"], "anon_inode:kvm-vm", None),
        ("/usr/bin/qemu-img", [], "/dev/null", None),
        ("/usr/bin/vim", ["qemu-system-x86_64"], "anon_inode:[eventpoll]", None),
        ("", [], "anon_inode:kvm-vm", None),
    ],
    ids=[
        "libvirt",
        "by hand",
        "Red Hat",
        "after an upgrade",
        "no QEMU",
        "probe",
        "a tool",
        "a file",
        "kernel",
    ],
)
def test_processes_with_a_guest_are_found(tmp_path: Path, program: str, words: list[str], opened: str, found: str | None) -> None:
    add(tmp_path, 7, "/usr/bin/sh")
    add(tmp_path, 1042, program, "argv0", *words, opened=opened)
    (tmp_path / "self").mkdir()
    assert GUESTS.find_guests(tmp_path) == ([f"1042 ({found})"] if found else [])


def test_a_running_process_is_found_by_its_program(tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-x86_64"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            (proc := tmp_path / "proc").mkdir()
            (proc / str(process.pid)).symlink_to(f"/proc/{process.pid}")
            (proc / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
            assert GUESTS.find_guests(proc) == [f"{process.pid} (qemu-system-x86_64)"]
        finally:
            process.kill()
    assert GUESTS.find_guests(proc) == []
