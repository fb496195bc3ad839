"""host-isolation: the kernel settings that keep the host's own work off guest cores are as wanted. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.host.irqbalance import Irqbalance
from orchestrator.host.isolation import Division, Owner, Reading
from orchestrator.host.tuned import Tuned
from orchestrator.model.proof import WEAKER, Measurement, Verdict, count_findings
from orchestrator.values import CpuSet

_REMEDY = {
    Owner.ROLE: "apply the Ansible role and reboot",
    Owner.MANAGER: "the manager sets it with the first guest and at its own start: another program has changed it since",
}


@dataclass(frozen=True)
class IsolationFacts:
    readings: tuple[Reading, ...]
    tuned: Tuned | None
    irqbalance: tuple[Irqbalance, ...]
    isolated: CpuSet  # CPUs that irqbalance leaves alone unless it is told otherwise


def prove_host_isolation(facts: IsolationFacts, division: Division, *, has_guests: bool) -> Measurement:
    """``has_guests``: the manager changes its settings only while there are guests."""
    findings: list[str] = []
    limits: list[str] = []
    unread: list[str] = []
    kept: list[str] = []
    for reading in facts.readings:
        if reading.problem:
            unread.append(f"{reading.setting.name}: {reading.problem}")
            continue
        kind, text = _judge(reading, facts.tuned, division, has_guests=has_guests)
        {"finding": findings, "limit": limits, "kept": kept}[kind].append(text)
    findings += _check_irqbalance(facts.irqbalance, facts.isolated, division)
    evidence = [*(f"{WEAKER}{limit}" for limit in limits), f"{len(kept)} settings as wanted: {', '.join(kept)}"]
    if unread and not findings:
        return Measurement(Verdict.NOT_MEASURED, None, (*unread, *evidence))
    return count_findings([*findings, *unread], evidence)


def _judge(reading: Reading, tuned: Tuned | None, division: Division, *, has_guests: bool) -> tuple[str, str]:
    setting, text = reading.setting, reading.text
    if text is None:
        missing = f"this kernel has no /{setting.file}: {setting.absent or setting.why + ' cannot be measured'}"
        return "limit", missing
    if reading.is_wanted(division):
        return "kept", f"{setting.name} {text or 'none'}"
    if setting.owner is Owner.MANAGER and not has_guests:
        return "kept", f"{setting.name} {text or 'none'} (set while there are guests)"
    actual = f"{setting.name} is {text or 'none'}, wanted {setting.wanted.describe(division)}, so that {setting.why}"
    if setting.excuse and reading.is_excused:
        return "limit", f"{setting.name} is {text}: {setting.excuse[1]}"
    if tuned and tuned.sets(setting):
        return "limit", f"{actual}; {tuned} sets it"
    return "finding", f"{actual} (/{setting.file}; {_REMEDY[setting.owner]})"


def _check_irqbalance(processes: Iterable[Irqbalance], isolated: CpuSet, division: Division) -> Sequence[str]:
    return [
        f"irqbalance (pid {found.pid}) may send interrupts to CPUs {free}: set IRQBALANCE_BANNED_CPULIST, or stop it"
        for found in processes
        if (free := division.guest - (isolated if found.banned is None else found.banned))
    ]
