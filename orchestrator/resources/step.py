"""A step: one change to the host with its undo. The undo record is on disk before the change is made.

What is needed to undo is plain JSON, so that a manager that was killed between any two writes can undo after it is started again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host.root import HostRoot
from orchestrator.ledger import EventKind, Ledger

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


_Step = TypeVar("_Step", bound=Step)


def run_steps(host: HostRoot, ledger: Ledger, owner: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Makes the changes in order, each after its undo record was committed; returns what was changed, in words.

    Stops at the first error and leaves the undoing to the caller, who knows what else was begun.

    Raises:
        OrchestratorError: from the step that failed.
    """
    changed: list[str] = []
    records = _Records(ledger, owner)
    for step in steps:
        before = step.read_before(host)
        if before is None:
            continue
        records.add(step, before)
        _log.info("%s: %s", owner, step.describe())
        missing = step.apply(host)
        changed.append(f"{step.describe()} ({missing})" if missing else step.describe())
    return tuple(changed)


def try_steps(
    host: HostRoot, ledger: Ledger, owner: str, steps: Sequence[_Step]
) -> tuple[tuple[str, ...], tuple[tuple[_Step, HostError], ...]]:
    """As ``run_steps``, for changes that do not need each other: the error of one stays with it, and the others are made.

    Returns:
        What was changed, in words, and the steps that failed. One that failed and has changed nothing leaves no undo record.
    """
    changed: list[str] = []
    failed: list[tuple[_Step, HostError]] = []
    records = _Records(ledger, owner)
    for step in steps:
        try:
            before = step.read_before(host)
        except HostError as error:
            failed.append((step, error))
            continue
        if before is None:
            continue
        id = records.add(step, before)
        _log.info("%s: %s", owner, step.describe())
        try:
            step.apply(host)
        except HostError as error:
            failed.append((step, error))
            if id is not None and _is_as(host, step, before):
                ledger.forget(id)
        else:
            changed.append(step.describe())
    return tuple(changed), tuple(failed)


class _Records:
    """The owner's undo records, read once: there may be thousands."""

    def __init__(self, ledger: Ledger, owner: str) -> None:
        self._ledger, self._owner = ledger, owner
        self._known: set[tuple[str, str]] | None = None

    def add(self, step: Step, before: Arguments) -> int | None:
        """Records how to undo the step; None if that is recorded already, as of a change that others keep reverting."""
        if self._known is None:
            self._known = {_key(record.action, record.arguments) for record in self._ledger.pending(self._owner)}
        key = _key(step.action, before)
        if key in self._known:
            return None
        self._known.add(key)
        return self._ledger.record(self._owner, step.action, before)


def _key(action: str, arguments: Arguments) -> tuple[str, str]:
    return action, json.dumps(arguments, sort_keys=True)


def _is_as(host: HostRoot, step: Step, before: Arguments) -> bool:
    """Whether the host still is as it was before the step, and so needs no undo."""
    try:
        return step.read_before(host) == before
    except HostError:
        return False


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
                ledger.log(EventKind.NOT_RESTORED, owner, different)
        except OrchestratorError as error:
            failed.append(error.message)
        else:
            ledger.forget(record.id)
    if failed:
        raise HostError(
            f"not everything done for {owner} could be undone: " + "; ".join(failed), "it is tried again at the next start"
        )
