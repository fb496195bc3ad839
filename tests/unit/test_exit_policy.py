"""Exit policies: what is written, and what exceeds it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestrator.host.exit_trace import parse_reasons
from orchestrator.model.exit_names import SVM, VMX
from orchestrator.model.exit_policy import (
    DEFAULT_POLICY,
    ExitBudgets,
    ExitCounts,
    ExitPolicies,
    VcpuClass,
    add_sample,
    classify_vcpus,
    judge,
)
from tests.fakes import tracing

A, H = VcpuClass.APPLICATION, VcpuClass.HOUSEKEEPING
Counts = dict[str, int]


def policy(action: str = "kill", **rules: object) -> ExitBudgets:
    return ExitBudgets.model_validate({"action": action, **rules})


def sample(time: float, *vcpus: Counts) -> ExitCounts:
    return ExitCounts(time, time + 0.1, vcpus)


def judged(rules: dict[str, dict[str, int]], *samples: tuple[float, Counts]) -> list[tuple[str, int, str]]:
    history: tuple[ExitCounts, ...] = ()
    for time, counts in samples:
        history = add_sample(history, sample(time, counts))
    return [(found.rule, found.count, found.unit) for found in judge(policy(application=rules), [A], history)]


def test_names_are_those_of_the_kernel() -> None:
    vmx, svm = parse_reasons(tracing.FORMAT)
    assert set(svm.values()) == SVM
    assert set(vmx.values()) == VMX


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"nonsense": {}}, r"unknown exit reason; known are .*classes: halt, io.*SVM: .*hlt.*VMX: .*CPUID"),
        ({"io": {"second": -1}}, "greater than or equal to 0"),
        ({"io": {"second": 1.5}}, "integer"),
        ({"io": {"second": True}}, "integer"),
        ({"io": {"hour": 1}}, "Extra inputs"),
        ({"io": 5}, "dictionary"),
        ({"io": "5"}, "is not a budget such as"),
        ({"io": "5/s,6/s"}, "is not a budget such as"),
        ({"io": "5/hour"}, "is not a budget such as"),
        ({"io": "-1/s"}, "is not a budget such as"),
        ({"io": ""}, "is not a budget such as"),
        ({"io": "9999999999/s"}, "less than or equal"),
    ],
)
@pytest.mark.parametrize("kind", ["application", "housekeeping"])
def test_wrong_rules_are_refused(kind: str, rules: object, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        policy(**{kind: rules})


def test_budget_is_read_from_text() -> None:
    texts = {"io": "0/s", "msr": "10/s,60/min", "halt": "any"}
    objects = {"io": {"second": 0}, "msr": {"second": 10, "minute": 60}, "halt": {}}
    assert policy(application=texts) == policy(application=objects)


def test_unknown_action_is_refused() -> None:
    with pytest.raises(ValidationError, match="'report', 'pause' or 'kill'"):
        policy("explode")


@pytest.mark.parametrize(
    ("rule", "second", "count", "exceeded"),
    [("io", 0, 1, True), ("io", 0, 0, False), ("io", 100, 121, True), ("io", 100, 109, False), ("msr", 0, 5, False)],
)
def test_budget_per_second(rule: str, second: int, count: int, exceeded: bool) -> None:
    """Over 1.1 s at most."""
    found = judged({rule: {"second": second}}, (0, {"io": 50}), (1, {"io": 50 + count}))
    assert found == ([(rule, count, "second")] if exceeded else [])


def test_short_interval_does_not_lower_the_budget() -> None:
    assert judged({"io": {"second": 10}}, (0, {}), (0.2, {"io": 10})) == []


@pytest.mark.parametrize(("name", "rule"), [("MSR_WRITE", "msr"), ("npf", "memory"), ("hlt", "hlt"), ("mmio", "mmio")])
def test_rule_counts_its_reasons(name: str, rule: str) -> None:
    assert judged({rule: {"second": 0}}, (0, {}), (1, {name: 3, "cpuid": 9})) == [(rule, 3, "second")]


def test_all_counts_each_exit_once() -> None:
    """An access to a device is an npf, too."""
    assert judged({"all": {"second": 0}}, (0, {}), (1, {"npf": 3, "io": 4, "mmio": 3})) == [("all", 7, "second")]


def test_others_are_the_reasons_without_a_rule() -> None:
    rules: dict[str, dict[str, int]] = {"others": {"second": 0}, "halt": {}, "MSR_WRITE": {}, "mmio": {}}
    counts = {"hlt": 100, "MSR_WRITE": 7, "mmio": 3, "cpuid": 2, "MSR_READ": 1}
    assert judged(rules, (0, {}), (1, counts)) == [("others", 3, "second")]


def test_budget_per_minute_is_exceeded_before_the_minute_is_over() -> None:
    rules = {"all": {"minute": 60}}
    assert judged(rules, (0, {}), (5, {"msr": 30}), (10, {"msr": 60})) == []
    assert judged(rules, (0, {}), (5, {"msr": 30}), (10, {"msr": 61})) == [("all", 61, "minute")]


def test_exits_of_more_than_a_minute_are_not_added_up() -> None:
    samples = [(float(second), {"msr": second}) for second in range(300)]
    assert judged({"all": {"minute": 60}}, *samples) == []
    assert judged({"all": {"minute": 50}}, *samples) != []


def test_few_samples_of_the_last_minute_are_kept() -> None:
    history: tuple[ExitCounts, ...] = ()
    for second in range(600):
        history = add_sample(history, sample(second, {"msr": second}))
    assert len(history) <= 16
    assert history[-1].begin - history[-2].begin == 1
    assert 50 <= history[-1].end - history[0].begin <= 60


@pytest.mark.parametrize("every", [0.05, 0.3, 0.7, 1.0, 1.4])
def test_budget_per_second_holds_however_often_it_is_judged(every: float) -> None:
    """Each event of a guest causes a round: a tenant can cause many."""

    def find(rate: float) -> list[float]:
        history, found = tuple[ExitCounts, ...](), list[float]()
        for number in range(int(30 / every)):
            history = add_sample(history, sample(number * every, {"io": int(rate * number * every)}))
            found += [one.seconds for one in judge(policy(application={"io": {"second": 100}}), [A], history)]
        assert len(history) <= 16
        return found

    assert find(95) == []
    exceeding = find(200)
    assert exceeding
    assert max(exceeding) < 3.1, "a burst is not spread over many seconds"


def test_single_sample_is_not_judged() -> None:
    assert judged({"io": {"second": 0, "minute": 0}}, (0, {"io": 999})) == []


def test_histogram_that_began_anew_is_not_judged() -> None:
    assert judged({"io": {"second": 0}, "msr": {"second": 0}}, (0, {"io": 50}), (1, {"io": 7, "msr": 500})) == []


def test_long_gap_is_judged_by_its_length() -> None:
    """The manager was suspended, or restarted."""
    assert judged({"io": {"second": 10, "minute": 0}}, (0, {}), (100, {"io": 900})) == []


def test_classes_have_their_own_rules() -> None:
    rules = policy(application={"io": {"second": 0}}, housekeeping={"io": {"second": 100}})
    history = (sample(0, {}, {}, {}), sample(1, {"io": 50}, {"io": 50}, {}))
    (found,) = judge(rules, [H, A, A], history)
    assert str(found) == "vCPU 1 (application): 50 exits of io in 1.1 s, allowed 0 per second"


def test_guest_that_names_no_vcpus_has_housekeeping_ones_only() -> None:
    assert classify_vcpus(2, None) == (H, H)
    assert classify_vcpus(4, frozenset({0, 1})) == (H, H, A, A)


@pytest.mark.parametrize(
    ("one", "urgent"),
    [
        (DEFAULT_POLICY, False),
        (policy("report", housekeeping={"io": {"second": 5}}), True),
        (policy("report", housekeeping={"io": {"minute": 5}}), False),
        (policy("kill", housekeeping={"io": {"minute": 5}}), True),
        (policy("kill"), False),
    ],
)
def test_urgent_policy_is_judged_every_second(one: ExitBudgets, urgent: bool) -> None:
    assert one.is_urgent is urgent


def test_policy_of_a_tenant_replaces_that_of_the_host() -> None:
    host, tenant = policy("kill", application={"io": {}}), policy("report")
    both = ExitPolicies(host, {"acme": tenant})
    assert (both.find("acme"), both.find("bolt"), both.find("")) == (tenant, host, host)
