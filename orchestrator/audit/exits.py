"""exits: VM exits per second and vCPU stay within a policy."""

from __future__ import annotations

from orchestrator.model.exits import EMULATED, ExitPolicy, ExitRates, ExitSample, measure_rates
from orchestrator.model.proof import Measurement, Verdict, not_measured


def prove_exits(before: ExitSample, after: ExitSample, policy: ExitPolicy) -> Measurement:
    """The figure is the rate of the busiest vCPU. No commands were sent to the guest between the samples."""
    try:
        rates = measure_rates(before, after)
    except ValueError as error:
        return not_measured(str(error))
    totals = [rate.total for rate in rates if rate.total is not None]
    if not rates or len(totals) != len(rates):
        return not_measured("this kernel or QEMU lacks KVM's counter `exits`")
    findings, gaps = [], []
    for index, (rate, total) in enumerate(zip(rates, totals, strict=True)):
        if total > policy.total:
            findings.append(f"vCPU {index}: {total:.1f} exits/s, limit {policy.total:g}")
        if rate.emulated is None:
            gaps.append(f"vCPU {index}: no counters for {' and '.join(EMULATED)}, so emulated exits cannot be limited")
        elif rate.emulated > policy.emulated:
            findings.append(f"vCPU {index}: {rate.emulated:.1f} emulated exits/s (io, mmio), limit {policy.emulated:g}")
    verdict = Verdict.FAIL if findings else Verdict.NOT_MEASURED if gaps else Verdict.PASS
    seconds = after.time - before.time
    evidence = [f"during {seconds:.1f} s; limits per vCPU: {policy.total:g} exits/s, {policy.emulated:g} emulated"]
    evidence += [f"vCPU {index}: {totals[index]:.1f}/s: {_describe(rate)}" for index, rate in enumerate(rates)]
    figure = None if verdict == Verdict.NOT_MEASURED else round(max(totals), 1)
    return Measurement(verdict, figure, (*findings, *gaps, *evidence))


def _describe(rate: ExitRates) -> str:
    return ", ".join(f"{kind} {value:.1f}" for kind, value in rate.classes.items() if value) or "none"
