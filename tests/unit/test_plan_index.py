"""The allocation index gives what adding up all plans gives, whatever guests have come and gone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.allocation_index import AllocationIndex
from orchestrator.values import Size
from tests.harness.plans import add_up
from tests.unit.test_ledger import make_plan

PLANS = [
    replace(make_plan(number), node=number % 3, page_size=Size.parse(("2M", "1G")[number % 2]), pages=number + 1)
    for number in range(12)
]
NUMBERS = st.frozensets(st.sampled_from(range(len(PLANS))))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6))
def test_the_index_is_the_sum_of_all_plans(steps: list[tuple[frozenset[int], frozenset[int], frozenset[int]]]) -> None:
    index = AllocationIndex()
    for present, started, starting in steps:
        plans = [PLANS[number] for number in sorted(present)]
        names, begun = (frozenset(f"g{number}" for number in numbers) for numbers in (started, starting))
        index = index.updated(plans)
        assert index.to_allocated(names, begun) == add_up(plans, names, begun)


def test_a_guest_of_the_same_name_with_another_place_is_counted_anew() -> None:
    before, after = PLANS[1], replace(PLANS[1], cores=PLANS[2].cores, nics=PLANS[2].nics)
    index = AllocationIndex().updated([PLANS[0], before]).updated([PLANS[0], after])
    assert index.to_allocated((), ()) == add_up([PLANS[0], after], frozenset())
    assert index.updated([PLANS[0], after]) is index
