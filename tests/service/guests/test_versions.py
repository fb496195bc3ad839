"""A version that a caller has seen stands for one state of one guest, whatever happens while its change waits for another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from orchestrator.errors import NotFound, Stale
from orchestrator.guests.outcome import Outcome
from orchestrator.guests.service import GuestService
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.state import GuestState
from tests.harness.crash import World
from tests.harness.guests import create, spoil, state

Ask = Callable[[GuestService, int | None], object]
END = {
    "kill": lambda manager, expected: manager.kill(OPERATOR, "web", expected),
    "delete": lambda manager, expected: manager.delete(OPERATOR, "web", expected),
}


def finish_stop(manager: GuestService, ledger: Ledger) -> None:
    """The stop that was under way comes to its end."""
    claim = ledger.find("web")
    assert claim
    manager.transitions.finish_stopping(claim, Outcome(EventKind.STOPPED, "powered off", "test"))


def start(manager: GuestService, ledger: Ledger) -> None:
    finish_stop(manager, ledger)
    manager.start(OPERATOR, "web")


def start_and_stop(manager: GuestService, ledger: Ledger) -> None:
    start(manager, ledger)
    manager.stop(OPERATOR, "web", 1)


def change_restarts(manager: GuestService, ledger: Ledger) -> None:
    finish_stop(manager, ledger)
    ledger.set_state("web", GuestState.STOPPED, restarts=0)


def stop_again(manager: GuestService, ledger: Ledger) -> None:
    ledger.set_state("web", GuestState.STOPPING)
    finish_stop(manager, ledger)


def quarantine(_manager: GuestService, ledger: Ledger) -> None:
    ledger.quarantine("web", ["not clean"])


def make_anew(manager: GuestService, ledger: Ledger) -> None:
    finish_stop(manager, ledger)
    manager.delete(OPERATOR, "web")
    create(manager)


def make_anew_and_stop(manager: GuestService, ledger: Ledger) -> None:
    make_anew(manager, ledger)
    manager.stop(OPERATOR, "web", 1)


def delete(manager: GuestService, ledger: Ledger) -> None:
    finish_stop(manager, ledger)
    manager.delete(OPERATOR, "web")


def stopping(manager: GuestService, ledger: Ledger) -> int:
    """A guest that is being stopped; its version."""
    create(manager)
    return ledger.set_state("web", GuestState.STOPPING, restarts=0).version


def meanwhile(manager: GuestService, ledger: Ledger, happens: Callable[[GuestService, Ledger], None]) -> None:
    """Something happens while the next change waits for the guest's lock."""
    locks = manager.transitions.guest_locks

    @contextmanager
    def wait(name: str) -> Iterator[None]:
        manager.transitions.guest_locks = locks
        happens(manager, ledger)
        with locks(name):
            yield

    manager.transitions.guest_locks = wait  # type: ignore[assignment]


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize(
    "happens", [start, start_and_stop, change_restarts, stop_again, quarantine, make_anew, make_anew_and_stop]
)
def test_version_of_a_stopping_guest_does_not_match_later_states(
    manager: GuestService, ledger: Ledger, end: str, happens: Callable[[GuestService, Ledger], None]
) -> None:
    seen = stopping(manager, ledger)
    meanwhile(manager, ledger, happens)
    with pytest.raises(Stale):
        END[end](manager, seen)
    assert ledger.find("web"), "nothing is done"
    assert state(manager) == (
        "running" if happens in (start, make_anew) else "quarantined" if happens is quarantine else "stopped"
    )


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("happens", [finish_stop, lambda _manager, _ledger: None])
def test_version_of_a_stopping_guest_matches_after_that_stop(
    manager: GuestService, ledger: Ledger, end: str, happens: Callable[[GuestService, Ledger], None]
) -> None:
    """Whoever waits for a power-off that does not come has the version of the guest that is being stopped."""
    seen = stopping(manager, ledger)
    meanwhile(manager, ledger, happens)
    END[end](manager, seen)
    assert [claim.state for claim in ledger.read().claims] == ([GuestState.STOPPED] if end == "kill" else [])


def test_kill_with_the_version_before_another_kill_is_stale(manager: GuestService, ledger: Ledger) -> None:
    seen = stopping(manager, ledger)
    meanwhile(manager, ledger, lambda manager, ledger: END["kill"](manager, seen))  # type: ignore[arg-type,return-value]
    with pytest.raises(Stale):
        END["delete"](manager, seen)  # the kill has stopped it anew: its version is another


@pytest.mark.parametrize("end", [*END, "start", "stop", "restart"])
def test_change_does_not_affect_a_later_guest_of_the_same_name(manager: GuestService, ledger: Ledger, end: str) -> None:
    """And not of the next that has the name."""
    stopping(manager, ledger)
    meanwhile(manager, ledger, make_anew)
    more = [1] if end in ("stop", "restart") else []
    with pytest.raises(NotFound, match="guest web ended or was replaced"):
        getattr(manager, end)(OPERATOR, "web", *more)
    assert state(manager) == "running"


@pytest.mark.parametrize("end", END)
def test_without_a_version_a_guest_is_ended_whatever_its_state(manager: GuestService, ledger: Ledger, end: str) -> None:
    stopping(manager, ledger)
    meanwhile(manager, ledger, start)
    END[end](manager, None)
    assert [claim.state for claim in ledger.read().claims] == ([GuestState.STOPPED] if end == "kill" else [])


def test_a_guest_that_is_gone_meanwhile_is_not_found(manager: GuestService, ledger: Ledger) -> None:
    seen = stopping(manager, ledger)
    meanwhile(manager, ledger, delete)
    with pytest.raises(NotFound, match="no guest named web"):
        END["kill"](manager, seen)


@pytest.mark.parametrize("end", END)
def test_a_stop_that_leaves_something_behind_is_another_state(
    world: World, manager: GuestService, ledger: Ledger, end: str
) -> None:
    plan = create(manager)
    seen = ledger.set_state("web", GuestState.STOPPING, restarts=0).version
    spoil(world, plan)
    meanwhile(manager, ledger, finish_stop)
    with pytest.raises(Stale):
        END[end](manager, seen)
    assert state(manager) == "quarantined"


def test_versions_are_never_reused(world: World, manager: GuestService, ledger: Ledger) -> None:
    """Nor in a manager that has just started, which does not know what was before."""
    seen = [stopping(manager, ledger)]
    for happens in (start_and_stop, make_anew_and_stop):
        if happens is make_anew_and_stop:
            manager.delete(OPERATOR, "web")
            create(manager)
        else:
            happens(manager, ledger)
        claim = ledger.find("web")
        assert claim
        seen.append(claim.version)
    ledger.close()
    again, reopened = world.open_manager()
    world.hypervisor.watch_ends(again.reconciler.on_guest_ended)
    claim = reopened.find("web")
    assert claim
    assert claim.previous is None
    again.reconciler.recover()
    again.stop(OPERATOR, "web", 1)
    seen.append(again.guest(OPERATOR, "web").version)
    assert sorted(set(seen)) == seen
    reopened.close()
