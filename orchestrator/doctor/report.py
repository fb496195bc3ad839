"""The results as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.doctor.check import Principle, Result, find_verdict
from orchestrator.model.proof import Verdict

_MARKS = {Verdict.PASS: "ok", Verdict.FAIL: "FAIL", Verdict.NOT_MEASURED: "?"}
_ADVICE = "advice"  # the mark of a failure that does not decide
_WIDTH = max(map(len, (*_MARKS.values(), _ADVICE)))


def find_status(results: Sequence[Result]) -> int:
    """Exit status: 0 fit, 1 not fit, 8 nothing is wrong but not everything was measured (as `nohype audit verify`)."""
    return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.NOT_MEASURED: 8}[find_verdict(results)]


def build_json(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "verdict": find_verdict(results).value,
        "principles": {principle.value: find_verdict(_select(results, principle)).value for principle in Principle},
        "checks": [
            {
                "name": result.check.name,
                "principle": result.check.principle.value,
                "required": result.check.required,
                "verdict": result.finding.verdict.value,
                "found": result.finding.found,
                "needed": result.finding.needed,
                "remedy": result.finding.remedy,
                "source": result.check.source,
            }
            for result in results
        ],
    }


def build_lines(results: Sequence[Result]) -> Iterator[str]:
    for principle in Principle:
        part = _select(results, principle)
        yield f"{principle}: {find_verdict(part)}"
        for result in part:
            yield from _describe(result)
        yield ""
    yield _summarise(results)


def _select(results: Sequence[Result], principle: Principle) -> list[Result]:
    return [result for result in results if result.check.principle is principle]


def _describe(result: Result) -> Iterator[str]:
    check, finding = result.check, result.finding
    is_advice = finding.verdict is Verdict.FAIL and not check.required
    mark = _ADVICE if is_advice else _MARKS[finding.verdict]
    yield f"  {mark:{_WIDTH}}  {check.name}: {finding.found}"
    indent = " " * (_WIDTH + 4)
    if finding.verdict is not Verdict.PASS and finding.needed:
        yield f"{indent}needed: {finding.needed}"
    if finding.remedy:
        yield f"{indent}to do: {finding.remedy}"


def _summarise(results: Sequence[Result]) -> str:
    faults = [result.check.name for result in results if result.is_fault]
    unknown = [result.check.name for result in results if result.is_open]
    if faults:
        return f"This server is not ready for NoHype: {len(faults)} of {len(results)} checks failed ({', '.join(faults)})."
    if unknown:
        return f"No check failed, but {len(unknown)} could not be measured ({', '.join(unknown)})."
    return f"This server is ready for NoHype: {len(results)} checks."
