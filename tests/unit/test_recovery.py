"""Properties of the state transitions, and what a manager does in every state after a start, with and without the guest."""

from __future__ import annotations

from contextlib import suppress

import pytest

from orchestrator.errors import Conflict
from orchestrator.guests.recovery import RecoveryAction, decide
from orchestrator.model.state import SETTLED, GuestState, check_transition


def find_next(state: GuestState) -> set[GuestState]:
    """States that a guest in this state may get."""
    found = set()
    for new in GuestState:
        with suppress(Conflict):
            check_transition("g1", state, new)
            found.add(new)
    return found


def find_previous(state: GuestState) -> set[GuestState]:
    return {old for old in GuestState if state in find_next(old)}


@pytest.mark.parametrize("state", GuestState)
def test_every_state_reaches_a_settled_one_and_deletion(state: GuestState) -> None:
    """A guest can always go on, and always be deleted."""
    known = {state}
    while more := {new for one in known for new in find_next(one)} - known:
        known |= more
    assert known & set(SETTLED)
    assert GuestState.DELETING in known


def test_running_is_left_only_by_an_end() -> None:
    assert find_next(GuestState.RUNNING) == {GuestState.STOPPING, GuestState.DELETING}


def test_running_is_not_entered_from_a_state_whose_setup_is_undone() -> None:
    """Only from states in which the setup is complete, or its undo was interrupted."""
    assert not find_previous(GuestState.RUNNING) & set(SETTLED)


def test_creating_is_entered_only_by_a_new_claim() -> None:
    assert not find_previous(GuestState.CREATING)


def test_starting_is_entered_only_after_a_verified_cleanup() -> None:
    assert find_previous(GuestState.STARTING) == {GuestState.STOPPED}


def test_quarantined_is_left_only_by_deletion() -> None:
    assert find_next(GuestState.QUARANTINED) == {GuestState.DELETING}


def test_quarantined_is_not_entered_while_the_guest_is_set_up_or_runs() -> None:
    set_up = {GuestState.CREATING, GuestState.STARTING, GuestState.RUNNING}
    assert not find_previous(GuestState.QUARANTINED) & set_up


@pytest.mark.parametrize("old", GuestState)
def test_refused_transition_names_both_states(old: GuestState) -> None:
    for new in set(GuestState) - find_next(old):
        with pytest.raises(Conflict, match=f"g1 is {old} and .* become {new}"):
            check_transition("g1", old, new)


@pytest.mark.parametrize("state", GuestState)
@pytest.mark.parametrize("running", [True, False])
def test_every_decision_is_an_allowed_transition(state: GuestState, *, running: bool) -> None:
    decision = decide(state, running=running)
    if decision.state != state:
        check_transition("g1", state, decision.state)
    assert decision.why


@pytest.mark.parametrize("state", GuestState)
def test_running_guest_is_never_ended(state: GuestState) -> None:
    assert decide(state, running=True).state not in (GuestState.STOPPING, GuestState.DELETING)


@pytest.mark.parametrize("state", GuestState)
def test_ended_guest_is_never_recorded_as_running(state: GuestState) -> None:
    assert decide(state, running=False).state != GuestState.RUNNING


@pytest.mark.parametrize("state", SETTLED)
def test_settled_states_are_kept(state: GuestState) -> None:
    decision = decide(state, running=state == GuestState.RUNNING)
    assert decision.state == state
    assert decision.action in (RecoveryAction.ADOPT, RecoveryAction.NONE, RecoveryAction.QUARANTINE)


def test_unfinished_creation_is_undone() -> None:
    assert decide(GuestState.CREATING, running=False).action == RecoveryAction.UNDO
