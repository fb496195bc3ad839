"""Events of KVM that the kernel counts per thread in the trace instance: calls that a boot is over, and accesses to devices."""

from __future__ import annotations

import errno

import pytest

from orchestrator.errors import HostError
from orchestrator.host.exit_trace import begin_counting
from orchestrator.host.histogram import INSTANCE, Histogram, begin_counter, end_counter, is_counted
from orchestrator.host.root import HostRoot
from orchestrator.host.thread_counts import CALLS, COUNTERS, forget_threads, read_counter
from tests.fakes import tracing
from tests.fakes.root import FakeRoot

CALL = f"{INSTANCE}/events/kvm/kvm_hypercall"


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda counter: counter.event)
def test_counting_begins_and_ends(traced: HostRoot, counter: Histogram) -> None:
    assert not is_counted(traced, counter)
    for _ in range(2):
        begin_counter(traced, counter)
        assert is_counted(traced, counter)
    assert read_counter(traced, counter) == {}
    for _ in range(2):
        end_counter(traced, counter)
        assert not is_counted(traced, counter)


def test_trigger_without_the_filter_is_not_taken_for_ours(traced: HostRoot) -> None:
    """All hypercalls, as another program may count them, are not calls that a boot is over."""
    traced.write(f"{CALL}/trigger", "hist:keys=common_pid")
    assert not is_counted(traced, CALLS)
    traced.write(f"{CALL}/trigger", "!hist:keys=common_pid")


def test_filter_with_an_unknown_field_is_refused(traced: HostRoot) -> None:
    with pytest.raises(HostError) as caught:
        traced.write(f"{CALL}/trigger", "hist:keys=nonsense if nr == 20040")
    assert caught.value.errno == errno.EINVAL


def test_calls_are_forgotten_in_the_kernels_histogram(traced: HostRoot) -> None:
    begin_counter(traced, CALLS)
    forget_threads(traced, range(1, 100))
    assert is_counted(traced, CALLS)
    assert read_counter(traced, CALLS) == {}


def test_calls_of_an_earlier_thread_with_the_same_id_are_forgotten(fake: FakeRoot) -> None:
    begin_counting(fake)
    begin_counter(fake, CALLS)
    tracing.show_calls(fake, {71: 1, 72: 30})
    forget_threads(fake, [80, 81])
    assert read_counter(fake, CALLS) == {71: 1, 72: 30}
    forget_threads(fake, [81, 72])
    assert read_counter(fake, CALLS) == {}
    assert is_counted(fake, CALLS)


@pytest.mark.parametrize(("threads", "left"), [(1023, 1023), (1024, 0)])
def test_room_is_made_in_a_half_full_histogram(fake: FakeRoot, threads: int, left: int) -> None:
    begin_counting(fake)
    begin_counter(fake, CALLS)
    tracing.show_calls(fake, dict.fromkeys(range(1000, 1000 + threads), 1))
    forget_threads(fake, [])
    assert len(read_counter(fake, CALLS)) == left


def test_nothing_is_forgotten_without_the_trigger(fake: FakeRoot) -> None:
    forget_threads(fake, [71])
    assert not is_counted(fake, CALLS)
    with pytest.raises(HostError):
        read_counter(fake, CALLS)


@pytest.mark.parametrize("text", ["", "{ common_pid: 71 } hitcount: 1"])
def test_histogram_that_cannot_be_read_is_an_error(fake: FakeRoot, text: str) -> None:
    begin_counting(fake)
    fake.add(f"{CALL}/hist", text)
    with pytest.raises(HostError, match="no totals"):
        read_counter(fake, CALLS)


def test_full_histogram_is_an_error_until_it_is_emptied(fake: FakeRoot) -> None:
    begin_counting(fake)
    begin_counter(fake, CALLS)
    tracing.show_calls(fake, {71: 1}, dropped=3)
    with pytest.raises(HostError, match="3 events were not counted"):
        read_counter(fake, CALLS)
    forget_threads(fake, [99])
    assert read_counter(fake, CALLS) == {}
