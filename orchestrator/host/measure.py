"""Identity of what runs on the host: the kernel, hashes of files, and whether the clock is synchronised. Reads only."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.errors import CommandError, HostError
from orchestrator.host.root import HostRoot, host_error
from orchestrator.host.run import Completed, run

# elf(5): notes of the running kernel; ld(1), --build-id.
_GNU, _BUILD_ID = b"GNU\0", 3


@dataclass(frozen=True)
class Kernel:
    release: str
    version: str
    build_id: str  # of the running kernel, in hexadecimal; empty if it has none
    file: str  # of the boot loader for this release; empty if it does not exist, as after a network boot
    file_sha256: str
    cmdline_sha256: str  # the command line may contain passwords


def read_release(host: HostRoot) -> str:
    return host.read("proc/sys/kernel/osrelease")


def read_kernel(host: HostRoot) -> Kernel:
    release = read_release(host)
    name = f"boot/vmlinuz-{release}"
    found = host.exists(name)
    cmdline = hashlib.sha256(host.read("proc/cmdline").encode()).hexdigest()
    return Kernel(
        release, host.read("proc/version"), _read_build_id(host), f"/{name}" if found else "",
        hash_file(host, name) if found else "", cmdline,
    )  # fmt: skip


def read_host_name(host: HostRoot) -> str:
    return host.read("proc/sys/kernel/hostname")


def find_program(host: HostRoot, pid: int) -> str:
    """Path of the program that a process runs, with the suffix " (deleted)" if the file was replaced (proc_pid_exe(5))."""
    path = host.target(f"proc/{pid}/exe")
    if path is None:
        raise HostError(f"process {pid} has ended")
    return path


def hash_program(host: HostRoot, pid: int) -> str:
    """SHA-256 of the program that a process runs, also if the file was replaced since."""
    return hash_file(host, f"proc/{pid}/exe")


def hash_file(host: HostRoot, name: str) -> str:
    """SHA-256 in hexadecimal."""
    try:
        with open(host.path / name, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise host_error("cannot read", name, error) from None


def read_clock(execute: Callable[[Sequence[str]], Completed] = run) -> bool:
    """Whether the kernel's clock is synchronised. Raises CommandError if systemd cannot tell.

    The manager's sandbox denies adjtimex(2) (ProtectClock=); systemd-timedated calls it.
    """
    done = execute(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    answer = done.stdout.strip()
    if answer not in ("yes", "no"):
        raise CommandError(f"cannot parse the output of timedatectl: {answer[:80]!r}")
    return answer == "yes"


def _read_build_id(host: HostRoot) -> str:
    try:
        notes = host.read_bytes("sys/kernel/notes")
    except HostError as error:
        if not os.path.exists(host.path / "sys/kernel/notes"):
            return ""
        raise error
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + (name_size + 3 & ~3)
        if kind == _BUILD_ID and notes[at + 12 : at + 12 + name_size] == _GNU:
            return notes[start : start + size].hex()
        at = start + (size + 3 & ~3)
    return ""
