"""When a guest that has ended is restarted."""

from __future__ import annotations

import threading

import pytest

from orchestrator.guests.restarts import (
    MAX_RESTARTS,
    RESTARTABLE_CAUSES,
    STABLE_RUN_SECONDS,
    NamedTimers,
    count_restarts,
    delay,
)
from orchestrator.hypervisor.connection import EndCause
from orchestrator.ledger import Claim
from orchestrator.model.request import GuestRequest, Restart
from orchestrator.model.state import GuestState
from tests.unit.test_ledger import make_plan


def build_claim(restarts: int, restart: Restart = Restart.ON_FAILURE) -> Claim:
    request = GuestRequest(name="g1", memory="64M", image="minimal", restart=restart)
    return Claim(make_plan(1), GuestState.RUNNING, request, restarts=restarts)


def test_delays_double_and_end() -> None:
    delays = [delay(count) for count in range(MAX_RESTARTS + 1)]
    assert delays[:3] == [1, 2, 4]
    assert delays[-2] == 300
    assert delays[-1] is None


@pytest.mark.parametrize("cause", EndCause)
def test_only_failures_are_restarted(cause: EndCause) -> None:
    assert count_restarts(build_claim(0), cause, 1.0) == (1 if cause in RESTARTABLE_CAUSES else 0)
    assert count_restarts(build_claim(0, Restart.NEVER), cause, 1.0) == 0


@pytest.mark.parametrize(("ran", "count"), [(1.0, 4), (STABLE_RUN_SECONDS, 1), (None, 1)])
def test_failure_after_a_stable_run_counts_as_the_first(ran: float | None, count: int) -> None:
    assert count_restarts(build_claim(3), EndCause.FAILED, ran) == count


def test_timer_that_was_replaced_or_cancelled_is_not_current() -> None:
    timers, ignored = NamedTimers(), threading.Timer(60, lambda: None)
    timers.set("web", 60, lambda _timer: None)
    first = timers.get("web")
    timers.set("web", 60, lambda _timer: None)
    second = timers.get("web")
    assert first
    assert second
    assert not timers.pop_if_current("web", first)
    assert not timers.pop_if_current("db", ignored)
    assert timers.pop_if_current("web", second)
    assert timers.get("web") is None
    timers.cancel("web")


def test_closed_timers_start_nothing() -> None:
    timers = NamedTimers()
    timers.set("web", 60, lambda _timer: None)
    waiting = timers.get("web")
    assert waiting
    timers.close()
    assert not timers.pop_if_current("web", waiting)
    timers.set("db", 60, lambda _timer: None)
    assert timers.get("db") is None
