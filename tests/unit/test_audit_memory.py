"""memory-static: passes on the memory of real guests, and fails for each way in which memory is not static."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.audit.memory import prove_memory_static, prove_pool_accounting
from orchestrator.host.processes import Mapping, Maps
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import Measurement, Verdict
from orchestrator.model.topology import PagePool
from orchestrator.values import Size
from tests.harness.audit_data import GUEST1, GUEST2, GUESTS, TOPOLOGY, load_maps

MAPS = {guest.name: load_maps(guest.name) for guest in GUESTS}


def static(maps: Maps, guest: RunningGuest = GUEST1, ksm_run: str | None = "0") -> Measurement:
    return prove_memory_static(guest, maps, TOPOLOGY, ksm_run)


def change(select: Callable[[Mapping], bool], **values: object) -> Maps:
    """guest1's memory with the selected mappings changed."""
    maps = MAPS["guest1"]
    assert any(select(mapping) for mapping in maps.mappings)
    mappings = [replace(mapping, **values) if select(mapping) else mapping for mapping in maps.mappings]  # type: ignore[arg-type]
    return replace(maps, mappings=tuple(mappings))


def is_pool(mapping: Mapping) -> bool:
    return bool(mapping.huge)


def is_heap(mapping: Mapping) -> bool:
    return mapping.path == "[heap]"


def heap() -> Mapping:
    return next(mapping for mapping in MAPS["guest1"].mappings if is_heap(mapping))


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_real_guests_pass(guest: RunningGuest) -> None:
    proof = static(MAPS[guest.name], guest)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert proof.evidence[0].startswith("262144 of 262144 kB are pool pages: 128 of 2048 kB")


def test_without_huge_pages_the_figure_is_all_of_the_memory() -> None:
    proof = static(change(is_pool, huge=0, resident=256 << 20, page_size=4096))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 256 << 10)


def test_one_page_missing_fails() -> None:
    proof = static(change(is_pool, huge=254 << 20, nodes=((0, 127),)))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 2048)


def test_more_pool_memory_than_the_guest_has_fails() -> None:
    assert static(MAPS["guest1"], replace(GUEST1, memory=Size(254 << 20))).verdict == Verdict.FAIL


def test_pages_on_another_node_fail() -> None:
    proof = static(change(is_pool, nodes=((0, 120), (1, 8))))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 8 * 2048)
    assert "are not on node 0 of the guest's cores: 120 pages on node 0, 8 pages on node 1" in proof.evidence[0]


def test_cores_on_the_other_node_fail() -> None:
    """The memory is where it was asked for, but the cores are elsewhere."""
    assert static(MAPS["guest1"], replace(GUEST1, vcpus=GUEST2.vcpus)).verdict == Verdict.FAIL


def test_cores_on_two_nodes_fail() -> None:
    assert static(MAPS["guest1"], replace(GUEST1, vcpus=GUEST1.vcpus + GUEST2.vcpus)).verdict == Verdict.FAIL


def test_memory_that_libvirt_does_not_bind_fails() -> None:
    assert static(MAPS["guest1"], replace(GUEST1, node=None)).verdict == Verdict.FAIL


@pytest.mark.parametrize("policy", ["default", "prefer:0", "interleave:0-1", "bind:0-1", ""])
def test_policy_that_lets_pages_go_elsewhere_fails(policy: str) -> None:
    assert static(change(is_pool, policy=policy)).verdict == Verdict.FAIL


def test_unlocked_domain_fails() -> None:
    """Without <locked/> no mapping of QEMU has `lo`; the figure is what could be swapped out."""
    maps = MAPS["guest1"]
    unlocked = tuple(replace(mapping, flags=mapping.flags - {"lo"}) for mapping in maps.mappings)
    proof = static(Maps(unlocked, 0))
    assert proof.verdict == Verdict.FAIL
    exempt = {"io", "pf", "mm", "de", "dp", "ht"}
    assert proof.figure == sum(mapping.resident for mapping in maps.mappings if not mapping.flags & exempt) >> 10


def test_evidence_of_an_unlocked_domain_stays_short() -> None:
    maps = MAPS["guest1"]
    proof = static(Maps(tuple(replace(mapping, flags=mapping.flags - {"lo"}) for mapping in maps.mappings), 0))
    named = [line for line in proof.evidence if "kB are not locked: " in line]
    assert len(named) == 6
    assert named[-1].endswith("smaller mappings")


def test_one_unlocked_mapping_fails() -> None:
    proof = static(change(is_heap, flags=heap().flags - {"lo"}))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, heap().resident >> 10)
    assert "not locked: [heap]" in proof.evidence[0]


def test_mergeable_memory_fails() -> None:
    proof = static(change(is_heap, flags=heap().flags | {"mg"}))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, heap().resident >> 10)


@pytest.mark.parametrize(
    ("run", "verdict"), [("1", Verdict.FAIL), ("?", Verdict.FAIL), ("2", Verdict.PASS), (None, Verdict.PASS)]
)
def test_ksm(run: str | None, verdict: Verdict) -> None:
    assert static(MAPS["guest1"], ksm_run=run).verdict == verdict


def test_a_page_that_breaks_several_promises_is_counted_once() -> None:
    proof = static(change(is_heap, flags=(heap().flags | {"mg"}) - {"lo"}))
    assert proof.figure == heap().resident >> 10
    assert len([line for line in proof.evidence if "[heap]" in line]) == 2


def test_pool_accounting_passes_when_each_page_has_an_owner() -> None:
    proof = prove_pool_accounting(TOPOLOGY.pools, MAPS)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert "node 0, 2048 kB pages: 256 in the pool, 128 free, 128 mapped by guests (guest1 128)" in proof.evidence


@pytest.mark.parametrize(("free", "missing"), [(127, 1), (129, 1), (0, 128)])
def test_pool_accounting_fails_by_a_page(free: int, missing: int) -> None:
    pools = (TOPOLOGY.pools[0], replace(TOPOLOGY.pools[1], free=free))
    proof = prove_pool_accounting(pools, MAPS)
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, missing)


def test_pages_that_a_guest_left_behind_fail() -> None:
    proof = prove_pool_accounting(TOPOLOGY.pools, {"guest1": MAPS["guest1"]})
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 128)


def test_pages_of_a_size_without_a_pool_fail() -> None:
    pools = (PagePool(0, Size(1 << 30), 4, 4), PagePool(1, Size(1 << 30), 4, 4))
    assert prove_pool_accounting(pools, MAPS).figure == 256


def test_host_without_pools_is_not_measured() -> None:
    assert prove_pool_accounting((), {}).verdict == Verdict.NOT_MEASURED
