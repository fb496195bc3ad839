"""Identity of what runs, on the real kernel."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.measure import find_program, hash_file, hash_program, read_host_name, read_kernel
from orchestrator.host.root import HostRoot

KERNEL = HostRoot()


def test_kernel_of_this_machine() -> None:
    kernel = read_kernel(KERNEL)
    assert kernel.release == platform.release()
    assert kernel.version.startswith("Linux version ")
    assert re.fullmatch(r"([0-9a-f]{40})?", kernel.build_id)
    assert bool(kernel.build_id) == os.path.exists("/sys/kernel/notes")
    assert bool(kernel.file) == bool(kernel.file_sha256) == os.path.exists(f"/boot/vmlinuz-{kernel.release}")
    assert kernel.cmdline_sha256 == hashlib.sha256(Path("/proc/cmdline").read_bytes().strip()).hexdigest()


def test_host_name_of_this_machine() -> None:
    assert read_host_name(KERNEL) == platform.node()


def test_program_of_this_process() -> None:
    path = os.path.realpath(sys.executable)
    assert find_program(KERNEL, os.getpid()) == path
    assert hash_program(KERNEL, os.getpid()) == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_program_of_no_process_is_an_error() -> None:
    with pytest.raises(HostError, match="has ended"):
        find_program(KERNEL, 2**22 + 1)
    with pytest.raises(HostError, match="No such file"):
        hash_file(KERNEL, "nowhere")
