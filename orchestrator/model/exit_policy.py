"""Exit policies: how many VM exits of each reason a vCPU may cause after its guest's boot, and what happens beyond. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from orchestrator.model.exit_names import SVM, VMX
from orchestrator.model.exit_reasons import CLASSES

ALL, OTHERS, MMIO = "all", "others", "mmio"
"""Rules of all exits, of those that no other rule names, and of accesses to memory of emulated devices (on SVM an `npf`, too)."""

_LIMIT, _UNITS = re.compile(r"(\d{1,10})/(s|min)", re.ASCII), {"s": "second", "min": "minute"}
_SECOND, _MINUTE = 1.0, 60.0
_MAX = 10**9


class VcpuClass(StrEnum):
    APPLICATION = "application"
    HOUSEKEEPING = "housekeeping"


class Reaction(StrEnum):
    """What happens to a guest that exceeds a budget, from the mildest."""

    REPORT = "report"
    PAUSE = "pause"
    KILL = "kill"


class Budget(BaseModel):
    """Exits of one vCPU; None for no limit. A budget without limits allows the reason. Text is read too: "10/s,60/min", "any"."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    second: Annotated[int, Field(ge=0, le=_MAX)] | None = None
    minute: Annotated[int, Field(ge=0, le=_MAX)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse_text(cls, given: object) -> object:
        if not isinstance(given, str) or given == "any":
            return {} if given == "any" else given
        parts = [_LIMIT.fullmatch(part) for part in given.split(",")]
        limits = {_UNITS[part[2]]: int(part[1]) for part in parts if part}
        if len(limits) != len(parts):
            raise ValueError(f'{given!r} is not a budget such as "10/s", "60/min", "10/s,60/min" or "any"')
        return limits


def _check_rule(name: str) -> str:
    if name in (ALL, OTHERS, MMIO) or name in CLASSES or name in SVM or name in VMX:
        return name
    known = (
        f"{ALL}, {OTHERS}, {MMIO}; classes: {', '.join(CLASSES)}; SVM: {', '.join(sorted(SVM))}; VMX: {', '.join(sorted(VMX))}"
    )
    raise ValueError(f"unknown exit reason; known are {known}")


Rules = dict[Annotated[str, Field(max_length=64), AfterValidator(_check_rule)], Budget]
"""Budgets by KVM's name of a reason (SVM or VMX), by a class of `exit_reasons.CLASSES`, or by ``ALL``, ``OTHERS``, ``MMIO``."""


class ExitBudgets(BaseModel):
    """An exit policy. It is judged once a guest's boot is over, and only on what the kernel has counted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    # What happens to a guest that exceeds a budget.
    action: Annotated[Reaction, Field(strict=False)] = Reaction.REPORT
    # The boot counts as over after so many seconds: a guest cannot escape the policy by never ending it.
    # Without it: no limit.
    boot_seconds: Annotated[int, Field(gt=0, le=86_400)] | None = None
    # Budgets of vCPUs for applications, by exit reason, class, "all", "others" or "mmio": "10/s", "10/s,60/min" or "any".
    application: Annotated[Rules, Field(max_length=64)] = {}
    # The same for vCPUs of the guest's own housekeeping.
    housekeeping: Annotated[Rules, Field(max_length=64)] = {}

    def rules(self, kind: VcpuClass) -> Mapping[str, Budget]:
        return self.application if kind is VcpuClass.APPLICATION else self.housekeeping

    @property
    def is_urgent(self) -> bool:
        """Must be judged every second: a budget is per second, or the guest is to be stopped."""
        budgets = (*self.application.values(), *self.housekeeping.values())
        return bool(budgets) and (self.action is not Reaction.REPORT or any(one.second is not None for one in budgets))

    @property
    def is_empty(self) -> bool:
        return not (self.application or self.housekeeping)


_NONE, _FREE = Budget(minute=0), Budget()
DEFAULT_POLICY = ExitBudgets(
    application={ALL: Budget(minute=60), "io": _NONE, MMIO: _NONE},
    # "memory" is the first access to each page, besides accesses to devices, which MMIO counts.
    housekeeping={name: _FREE for name in ("msr", "interrupt", "interrupt window", "halt", "apic", "memory")}
    | {"io": _NONE, MMIO: _NONE, OTHERS: _NONE},
)
"""For guests of images that disengage by a call, unless the host or the tenant has a policy."""


@dataclass(frozen=True)
class ExitPolicies:
    """The operator's policies: that of a tenant replaces the host's for the tenant's guests. None: none is configured."""

    host: ExitBudgets | None = None
    tenants: Mapping[str, ExitBudgets] = field(default_factory=dict)

    def find(self, owner: str) -> ExitBudgets | None:
        return self.tenants.get(owner, self.host)

    def find_boot_limit(self, owner: str, request: ExitBudgets | None, after: float | None) -> float | None:
        """Seconds after which a guest's boot is over. ``after``: what its request says. None: no limit."""
        limits = [policy.boot_seconds for policy in (self.find(owner), request) if policy]
        return min((limit for limit in (*limits, after) if limit is not None), default=None)


def classify_vcpus(count: int, housekeeping: frozenset[int] | None) -> tuple[VcpuClass, ...]:
    """``housekeeping``: the vCPUs that the request names. Without them each vCPU does the guest's housekeeping too."""
    if housekeeping is None:
        return (VcpuClass.HOUSEKEEPING,) * count
    return tuple(VcpuClass.HOUSEKEEPING if index in housekeeping else VcpuClass.APPLICATION for index in range(count))


@dataclass(frozen=True)
class ExitCounts:
    """Exits per vCPU and reason up to a moment between ``begin`` and ``end`` (monotonic seconds); ``MMIO`` among the reasons."""

    begin: float
    end: float
    vcpus: tuple[Mapping[str, int], ...]


@dataclass(frozen=True)
class Violation:
    vcpu: int
    kind: VcpuClass
    rule: str
    count: int
    seconds: float
    allowed: int
    unit: str  # of time: "second" or "minute"

    def __str__(self) -> str:
        where = f"vCPU {self.vcpu} ({self.kind})"
        return f"{where}: {self.count} exits of {self.rule} in {self.seconds:.1f} s, allowed {self.allowed} per {self.unit}"


def add_sample(history: tuple[ExitCounts, ...], sample: ExitCounts) -> tuple[ExitCounts, ...]:
    """Keeps the last minute, few of its samples. Begins anew if a count fell: the kernel's histogram did so, too."""
    if history and _fell(history[-1], sample):
        return (sample,)
    recent = [old for old in history if sample.end - old.begin <= _MINUTE]
    last = history[-1:]
    if len(recent) > 1 and recent[-1].begin - recent[-2].begin < _SECOND:
        del recent[-1]  # rounds that follow each other at once
    if len(recent) > 3 and recent[-2].begin - recent[-4].begin < _MINUTE / 10:
        del recent[-3]
    return (*recent, sample) if recent else (*last, sample)


def judge(policy: ExitBudgets, kinds: Sequence[VcpuClass], history: Sequence[ExitCounts]) -> tuple[Violation, ...]:
    """What exceeds a budget now.

    Budgets per second are compared with the exits since the newest sample that is at least one second old, those per minute with
    the exits since the oldest sample of the last minute.
    """
    if len(history) < 2 or any(len(sample.vcpus) != len(kinds) for sample in history):
        return ()
    now = history[-1]
    before = next((old for old in reversed(history) if now.end - old.begin >= _SECOND), history[0])
    oldest = next((old for old in history[:-1] if now.end - old.begin <= _MINUTE), None)
    found: list[Violation] = []
    for vcpu, kind in enumerate(kinds):
        found += _judge_vcpu(policy.rules(kind), vcpu, kind, before, now, "second")
        if oldest:
            found += _judge_vcpu(policy.rules(kind), vcpu, kind, oldest, now, "minute")
    return tuple(found)


def _judge_vcpu(
    rules: Mapping[str, Budget], vcpu: int, kind: VcpuClass, before: ExitCounts, now: ExitCounts, unit: str
) -> Iterator[Violation]:
    seconds = now.end - before.begin  # at most: the counts are of moments in between
    earlier = before.vcpus[vcpu]
    more = {name: count - earlier.get(name, 0) for name, count in now.vcpus[vcpu].items()}
    for rule, budget in rules.items():
        allowed = budget.second if unit == "second" else budget.minute
        if allowed is None:
            continue
        count = _count(rule, rules, more)
        if count > allowed * (max(1.0, seconds) if unit == "second" else 1):
            yield Violation(vcpu, kind, rule, count, seconds, allowed, unit)


def _count(rule: str, rules: Mapping[str, Budget], more: Mapping[str, int]) -> int:
    if rule == MMIO:
        return more.get(MMIO, 0)
    if rule == ALL:
        return sum(count for name, count in more.items() if name != MMIO)
    if rule == OTHERS:
        named = set[str]().union(*(_names(other) for other in rules if other not in (ALL, OTHERS, MMIO)))
        return sum(count for name, count in more.items() if name != MMIO and name not in named)
    return sum(more.get(name, 0) for name in _names(rule))


def _names(rule: str) -> frozenset[str]:
    return CLASSES.get(rule, frozenset({rule}))


def _fell(before: ExitCounts, now: ExitCounts) -> bool:
    return len(before.vcpus) != len(now.vcpus) or any(
        later.get(name, 0) < count
        for earlier, later in zip(before.vcpus, now.vcpus, strict=True)
        for name, count in earlier.items()
    )
