"""The states of a guest and the changes allowed between them. Pure."""

from __future__ import annotations

from enum import StrEnum

from orchestrator.errors import Conflict


class GuestState(StrEnum):
    """In each state except RUNNING, the undo journal tells whether the host was changed for the guest."""

    CREATING = "creating"
    """The first start is in progress. If it fails, the claim is released."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    """The guest is being stopped, or has ended, and is being cleaned up."""
    STOPPED = "stopped"
    """The guest is verified clean and keeps its claim."""
    DELETING = "deleting"
    """As STOPPING; the claim is released afterwards."""
    WIPING = "wiping"
    """All other resources are released; the disks are being wiped, after which the claim is released."""
    QUARANTINED = "quarantined"
    """The cleanup is not verified, or the guest runs unexpectedly: the claim stays until an operator clears it."""


SETTLED = (GuestState.RUNNING, GuestState.STOPPED, GuestState.QUARANTINED)
"""States without a change in progress."""

_NEXT: dict[GuestState, tuple[GuestState, ...]] = {
    GuestState.CREATING: (GuestState.RUNNING, GuestState.DELETING),
    GuestState.STARTING: (GuestState.RUNNING, GuestState.STOPPING, GuestState.DELETING),
    GuestState.RUNNING: (GuestState.STOPPING, GuestState.DELETING),
    # To themselves: a failed cleanup is repeated. To RUNNING: the manager crashed before it had stopped the guest.
    GuestState.STOPPING: (
        GuestState.STOPPING, GuestState.STOPPED, GuestState.DELETING, GuestState.QUARANTINED, GuestState.RUNNING,
    ),
    # To itself: a scheduled restart is cancelled. To QUARANTINED: the guest was started outside the manager.
    GuestState.STOPPED: (GuestState.STOPPED, GuestState.STARTING, GuestState.DELETING, GuestState.QUARANTINED),
    GuestState.DELETING: (GuestState.DELETING, GuestState.QUARANTINED, GuestState.RUNNING, GuestState.WIPING),
    GuestState.WIPING: (GuestState.QUARANTINED,),
    GuestState.QUARANTINED: (GuestState.DELETING,),
}  # fmt: skip


def check_transition(name: str, old: GuestState, new: GuestState) -> None:
    """Raises Conflict, with both states and the allowed ones."""
    if new not in _NEXT[old]:
        allowed = f"from {old} it can become {' or '.join(_NEXT[old])}"
        hint = "clear it as an operator, see `nohype quarantine list`" if old == GuestState.QUARANTINED else allowed
        raise Conflict(f"guest {name} is {old} and can't become {new}", hint)
