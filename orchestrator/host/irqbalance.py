"""The daemon irqbalance, which sends interrupts to other CPUs by their load (irqbalance(1))."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from errno import ENOENT, ESRCH

from orchestrator.errors import HostError, RequestError
from orchestrator.host.processes import Thread
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet


@dataclass(frozen=True)
class Irqbalance:
    pid: int
    banned: CpuSet | None  # CPUs that it leaves alone; None for its default: isolated CPUs and those without a tick


def find_irqbalance(host: HostRoot, threads: Iterable[Thread]) -> tuple[Irqbalance, ...]:
    """Raises HostError if its environment cannot be read."""
    pids = sorted({thread.pid for thread in threads if thread.name == "irqbalance" and thread.tid == thread.pid})
    return tuple(found for pid in pids if (found := _read(host, pid)))


def _read(host: HostRoot, pid: int) -> Irqbalance | None:
    name = f"proc/{pid}/environ"
    try:
        words = host.read(name).split("\0")
    except HostError as error:
        if error.errno in (ENOENT, ESRCH):
            return None
        raise
    variables = dict(word.partition("=")[::2] for word in words)
    try:
        if text := variables.get("IRQBALANCE_BANNED_CPULIST"):
            return Irqbalance(pid, CpuSet.parse(text))
        if text := variables.get("IRQBALANCE_BANNED_CPUS"):
            return Irqbalance(pid, CpuSet.parse_mask(text))
    except RequestError as error:
        raise HostError(f"cannot parse the environment of irqbalance, /{name}: {error.message}") from None
    return Irqbalance(pid, None)
