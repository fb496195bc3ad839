"""What powers CPUs down: governors and idle states (Documentation/admin-guide/pm/cpufreq.rst, cpuidle.rst). Reads only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from errno import ENODEV

from orchestrator.errors import HostError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

_CPUS = "sys/devices/system/cpu"
_POLICY = re.compile(r"policy\d+", re.ASCII)
_STATE = re.compile(r"state(\d+)", re.ASCII)


@dataclass(frozen=True)
class IdleState:
    name: str
    latency: int  # µs until the CPU executes again


def read_governors(host: HostRoot) -> dict[str, CpuSet] | None:
    """The CPUs of each governor; the governor "" for those whose policy does not tell it. Empty without a driver that scales,
    None if the kernel does not show it.
    """
    if not host.exists(f"{_CPUS}/cpufreq"):
        return None
    found: dict[str, CpuSet] = {}
    for name in host.names(f"{_CPUS}/cpufreq"):
        folder = f"{_CPUS}/cpufreq/{name}"
        if _POLICY.fullmatch(name):
            governor = host.find(f"{folder}/scaling_governor") or ""
            cpus = parse_cpus(f"{folder}/affected_cpus", ",".join((host.find(f"{folder}/affected_cpus") or "").split()))
            found[governor] = found.get(governor, CpuSet()) | cpus
    return found


def read_idle_states(host: HostRoot, cpu: int) -> tuple[IdleState, ...] | None:
    """Those that the CPU may enter, the deepest last; None if the kernel does not show them.

    A limit of all CPUs (PM QoS, /dev/cpu_dma_latency) is not considered: see ``read_latency_limit``.
    """
    folder = f"{_CPUS}/cpu{cpu}/cpuidle"
    if not host.exists(folder):
        # Without a driver for idle states there is the folder of the subsystem only.
        return () if (host.find(f"{_CPUS}/cpuidle/current_driver") or "") == "none" else None
    numbers = sorted(int(match[1]) for match in map(_STATE.fullmatch, host.names(folder)) if match)
    return tuple(
        IdleState(host.read(f"{folder}/state{number}/name"), _read_number(host, f"{folder}/state{number}/latency"))
        for number in numbers
        if (host.find(f"{folder}/state{number}/disable") or "0") == "0"
    )


def read_latency_limit(host: HostRoot) -> int | None:
    """µs that programs allow (tuned's force_latency); None if it cannot be read. Reading changes no limit.

    kernel/power/qos.c, cpu_latency_qos_read(): four bytes in the order of the machine.
    """
    try:
        data = host.read_bytes("dev/cpu_dma_latency")
    except HostError:
        return None
    return int.from_bytes(data, "little", signed=True) if len(data) == 4 else None


def _read_number(host: HostRoot, name: str) -> int:
    text = host.read(name)
    if not text.isdecimal():
        raise HostError(f"cannot parse /{name}: {text!r} is not a number", errno=ENODEV)
    return int(text)
