"""What happened between two readings of the host. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.client.host_shapes import GuestActivity, Host, VcpuActivity
from orchestrator.model.exit_reasons import group_by_class


@dataclass(frozen=True)
class VcpuRates:
    """Per second, between two readings; None for what was not measured.

    Attributes:
        cpu: the CPU that the vCPU is planned on.
        ran, waited: seconds per second.
        reasons, classes: VM exits by reason, and by class of reasons.
    """

    cpu: int
    ran: float | None = None
    waited: float | None = None
    reasons: Mapping[str, float] | None = None
    classes: Mapping[str, float] | None = None

    @property
    def exits(self) -> float | None:
        return None if self.reasons is None else sum(self.reasons.values())


@dataclass(frozen=True)
class OtherRate:
    """A thread that ran on a guest's cores between two readings. ``slices``: time slices per second, on all of these cores."""

    name: str
    tid: int
    pid: int | None
    unit: str
    slices: float

    def __str__(self) -> str:
        return f"{describe_thread(self.name, self.tid, self.pid, self.unit)} {self.slices:.1f}/s"


def describe_thread(name: str, tid: int, pid: int | None, unit: str) -> str:
    """``pid`` is None for a thread that has ended."""
    process = "" if pid in (None, tid) else f" of process {pid}"
    return f"{name} ({tid}{process}{', ended' if pid is None else ''}{f', {unit}' if unit else ''})"


def measure_rates(before: Host | None, after: Host) -> dict[str, tuple[VcpuRates, ...]]:
    """By guest, one per vCPU. A guest that has changed in between (a restart begins new threads) has no rates."""
    seconds, old = _find_earlier(before, after)
    found = {}
    for one in after["activity"]:
        earlier = old[one["guest"]]["vcpus"] if one["guest"] in old else []
        if len(earlier) != len(one["vcpus"]):
            found[one["guest"]] = tuple(VcpuRates(vcpu["cpu"]) for vcpu in one["vcpus"])
        else:
            found[one["guest"]] = tuple(_compare(*pair, seconds) for pair in zip(earlier, one["vcpus"], strict=True))
    return found


def measure_others(before: Host | None, after: Host) -> dict[str, tuple[OtherRate, ...] | None]:
    """By guest the threads that ran on its cores, the most frequent first; None if not measured."""
    seconds, old = _find_earlier(before, after)
    return {one["guest"]: _compare_others(old.get(one["guest"]), one, seconds) for one in after["activity"]}


def _find_earlier(before: Host | None, after: Host) -> tuple[float, dict[str, GuestActivity]]:
    """The seconds between two readings, and the first one of those guests that have not changed since."""
    if before is None or (seconds := after["clock"] - before["clock"]) <= 0:
        return 0.0, {}
    versions = {guest["name"]: guest["version"] for guest in before["guests"]}
    same = {guest["name"] for guest in after["guests"] if versions.get(guest["name"]) == guest["version"]}
    return seconds, {one["guest"]: one for one in before["activity"] if one["guest"] in same}


def _compare_others(before: GuestActivity | None, after: GuestActivity, seconds: float) -> tuple[OtherRate, ...] | None:
    if before is None or before["others"] is None or after["others"] is None:
        return None
    old = {(one["cpu"], one["tid"], one["name"]): one["count"] for one in before["others"]}
    grown: dict[tuple[int, str], int] = {}
    threads = {(one["tid"], one["name"]): one for one in after["others"]}
    for one in after["others"]:
        growth = one["count"] - old.pop((one["cpu"], one["tid"], one["name"]), 0)
        grown[one["tid"], one["name"]] = grown.get((one["tid"], one["name"]), 0) + growth
        if growth < 0:
            return None
    if old:  # the kernel's histogram was begun anew: it loses no entries otherwise
        return None
    rates = (
        OtherRate(name, tid, threads[tid, name]["pid"], threads[tid, name]["unit"], count / seconds)
        for (tid, name), count in grown.items()
        if count
    )
    return tuple(sorted(rates, key=lambda rate: -rate.slices))


def _compare(before: VcpuActivity, after: VcpuActivity, seconds: float) -> VcpuRates:
    old, new = before["exits"], after["exits"]
    reasons = None if old is None or new is None else _subtract(old, new, seconds)
    # A count that fell: the kernel's histogram was begun anew.
    if reasons is None or old is None or new is None or min(reasons.values(), default=0) < 0:
        reasons = classes = None
    else:
        classes = _subtract(group_by_class(old), group_by_class(new), seconds)
    ran, waited = _rate(before["ran"], after["ran"], seconds), _rate(before["waited"], after["waited"], seconds)
    return VcpuRates(after["cpu"], ran, waited, reasons, classes)


def _subtract(old: Mapping[str, int], new: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {name: (new.get(name, 0) - old.get(name, 0)) / seconds for name in {**old, **new}}


def _rate(old: float | None, new: float | None, seconds: float) -> float | None:
    return None if old is None or new is None or new < old else (new - old) / seconds
