"""Cache ways and memory bandwidth of a guest: a control group that has the guest's CPUs.

By CPU and not by task: whatever runs on the guest's cores fills the guest's ways only. libvirt's <cachetune> covers the vCPU
threads alone, and leaves the default group as it is, which has all ways (libvirt, src/util/virresctrl.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.errors import HostError
from orchestrator.host.cache import (
    RESCTRL,
    find_group,
    make_group,
    read_limits,
    remove_group,
    set_cpus,
    set_limits,
)
from orchestrator.host.root import HostRoot
from orchestrator.model.cache import BANDWIDTH, CacheControl, CachePlan, CacheSurvey, describe_ways, find_runs, name_group
from orchestrator.model.plan import Plan
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.values import CpuSet

DEFAULT = ""
"""Name of the group that has all CPUs and tasks which are in no other."""


@dataclass(frozen=True)
class LostWays:
    """The mask of a cache's ways that the default group loses."""

    line: str
    id: int
    lost: int


@dataclass(frozen=True)
class WaysBefore:
    lost: tuple[LostWays, ...]


@register
@dataclass(frozen=True)
class ShrinkDefaultGroup:
    """Takes a guest's ways from the default group. Undone after the last guest, since masks may not have gaps."""

    action: ClassVar[str] = "cache-default"
    plan: CachePlan

    def describe(self) -> str:
        shares = ", ".join(f"{describe_ways(share.mask)} of L{self.plan.level} cache {share.id}" for share in self.plan.shares)
        return f"take {shares} from the default control group"

    def read_before(self, host: HostRoot) -> Arguments | None:
        lost = tuple(LostWays(line, id, now & ~kept) for line, id, now, kept in self._find_masks(host))
        return to_arguments(WaysBefore(lost)) if lost else None

    def apply(self, host: HostRoot) -> None:
        limits: dict[str, dict[int, int]] = {}
        for line, id, _, kept in self._find_masks(host):
            limits.setdefault(line, {})[id] = kept
        set_limits(host, DEFAULT, limits)

    def _find_masks(self, host: HostRoot) -> Iterator[tuple[str, int, int, int]]:
        """Line, cache, present mask of the default group, and what it keeps of that; only those that lose ways."""
        survey = read_limits(host)
        control = _require_control(survey, self.plan)
        for share in self.plan.shares:
            for line in control.lines:
                if (now := survey.groups[0].find(line, share.id) or 0) & share.mask:
                    yield line, share.id, now, _keep(now & ~share.mask, control, share.id)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> str | None:
        """Gives the lost ways back, without those that another control group fills now. What another program has set in the
        meantime stays, and so does what a reboot has.
        """
        survey = read_limits(context.host)
        if survey.fault or not survey.cache:
            return None
        kept: list[str] = []
        limits: dict[str, dict[int, int]] = {}
        for before in parse_arguments(WaysBefore, arguments).lost:
            now = survey.groups[0].find(before.line, before.id)
            if now is None:  # mounted with other options, or the CPUs are offline
                continue
            free = now | before.lost & ~_find_taken(survey, survey.cache, before.id)
            wanted = free if survey.cache.sparse else next((run for run in find_runs(free) if run & now), now)
            if before.lost & ~wanted:
                kept.append(f"{before.line} {before.id}: {wanted:#x} and not {now | before.lost:#x}, as other groups have ways")
            if wanted != now:
                limits.setdefault(before.line, {})[before.id] = wanted
        set_limits(context.host, DEFAULT, limits)
        return f"default control group: {'; '.join(kept)}" if kept else None


@dataclass(frozen=True)
class GroupBefore:
    name: str


@register
@dataclass(frozen=True)
class MakeControlGroup:
    """Limits what runs on the guest's CPUs. The group is made anew if one of this name is left over."""

    action: ClassVar[str] = "cache-group"
    plan: Plan
    caches: CachePlan

    @property
    def name(self) -> str:
        return name_group(self.plan.name)

    def describe(self) -> str:
        return f"make the control group {self.name} for CPUs {CpuSet.of(self.plan.cpus)}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        cpus = CpuSet.of(self.plan.cpus)
        for group in read_limits(host).groups[1:]:
            if group.name != self.name and group.cpus.meets(cpus):
                hint = f"give that group other CPUs, or remove it if no program needs it: rmdir /{RESCTRL}/{group.name}"
                raise HostError(f"CPUs {group.cpus & cpus} are in the control group {group.name} of another program", hint)
        return to_arguments(GroupBefore(self.name))

    def apply(self, host: HostRoot) -> None:
        remove_group(host, self.name)  # of an earlier start: it may have other limits
        make_group(host, self.name)
        set_limits(host, self.name, list_limits(host, self.caches))
        set_cpus(host, self.name, CpuSet.of(self.plan.cpus))

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        remove_group(context.host, parse_arguments(GroupBefore, arguments).name)


def list_limits(host: HostRoot, plan: CachePlan) -> dict[str, dict[int, int]]:
    """Values of the schemata file by line and cache. Raises HostError if the host cannot limit caches any more."""
    survey = read_limits(host)
    limits: dict[str, dict[int, int]] = {}
    if plan.shares:
        limits = {line: {share.id: share.mask for share in plan.shares} for line in _require_control(survey, plan).lines}
    if plan.bandwidth is not None:
        unit = survey.bandwidth.unit if survey.bandwidth else None
        if unit is not plan.unit:  # mounted with other options since
            what = f"cannot limit memory bandwidth: planned in {plan.unit}, but this host limits it in {unit or 'no unit'} now"
            raise HostError(what, "delete the guest and create it again, or mount resctrl with its former options")
        limits[BANDWIDTH] = dict.fromkeys(plan.throttled, plan.bandwidth)
    return limits


def diff_group(host: HostRoot, plan: Plan) -> tuple[str, ...]:
    """What differs from the guest's part of the caches, one sentence each."""
    if plan.caches is None or plan.caches.waived:
        return ()
    name = name_group(plan.name)
    if (group := find_group(host, name)) is None:
        return (f"control group {name}: absent",)
    findings, cpus = list[str](), CpuSet.of(plan.cpus)
    if group.cpus != cpus:
        findings.append(f"control group {name}: CPUs {group.cpus or 'none'}, expected {cpus}")
    for line, limits in list_limits(host, plan.caches).items():
        findings += [
            f"control group {name}: {line} {id} is {_show(line, now)}, expected {_show(line, value)}"
            for id, value in limits.items()
            if (now := group.find(line, id)) != value
        ]
    return tuple(findings)


def _show(line: str, value: int | None) -> str:
    return "absent" if value is None else str(value) if line == BANDWIDTH else f"{value:#x}"


def _require_control(survey: CacheSurvey, plan: CachePlan) -> CacheControl:
    if survey.fault or not survey.cache or survey.cache.level != plan.level:
        why = survey.fault or f"the CPUs cannot allocate ways of L{plan.level} caches"
        raise HostError(f"cannot limit caches: {why}", "delete the guest and create it again")
    return survey.cache


def _find_taken(survey: CacheSurvey, control: CacheControl, id: int) -> int:
    taken = 0
    for group in survey.groups[1:]:
        if group.cpus or group.has_tasks:
            taken |= group.ways(control, id)
    return taken


def _keep(mask: int, control: CacheControl, id: int) -> int:
    """The widest run of neighbouring ways of the mask, or all of it where gaps are allowed."""
    found = mask if control.sparse else max(find_runs(mask), key=int.bit_count, default=0)
    if found.bit_count() < max(control.min_ways, 1):
        what = f"the default control group would keep too few ways of L{control.level} cache {id}"
        raise HostError(what, "another program has changed /sys/fs/resctrl: delete the guest and create it again")
    return found
