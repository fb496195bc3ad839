"""A step: one change to the host with its undo. The undo record is in the ledger before the change is made.

Undo records are plain JSON: a manager that was killed between any two writes undoes the changes after its next start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, get_type_hints

from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import EventKind, Ledger, UndoRecord
from orchestrator.model.disk import DiskProgress
from orchestrator.model.plain import from_plain, to_plain
from orchestrator.model.plan import Plan

_log = logging.getLogger(__name__)

Arguments = dict[str, object]
"""The arguments of an undo, as plain JSON types."""

_UNDO_BY_HAND = "start the version of nohyped that wrote it, or undo the change by hand and clear the guest with --force"

_T = TypeVar("_T")


def to_arguments(before: object) -> Arguments:
    """Inverse of ``parse_arguments``."""
    return dict(to_plain(before))


def parse_arguments(kind: type[_T], arguments: Arguments) -> _T:
    """Reads arguments, perhaps of an earlier version; ignores unknown fields. Raises HostError for a missing or wrong field."""
    known = get_type_hints(kind)
    try:
        return from_plain(kind, {name: value for name, value in arguments.items() if name in known})
    except ValueError as error:
        raise HostError(f"the undo record {arguments} cannot be read: {error}", _UNDO_BY_HAND) from None


@dataclass(frozen=True)
class GuestContext:
    """The guest that a change is made for."""

    plan: Plan
    ledger: Ledger
    hypervisor: Hypervisor


@dataclass(frozen=True)
class UndoContext:
    """``guest`` is None for a change that serves all guests. ``progress`` is called after each piece of long work.

    ``switch_key``: file with the SSH key for external switches; empty for that of the record.
    """

    host: HostRoot
    guest: GuestContext | None = None
    progress: Callable[[DiskProgress], None] = lambda _: None
    switch_key: str = ""


class Step(Protocol):
    """One change to the host."""

    action: ClassVar[str]
    """Name of the undo in the journal. It never changes: journals of earlier versions are read."""

    def describe(self) -> str:
        """The text for event log and journal."""

    def read_before(self, host: HostRoot) -> Arguments | None:
        """The arguments of ``undo``; None if the host is already as wanted. Writes nothing."""

    def apply(self, host: HostRoot) -> str | None:
        """Makes the change and reads it back; returns optional settings that could not be set, or None."""

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> str | None:
        """Idempotent, and harmless if the change was never made. ``arguments`` may be of an earlier version.

        Returns what is clean but could not be restored exactly, or None.
        """


STEPS: dict[str, type[Step]] = {}
"""Action → step class. Filled by ``register`` when the modules of this package are imported."""

_Step = TypeVar("_Step", bound=Step)
_StepClass = TypeVar("_StepClass", bound=type[Step])


def register(step: _StepClass) -> _StepClass:
    if step.action in STEPS:
        raise ValueError(f"two step classes have the action {step.action}")
    STEPS[step.action] = step
    return step


_LASTING: set[str] = set()


def lasting(step: _StepClass) -> _StepClass:
    """For a change that stays while its guest is stopped. Its undo may take hours; its record survives a power cut."""
    _LASTING.add(step.action)
    return step


def run_steps(host: HostRoot, ledger: Ledger, owner: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Makes the changes in order, each after its undo record was committed; returns what was changed.

    Stops at the first error. Undoes nothing: the caller knows which other work was started.
    """
    changed: list[str] = []
    records = _Records(ledger, owner)
    for step in steps:
        before = step.read_before(host)
        if before is None:
            continue
        records.add(step, before)
        _log.info("%s: %s", owner, step.describe())
        unset = step.apply(host)
        changed.append(f"{step.describe()} ({unset})" if unset else step.describe())
    return tuple(changed)


def try_steps(
    host: HostRoot, ledger: Ledger, owner: str, steps: Sequence[_Step]
) -> tuple[tuple[str, ...], tuple[tuple[_Step, HostError], ...]]:
    """As ``run_steps`` for independent changes: a failed step does not stop the others. Also returns the failed steps.

    A step that failed and changed nothing leaves no undo record.
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
            if id is not None and _is_unchanged(host, step, before):
                ledger.drop_undo_record(id)
        else:
            changed.append(step.describe())
    return tuple(changed), tuple(failed)


class _Records:
    """The owner's undo records, read once: there may be thousands."""

    def __init__(self, ledger: Ledger, owner: str) -> None:
        self._ledger, self._owner = ledger, owner
        self._known: set[tuple[str, str]] | None = None

    def add(self, step: Step, before: Arguments) -> int | None:
        """None if the same record exists, as for a change that another program keeps reverting."""
        if self._known is None:
            self._known = {_key(record.action, record.arguments) for record in self._ledger.undo_records(self._owner)}
        key = _key(step.action, before)
        if key in self._known:
            return None
        self._known.add(key)
        return self._ledger.add_undo_record(self._owner, step.action, before, durable=step.action in _LASTING)


def _key(action: str, arguments: Arguments) -> tuple[str, str]:
    return action, json.dumps(arguments, sort_keys=True)


def _is_unchanged(host: HostRoot, step: Step, before: Arguments) -> bool:
    try:
        return step.read_before(host) == before
    except HostError:
        return False


def undo_steps(context: UndoContext, ledger: Ledger, owner: str, *, lasting: bool = False) -> None:
    """Undoes the recorded changes of the owner, newest first. A record is dropped only after its undo succeeded.

    ``lasting``: undoes the lasting changes, which are kept otherwise. If one of a disk fails, the older ones of the same disk are
    kept: a disk that is not verified clean stays reserved.

    What is clean but could not be restored exactly becomes an event. Raises HostError after the last undo if some failed.
    """
    failed: list[OrchestratorError] = []
    unclean: set[object] = set()
    for record in ledger.undo_records(owner):
        disk = _name_disk(record) if lasting else None
        if (record.action in _LASTING) is not lasting or disk in unclean:
            continue
        arguments = " ".join(f"{name}={value}" for name, value in record.arguments.items())
        _log.info("%s: undo %s %s", owner, record.action, arguments)
        try:
            if difference := _find_step(record, context).undo(context, record.arguments):
                ledger.append_event(EventKind.NOT_RESTORED, owner, difference)
        except OrchestratorError as error:
            failed.append(error)
            unclean |= {disk} if disk is not None else set()
        else:
            ledger.drop_undo_record(record.id)
    if failed:
        hints = dict.fromkeys(error.hint for error in failed if error.hint)
        raise HostError(f"cleanup of {owner} is incomplete: {'; '.join(error.message for error in failed)}", "; ".join(hints))


def _name_disk(record: UndoRecord) -> object:
    return next((record.arguments[name] for name in ("serial", "file") if name in record.arguments), None)


def _find_step(record: UndoRecord, context: UndoContext) -> type[Step]:
    step = STEPS.get(record.action)
    if step is None:
        owner = f"guest {record.owner}" if context.guest else "the host"
        raise HostError(f"unknown undo action {record.action} of {owner}: written by another version", _UNDO_BY_HAND)
    return step
