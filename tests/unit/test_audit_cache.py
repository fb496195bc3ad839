"""cache-exclusive passes on a guest's own ways, and fails for each way to break them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.cache import prove_cache_exclusive
from orchestrator.model.cache import (
    BandwidthControl,
    BandwidthUnit,
    CacheControl,
    CacheDomain,
    CachePlan,
    CacheShare,
    CacheSurvey,
    ControlGroup,
)
from orchestrator.model.proof import WEAKER, Verdict
from orchestrator.values import CpuSet
from tests.harness.audit_data import GUEST1

CPUS = CpuSet.of(cpu for vcpu in GUEST1.vcpus for cpu in vcpu.pin)
NONE = CpuSet()
PLAN = CachePlan(3, (CacheShare(0, 0xF00),), 40, BandwidthUnit.PERCENT, (0,))


def group(name: str, mask: int, cpus: CpuSet = NONE, bandwidth: int = 100, *, has_tasks: bool = False) -> ControlGroup:
    return ControlGroup(name, (("L3", ((0, mask), (1, 0xFFF))), ("MB", ((0, bandwidth), (1, 100)))), cpus, has_tasks)


OWN, DEFAULT = group("nohype-g1", 0xF00, CPUS, 40), group("", 0x0FF, CpuSet.parse("0-1"))


def survey(*groups: ControlGroup, shared: int = 0, unit: BandwidthUnit | None = BandwidthUnit.PERCENT) -> CacheSurvey:
    control = CacheControl(3, ("L3",), 0xFFF, 1, shared, sparse=False)
    bandwidth = BandwidthControl(unit, 10, 10, 100) if unit else None
    return CacheSurvey("", control, bandwidth, (CacheDomain(3, 0, CPUS | CpuSet.parse("0-1")),), groups, 16)


def unread() -> CacheSurvey:
    raise AssertionError("a guest without a part of the caches does not need the survey")


def test_own_ways_pass() -> None:
    elsewhere = group("db", 0xFFF, CpuSet.parse("60-61"))  # the CPUs of another cache
    proof = prove_cache_exclusive(GUEST1, PLAN, lambda: survey(DEFAULT, OWN, elsewhere))
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert "L3 cache 0: 0xf00 (4 ways) of nohype-g1 only" in proof.evidence


def test_guest_without_a_limit_passes() -> None:
    assert prove_cache_exclusive(GUEST1, None, unread).verdict == Verdict.PASS


def test_accepted_lack_is_not_measured() -> None:
    proof = prove_cache_exclusive(GUEST1, CachePlan(), unread)
    assert proof.verdict == Verdict.NOT_MEASURED
    assert proof.evidence[0].startswith(WEAKER)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (survey(DEFAULT), "are in no common control group"),
        (CacheSurvey("resctrl is not mounted"), "resctrl is not mounted"),
        (
            survey(replace(DEFAULT, schemata=group("", 0x1FF).schemata), OWN),
            "the default control group can fill 0x100 (1 ways) too",
        ),
        (survey(DEFAULT, OWN, group("db", 0x800, has_tasks=True)), "db can fill 0x800 (1 ways) too"),
        (survey(DEFAULT, OWN, group("db", 0x800, CpuSet.parse("1"))), "db can fill 0x800 (1 ways) too"),
        (survey(DEFAULT, group("nohype-g1", 0x700, CPUS, 40)), "L3 of nohype-g1 is 0x700 (3 ways), expected 0xf00 (4 ways)"),
        (survey(DEFAULT, group("nohype-g1", 0xF00, CPUS, 100)), "limit 100, expected 40"),
        (survey(DEFAULT, replace(OWN, cpus=CPUS | CpuSet.parse("0"))), "has CPUs 0 that are not the guest's"),
        (survey(DEFAULT, OWN, unit=BandwidthUnit.MEGABYTES), "memory bandwidth is limited in MB/s, expected percent"),
        (
            survey(DEFAULT, OWN, replace(group("db", 0x001, has_tasks=True), tasks=frozenset({1, GUEST1.vcpus[0].tid}))),
            f"threads {GUEST1.vcpus[0].tid} of the guest are in control group db",
        ),
        (survey(DEFAULT, OWN, unit=None), "memory bandwidth is limited in no unit, expected percent"),
        (survey(DEFAULT, OWN, shared=0xC00), "devices fill 0xc00 (2 ways) too"),
    ],
)
def test_what_is_broken_is_named(found: CacheSurvey, says: str) -> None:
    proof = prove_cache_exclusive(GUEST1, PLAN, lambda: found)
    assert proof.verdict == Verdict.FAIL
    assert any(says in line for line in proof.evidence), proof.evidence
