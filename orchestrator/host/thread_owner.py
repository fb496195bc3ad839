"""The process of a thread, and its unit of systemd."""

from __future__ import annotations

import re
from dataclasses import dataclass
from errno import ENOENT, ESRCH

from orchestrator.errors import HostError
from orchestrator.host.cgroups import read_cgroup
from orchestrator.host.root import HostRoot

_PROCESS = re.compile(r"^Tgid:\s*(\d+)$", re.MULTILINE | re.ASCII)
_UNITS = (".service", ".scope", ".socket")


@dataclass(frozen=True)
class ThreadOwner:
    """``unit``: the innermost unit, otherwise the control group; empty for the kernel's threads."""

    pid: int
    unit: str


def find_owner(host: HostRoot, tid: int) -> ThreadOwner | None:
    """None if the thread has ended. Raises HostError if it cannot be read."""
    try:
        match = _PROCESS.search(host.read(f"proc/{tid}/status"))
        group = read_cgroup(host, tid, tid).strip("/")
    except HostError as error:
        if error.errno in (ENOENT, ESRCH):
            return None
        raise
    units = [part for part in group.split("/") if part.endswith(_UNITS)]
    return ThreadOwner(int(match[1]), units[-1] if units else group) if match else None
