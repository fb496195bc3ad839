"""A step: one change to the host with its undo. The undo record is on disk before the change is made.

What is needed to undo is plain JSON, so that a manager that was killed between any two writes can undo after it is started again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Ledger

_log = logging.getLogger(__name__)

Arguments = dict[str, object]
Undo = Callable[[HostRoot, Arguments], str | None]
"""Undoes one change; returns in words what could not be put back exactly as it was, though all is clean."""


class Step(Protocol):
    """One change to the host."""

    action: ClassVar[str]
    """Key of the function that undoes it, in the journal and in the table of undos."""

    def describe(self) -> str:
        """What the step does to what, for people."""

    def read_before(self, host: HostRoot) -> Arguments | None:
        """What undo needs, read from the host as it is now; None if the host is already as wanted."""

    def apply(self, host: HostRoot) -> str | None:
        """Makes the change and reads it back; returns in words what of it could not be made, and a guest can do without."""


def run_steps(host: HostRoot, ledger: Ledger, owner: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Makes the changes in order, each after its undo record was committed; returns what was changed, in words.

    Stops at the first error and leaves the undoing to the caller, who knows what else was begun.

    Raises:
        OrchestratorError: from the step that failed.
    """
    changed: list[str] = []
    for step in steps:
        before = step.read_before(host)
        if before is None:
            continue
        # A change that somebody else keeps reverting (a PF reset and VEPA) is undone once.
        if not any((record.action, record.arguments) == (step.action, before) for record in ledger.pending(owner)):
            ledger.record(owner, step.action, before)
        _log.info("%s: %s", owner, step.describe())
        missing = step.apply(host)
        changed.append(f"{step.describe()} ({missing})" if missing else step.describe())
    return tuple(changed)


def undo_steps(host: HostRoot, ledger: Ledger, owner: str, undos: Mapping[str, Undo]) -> None:
    """Undoes all that is recorded for the owner, newest first. A record is forgotten only after its undo worked.

    What is clean, but not as it was before, is an event.

    Raises:
        HostError: what could not be undone; everything else was, and what was not stays in the journal.
    """
    failed: list[str] = []
    for record in ledger.pending(owner):
        what = " ".join(f"{name}={value}" for name, value in record.arguments.items())
        _log.info("%s: undo %s %s", owner, record.action, what)
        try:
            if different := undos[record.action](host, record.arguments):
                ledger.log("not-restored", owner, different)
        except OrchestratorError as error:
            failed.append(error.message)
        else:
            ledger.forget(record.id)
    if failed:
        raise HostError(
            f"not everything done for {owner} could be undone: " + "; ".join(failed), "it is tried again at the next start"
        )
