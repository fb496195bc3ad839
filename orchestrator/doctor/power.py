"""Checks of what slows guest CPUs down when they are idle or cold, and of caches that guests share."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.host.cache import is_visible, read_limits
from orchestrator.host.frequency import read_governors, read_idle_states, read_latency_limit
from orchestrator.values import CpuSet

_LATENCY = 100  # µs
# Features of processors that resctrl uses (arch/x86/include/asm/cpufeatures.h).
_CACHE = ("cat_l3", "cat_l2", "mba")


def _check_frequency(facts: Facts) -> Finding:
    needed = "the governor performance on guest CPUs: others change the frequency with the load, also that of other guests"
    governors = read_governors(facts.host)
    if governors is None:
        return not_measured("frequency scaling is not visible", needed)
    if not governors:
        return passed("the kernel does not change frequencies")
    guest = CpuSet(frozenset(cpu for cpu in facts.division.guest if facts.is_online(cpu)))
    wrong = {name: cpus & guest for name, cpus in governors.items() if name not in ("", "performance") and cpus.meets(guest)}
    if wrong:
        remedy = "run `cpupower frequency-set --governor performance`, and set it at each boot"
        return failed("; ".join(f"{name} on CPUs {cpus}" for name, cpus in wrong.items()), needed, remedy)
    if unseen := guest - governors.get("performance", CpuSet()):
        return not_measured(f"no governor is visible for CPUs {unseen}", needed)
    return passed("performance on all guest CPUs")


def _check_idle(facts: Facts) -> Finding:
    """A busy guest never leaves its CPU: this is about guests that wait for frames."""
    needed = f"idle states of guest CPUs that end within {_LATENCY} µs"
    found = {cpu: read_idle_states(facts.host, cpu) for cpu in facts.division.guest if facts.is_online(cpu)}
    limit = read_latency_limit(facts.host)
    deep: dict[str, int] = {}
    for state in (state for states in found.values() for state in states or ()):
        if state.latency > _LATENCY and (limit is None or limit < 0 or state.latency <= limit):
            deep[state.name] = max(state.latency, deep.get(state.name, 0))
    if deep:
        text = ", ".join(f"{name} takes {latency} µs to end" for name, latency in deep.items())
        remedy = "run `cpupower idle-set --disable-by-latency 100`, or accept the delay: deep states save power while guests wait"
        return failed(text, needed, remedy)
    if unseen := CpuSet(frozenset(cpu for cpu, states in found.items() if states is None)):
        return not_measured(f"idle states of CPUs {unseen} are not visible", needed)
    return passed(f"no idle state of guest CPUs takes more than {_LATENCY} µs to end")


def _check_caches(facts: Facts) -> Finding:
    needed = "processors and kernel that limit caches and memory bandwidth (resctrl), if guests shall have parts of them"
    able = [flag for flag in _CACHE if flag in facts.flags]
    survey = read_limits(facts.host)
    if not survey.fault:
        return passed(f"resctrl is mounted, with {survey.max_groups} control groups")
    if not able:
        return failed("the processors have no cat_l3, cat_l2 or mba", needed, "none for this processor: guests share its caches")
    if not is_visible(facts.host):
        return not_measured(f"the processors have {', '.join(able)}, but resctrl is not visible", needed)
    remedy = "run `mount -t resctrl resctrl /sys/fs/resctrl`; if it fails, use a kernel with CONFIG_X86_CPU_RESCTRL"
    return failed(f"the processors have {', '.join(able)}, but {survey.fault}", needed, remedy)


_C = Principle.CORES
CHECKS = (
    Check("frequency", _C, "guest CPUs have a constant frequency", "governors in sysfs", _check_frequency, required=False),
    Check(
        "idle-states",
        _C,
        "idle guest CPUs wake up soon",
        "idle states in sysfs, /dev/cpu_dma_latency",
        _check_idle,
        required=False,
    ),
    Check(
        "cache-control",
        _C,
        "caches can be divided between guests",
        "flags of the processors, resctrl",
        _check_caches,
        required=False,
    ),
)
