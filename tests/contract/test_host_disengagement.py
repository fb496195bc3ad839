"""Guests' calls that their boot is over, counted by the kernel in the trace instance."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from orchestrator.errors import HostError
from orchestrator.host.disengagement import begin_listening, end_listening, forget_calls, is_listening, read_calls
from orchestrator.host.exit_trace import INSTANCE, begin_counting, end_counting
from orchestrator.host.root import HostRoot
from tests.fakes import tracing
from tests.fakes.root import FakeRoot

CALL = f"{INSTANCE}/events/kvm/kvm_hypercall"


@pytest.fixture
def traced(host: HostRoot) -> Iterator[HostRoot]:
    if not host.exists("sys/kernel/tracing/events/kvm/kvm_hypercall"):
        pytest.skip("the module kvm is not loaded, or tracefs is not mounted")
    begin_counting(host)
    yield host
    end_counting(host)


def test_listening_begins_and_ends(traced: HostRoot) -> None:
    assert not is_listening(traced)
    for _ in range(2):
        begin_listening(traced)
        assert is_listening(traced)
    assert read_calls(traced) == {}
    for _ in range(2):
        end_listening(traced)
        assert not is_listening(traced)


def test_trigger_without_the_filter_is_not_taken_for_ours(traced: HostRoot) -> None:
    """All hypercalls, as another program may count them, are not calls that a boot is over."""
    traced.write(f"{CALL}/trigger", "hist:keys=common_pid")
    assert not is_listening(traced)
    traced.write(f"{CALL}/trigger", "!hist:keys=common_pid")


def test_filter_with_an_unknown_field_is_refused(traced: HostRoot) -> None:
    with pytest.raises(HostError) as caught:
        traced.write(f"{CALL}/trigger", "hist:keys=nonsense if nr == 20040")
    assert caught.value.errno == errno.EINVAL


def test_calls_are_forgotten_in_the_kernels_histogram(traced: HostRoot) -> None:
    begin_listening(traced)
    forget_calls(traced, range(1, 100))
    assert is_listening(traced)
    assert read_calls(traced) == {}


def test_calls_of_an_earlier_thread_with_the_same_id_are_forgotten(fake: FakeRoot) -> None:
    begin_counting(fake)
    begin_listening(fake)
    tracing.show_calls(fake, {71: 1, 72: 30})
    forget_calls(fake, [80, 81])
    assert read_calls(fake) == {71: 1, 72: 30}
    forget_calls(fake, [81, 72])
    assert read_calls(fake) == {}
    assert is_listening(fake)


@pytest.mark.parametrize(("threads", "left"), [(1023, 1023), (1024, 0)])
def test_room_is_made_in_a_half_full_histogram(fake: FakeRoot, threads: int, left: int) -> None:
    begin_counting(fake)
    begin_listening(fake)
    tracing.show_calls(fake, dict.fromkeys(range(1000, 1000 + threads), 1))
    forget_calls(fake, [])
    assert len(read_calls(fake)) == left


def test_nothing_is_forgotten_without_the_trigger(fake: FakeRoot) -> None:
    forget_calls(fake, [71])
    assert not is_listening(fake)
    with pytest.raises(HostError):
        read_calls(fake)


@pytest.mark.parametrize("text", ["", "{ common_pid: 71 } hitcount: 1"])
def test_histogram_that_cannot_be_read_is_an_error(fake: FakeRoot, text: str) -> None:
    begin_counting(fake)
    fake.add(f"{CALL}/hist", text)
    with pytest.raises(HostError, match="no totals"):
        read_calls(fake)
