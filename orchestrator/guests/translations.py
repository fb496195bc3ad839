"""Sets translations of guests' VLANs again that an external switch has lost, as by a restart: their guests reach no other guest.

A translation that leads elsewhere is only reported: another operator may have changed it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

from orchestrator.errors import HostError
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.plan import Plan
from orchestrator.model.state import GuestState
from orchestrator.model.switch import SwitchState, SwitchTie
from orchestrator.resources.switch import TranslateVlan, has_translated, plan_translations, repeat_translation

_log = logging.getLogger(__name__)


class LostTranslations:
    """Args:
    find_tie: the switch port of an uplink; None if none is configured. Raises SwitchError.
    report: gets one text per change.
    """

    def __init__(self, ledger: Ledger, find_tie: Callable[[str], SwitchTie | None], report: Callable[[str], object]) -> None:
        self._ledger, self._find_tie, self._report = ledger, find_tie, report
        # By switch, what the last round has set, and why it could not.
        self._last: dict[str, tuple[list[str], str]] = {}

    def restore(self, name: str, state: SwitchState) -> None:
        """For the thread that watches the switch, with each state that it reads. What is the same as in the round before is not
        reported: a program may remove a translation again and again.
        """
        restored, failed = [], []
        for plan, step in self._list_lost(name, state):
            try:
                if repeat_translation(step, partial(self._is_running, plan)):
                    restored.append(step.describe())
            except HostError as error:
                failed.append(error.message)
        text = "; ".join(failed)
        before, self._last[name] = self._last.get(name, ([], "")), (restored, text)
        if restored and restored != before[0]:
            self._report(f"switch {name}: lost translations were set again: {'; '.join(restored)}")
        if text and text != before[1]:
            self._report(f"switch {name}: lost translations cannot be set again: {text}")

    def _list_lost(self, name: str, state: SwitchState) -> Iterator[tuple[Plan, TranslateVlan]]:
        """Those of running guests that the manager has set, and that the port does not have."""
        ports = {port.name: {channel.vlan for channel in port.channels} for port in state.ports}
        for claim in self._ledger.read().claims:
            if claim.state == GuestState.RUNNING:
                own = [step for step in self._plan(claim) if step.tie.switch.name == name and step.tie.port in ports]
                lost = [step for step in own if step.channel.vlan not in ports[step.tie.port]]
                records = self._ledger.undo_records(claim.plan.name) if lost else []
                for step in lost:
                    if has_translated(records, step):
                        yield claim.plan, step

    def _plan(self, claim: Claim) -> list[TranslateVlan]:
        try:
            return plan_translations(claim.plan, self._find_tie)
        except HostError as error:
            _log.debug("%s", error.message)  # of another uplink: the audit reports it
            return []

    def _is_running(self, plan: Plan) -> bool:
        """A guest leaves this state before its translations are undone."""
        now = self._ledger.find(plan.name)
        return now is not None and now.plan == plan and now.state == GuestState.RUNNING
