"""The states of a guest and the changes allowed between them. Pure."""

from __future__ import annotations

from enum import StrEnum

from orchestrator.errors import Conflict


class GuestState(StrEnum):
    """How far a guest that holds a claim has come.

    In each state but RUNNING the host may or may not have been changed for the guest: the undo journal tells.
    """

    CREATING = "creating"
    """It is being started for the first time. If that fails its claim is released: a guest is made whole or not at all."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    """It is being ended, or has ended, and what was done for it is being undone."""
    STOPPED = "stopped"
    """It holds its claim and nothing else: all that was done for it is undone, and verified."""
    DELETING = "deleting"
    """As STOPPING; its claim is released afterwards."""
    QUARANTINED = "quarantined"
    """Not everything it had could be verified clean, or it runs and should not: its claim stays until an operator clears it."""


SETTLED = (GuestState.RUNNING, GuestState.STOPPED, GuestState.QUARANTINED)
"""The states in which nothing is going on."""

_NEXT: dict[GuestState, tuple[GuestState, ...]] = {
    GuestState.CREATING: (GuestState.RUNNING, GuestState.DELETING),
    GuestState.STARTING: (GuestState.RUNNING, GuestState.STOPPING, GuestState.DELETING),
    GuestState.RUNNING: (GuestState.STOPPING, GuestState.DELETING),
    # To themselves: what failed half-way is tried again. To RUNNING: a crash of the manager cut the end short; the guest is kept.
    GuestState.STOPPING: (
        GuestState.STOPPING, GuestState.STOPPED, GuestState.DELETING, GuestState.QUARANTINED, GuestState.RUNNING,
    ),
    # To itself: it is not to be started again. To QUARANTINED: somebody else has started it.
    GuestState.STOPPED: (GuestState.STOPPED, GuestState.STARTING, GuestState.DELETING, GuestState.QUARANTINED),
    GuestState.DELETING: (GuestState.DELETING, GuestState.QUARANTINED, GuestState.RUNNING),
    GuestState.QUARANTINED: (GuestState.DELETING,),
}  # fmt: skip


def check_transition(name: str, old: GuestState, new: GuestState) -> None:
    """Refuses a change of state that has no meaning.

    Raises:
        Conflict: with both states and those that are allowed.
    """
    if new not in _NEXT[old]:
        allowed = f"from {old} it can become {' or '.join(_NEXT[old])}"
        hint = "an operator can look and clear it: nohype quarantine list" if old == GuestState.QUARANTINED else allowed
        raise Conflict(f"guest {name} is {old} and can't become {new}", hint)
