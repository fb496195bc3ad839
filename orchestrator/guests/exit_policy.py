"""Judges the exit policies of running guests, and reports, pauses or kills a guest that exceeds a budget."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from orchestrator.errors import Conflict, HostError, ImageError, NotFound, OrchestratorError
from orchestrator.guests.core_manager import CoreContext
from orchestrator.guests.host_warnings import HostWarnings
from orchestrator.guests.outcome import Outcome, log_errors, log_event
from orchestrator.guests.runs import RunKey, Runs, run_key
from orchestrator.guests.transitions import Transitions
from orchestrator.host.exit_trace import read_counts
from orchestrator.host.thread_counts import MMIO, read_counter
from orchestrator.images.store import find_build
from orchestrator.ledger import Claim, EventKind
from orchestrator.model.access import MANAGER
from orchestrator.model.exit_policy import (
    DEFAULT_POLICY,
    ExitBudgets,
    ExitCounts,
    ExitPolicies,
    Reaction,
    Violation,
    add_sample,
    classify_vcpus,
    judge,
)
from orchestrator.model.exit_policy import MMIO as MMIO_RULE
from orchestrator.model.state import GuestState

_log = logging.getLogger(__name__)

_URGENT_SECONDS, _SECONDS = 1.0, 14.5
"""Between two readings: while a policy is urgent, and otherwise, so that four times fill the minute of a budget and not more."""
_REPLY_SECONDS = 2.0
"""In which a guest prints what follows its reply to a command, as a prompt."""
_EXCUSE_SECONDS = 60.0
"""After which no reading is compared with one from before the end of an excuse."""
_TOPIC = "exit policies are not judged"

_Key = tuple[Reaction, str, str, str]
"""Action, vCPU class, rule and unit of what was reported."""
_DONE = {Reaction.REPORT: "reported", Reaction.PAUSE: "paused", Reaction.KILL: "killed"}


@dataclass
class _Watched:
    """A run of a guest after its boot."""

    policies: tuple[ExitBudgets, ...]
    history: tuple[ExitCounts, ...] = ()
    reported: set[_Key] = field(default_factory=set)
    failed: bool = False  # it could not be stopped, which was reported


@dataclass
class _Excuse:
    guest: UUID
    end: float = math.inf


class ExitPolicyWatch:
    """``check`` is called by one thread. One reading serves all guests."""

    def __init__(
        self, context: CoreContext, transitions: Transitions, warnings: HostWarnings, runs: Runs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._context, self._host, self._ledger = context, context.host, context.ledger
        self._transitions, self._warnings, self._runs, self._clock = transitions, warnings, runs, clock
        self._configured = context.setup.policy.exit_policies
        self._watched: dict[RunKey, _Watched] = {}
        self._excuses: list[_Excuse] = []
        self._excuse_lock = threading.Lock()

    @contextmanager
    def excused(self, guest: UUID) -> Iterator[None]:
        """Does not judge what the guest does meanwhile: the manager types on its console for an audit, and that is port I/O."""
        excuse, oldest = _Excuse(guest), self._clock() - _EXCUSE_SECONDS
        with self._excuse_lock:
            self._excuses = [*(one for one in self._excuses if one.end > oldest), excuse]
        try:
            yield
        finally:
            excuse.end = self._clock() + _REPLY_SECONDS

    def check(self) -> float | None:
        """One round. Returns seconds until the next; None if no guest has a policy and is beyond its boot."""
        claims = [claim for claim in self._ledger.read().claims if claim.state == GuestState.RUNNING and claim.disengaged]
        watched = {run_key(claim): self._find(claim) for claim in claims}
        self._watched = {key: one for key, one in watched.items() if one.policies}
        if not self._watched:
            return None
        urgent = any(policy.is_urgent for one in self._watched.values() for policy in one.policies)
        pause = _URGENT_SECONDS if urgent else _SECONDS
        begin = self._clock()
        try:
            counts, mmio = self._read_counts()
        except HostError as error:
            self._drop_histories()
            self._warnings.report(_TOPIC, (error.message,))
            return _SECONDS
        self._warnings.report(_TOPIC, ())
        end = self._clock()
        for claim in claims:
            one, run = self._watched.get(run_key(claim)), self._runs.find(claim)
            if one and run:
                vcpus = tuple({**counts.get(tid, {}), MMIO_RULE: mmio.get(tid, 0)} for tid in run.tids)
                if one.history and self._was_excused(claim.plan.uuid, one.history[-1].begin):
                    one.history = ()
                one.history = add_sample(one.history, ExitCounts(begin, end, vcpus))
                self._judge(claim, one)
        return pause

    def _read_counts(self) -> tuple[dict[int, dict[str, int]], dict[int, int]]:
        """Raises HostError if exits are not counted, or not all."""
        trace = read_counts(self._host)
        if trace.dropped:
            raise HostError(f"the kernel's histogram is full: {trace.dropped} exits were not counted")
        return {tid: dict(reasons) for tid, reasons in trace.threads.items()}, read_counter(self._host, MMIO)

    def _was_excused(self, guest: UUID, since: float) -> bool:
        return any(excuse.guest == guest and excuse.end > since for excuse in self._excuses)

    def _find(self, claim: Claim) -> _Watched:
        return self._watched.get(run_key(claim)) or _Watched(choose_policies(claim, self._configured, self._context.images))

    def _drop_histories(self) -> None:
        """What happens until the next reading is not measured."""
        for one in self._watched.values():
            one.history = ()

    def _judge(self, claim: Claim, one: _Watched) -> None:
        kinds = classify_vcpus(len(claim.plan.cpus), claim.request.housekeeping_vcpus)
        for policy in one.policies:
            fresh: dict[_Key, Violation] = {}
            for violation in judge(policy, kinds, one.history):
                key = policy.action, str(violation.kind), violation.rule, violation.unit
                if key not in one.reported and (key not in fresh or violation.count > fresh[key].count):
                    fresh[key] = violation
            if fresh:
                one.reported.update(fresh)
                self._react(claim, policy.action, fresh, one)

    def _react(self, claim: Claim, action: Reaction, violations: Mapping[_Key, Violation], one: _Watched) -> None:
        """In a thread if the guest is stopped: other guests are judged meanwhile."""
        text = "; ".join(map(str, violations.values()))
        if action is Reaction.REPORT:
            self._log(claim, f"{text}; {_DONE[action]}")
            return

        def work() -> None:
            try:
                self._stop(claim, action, text)
            except NotFound:
                return  # it has ended meanwhile
            except OrchestratorError as error:
                one.reported.difference_update(violations)  # the next rounds judge again, and stop the guest
                if not one.failed:
                    one.failed = True
                    self._log(claim, f"{text}; not {_DONE[action]}: {error.message}")
                raise

        threading.Thread(target=lambda: log_errors(work), name="exit-policy", daemon=True).start()

    def _stop(self, claim: Claim, action: Reaction, text: str) -> None:
        with self._transitions.guest_locks(claim.plan.name):
            now = self._ledger.find(claim.plan.name)
            if not now or run_key(now) != run_key(claim) or now.state != GuestState.RUNNING:
                return  # another request has ended this run
            if action is Reaction.PAUSE:
                self._context.hypervisor.pause(claim.plan.uuid)
            self._log(claim, f"{text}; {_DONE[action]}")
            if action is Reaction.KILL:
                self._transitions.stop(now, MANAGER.name, 0)

    def _log(self, claim: Claim, detail: str) -> None:
        log_event(self._ledger, claim, Outcome(EventKind.EXIT_POLICY, detail))


def choose_policies(claim: Claim, configured: ExitPolicies, images: Path) -> tuple[ExitBudgets, ...]:
    """The operator's policy, and that of the request, which can only add to it. All of them are judged."""
    found = configured.find(claim.owner)
    if found is None:
        found = DEFAULT_POLICY if _calls(claim, images) else None
    return tuple(policy for policy in (found, claim.request.exit_policy) if policy and not policy.is_empty)


def _calls(claim: Claim, images: Path) -> bool:
    with suppress(NotFound, ImageError, Conflict):
        return find_build(images, claim.plan.image).disengages
    return False
