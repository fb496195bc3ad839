"""States and what a manager does with them after a start: every pair of states, every state with and without its guest."""

from __future__ import annotations

import pytest

from orchestrator.errors import Conflict
from orchestrator.guests.recovery import RecoveryAction, decide
from orchestrator.model.state import SETTLED, GuestState, check_transition

ALLOWED = {
    "creating": {"running", "deleting"},
    "starting": {"running", "stopping", "deleting"},
    "running": {"stopping", "deleting"},
    "stopping": {"stopping", "stopped", "deleting", "quarantined", "running"},
    "stopped": {"stopped", "starting", "deleting", "quarantined"},
    "deleting": {"deleting", "quarantined", "running"},
    "quarantined": {"deleting"},
}


@pytest.mark.parametrize("old", GuestState)
@pytest.mark.parametrize("new", GuestState)
def test_transitions(old: GuestState, new: GuestState) -> None:
    if new in ALLOWED[old]:
        check_transition("g1", old, new)
    else:
        with pytest.raises(Conflict, match=f"g1 is {old} and can't become {new}"):
            check_transition("g1", old, new)


@pytest.mark.parametrize("state", GuestState)
@pytest.mark.parametrize("running", [True, False])
def test_every_decision_can_be_carried_out(state: GuestState, *, running: bool) -> None:
    decision = decide(state, running=running)
    if decision.state != state:
        check_transition("g1", state, decision.state)
    assert decision.why


@pytest.mark.parametrize("state", GuestState)
def test_a_guest_that_runs_is_never_ended(state: GuestState) -> None:
    assert decide(state, running=True).state not in (GuestState.STOPPING, GuestState.DELETING)


@pytest.mark.parametrize("state", GuestState)
def test_a_guest_that_does_not_run_is_never_shown_as_running(state: GuestState) -> None:
    assert decide(state, running=False).state != GuestState.RUNNING


@pytest.mark.parametrize("state", SETTLED)
def test_settled_states_stay(state: GuestState) -> None:
    decision = decide(state, running=state == GuestState.RUNNING)
    assert decision.state == state
    assert decision.action in (RecoveryAction.ADOPT, RecoveryAction.NONE, RecoveryAction.QUARANTINE)


def test_a_guest_that_was_never_made_is_undone() -> None:
    assert decide(GuestState.CREATING, running=False).action == RecoveryAction.UNDO
