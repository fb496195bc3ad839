"""Detects drift of running guests and reports each change once."""

from __future__ import annotations

import threading
from uuid import UUID

from orchestrator.errors import HostError, NotFound
from orchestrator.guests.core_manager import CoreContext, find_offline
from orchestrator.guests.host_setup import HOST
from orchestrator.ledger import Claim, EventKind
from orchestrator.model.event import utc_now
from orchestrator.model.host_view import Drift
from orchestrator.model.plan import Plan
from orchestrator.resources import cache, disk
from orchestrator.resources.cores import diff_pinning, diff_vcpus, restore_pinning
from orchestrator.resources.nic import VfStates, diff_devices, diff_vf, find_drivers
from orchestrator.resources.tap import diff_taps, restore_taps

FORCE_VF_READ_EVERY = 10
"""Rounds between reads of all VFs without a link change: the kernel announces neither changes of the VFs of a PF that
is down, nor requests that fail half-way."""


class DriftDetector:
    def __init__(self, context: CoreContext) -> None:
        self._host, self._hypervisor, self._ledger = context.host, context.hypervisor, context.ledger
        self._setup = context.setup
        # By guest; None is the host.
        self._last_reported: dict[UUID | None, tuple[str, ...]] = {}
        self._current: dict[UUID | None, Drift] = {}
        self._last_repaired: dict[UUID, tuple[str, ...]] = {}
        self._unrestored: dict[UUID, tuple[str, ...]] = {}  # differences of taps that restoring them has left
        # Settings of the VFs, and whether they may have changed since: reading them is slow.
        self._vf_states: VfStates = {}
        self._links_changed = threading.Event()
        self._links_changed.set()
        self._rounds = 0

    def on_link_change(self) -> None:
        """The kernel reported a change of an uplink or VF (do_setlink(), rtnetlink.c): the next round reads the VFs."""
        self._links_changed.set()

    def begin_round(self, claims: tuple[Claim, ...]) -> None:
        """Forgets deleted guests, and reads the VFs if they may have changed."""
        uuids = {claim.plan.uuid for claim in claims}
        self._last_reported = {key: value for key, value in self._last_reported.items() if key is None or key in uuids}
        self._current = {key: value for key, value in self._current.items() if key is None or key in uuids}
        self._last_repaired = {key: value for key, value in self._last_repaired.items() if key in uuids}
        self._unrestored = {key: value for key, value in self._unrestored.items() if key in uuids}
        self._rounds += 1
        if self._links_changed.is_set() or self._rounds % FORCE_VF_READ_EVERY == 0:
            self._links_changed.clear()  # before the reading: a later change is read in the next round
            self._vf_states = self._setup.read_vf_states()

    def check_guest(self, claim: Claim) -> None:
        """Reports drift, and restores the pinning. The caller holds the guest's lock."""
        plan, housekeeping = claim.plan, self._setup.housekeeping
        states = self._vf_states
        if diff_vf(plan, states):
            states = self._setup.read_vf_states()  # the guest may have been restarted during this round
        try:
            running = self._hypervisor.read_pinning(plan.uuid)
        except NotFound:
            return  # it is ending
        pinning = diff_pinning(plan, housekeeping, running)
        findings = (*diff_vcpus(plan, running), *diff_devices(plan, running, find_drivers(self._host, plan), states))
        findings += disk.diff_disks(plan, disk.find_drivers(self._host, plan))
        findings += self._diff_caches(plan)
        edges, remaining = self._restore_taps(plan)
        findings += remaining
        if offline := find_offline(self._host, plan):
            findings = (f"CPUs {offline} are offline", *findings)
        if running.paused:
            findings = ("suspended", *findings)
        if pinning:
            restore_pinning(self._hypervisor, plan, housekeeping, running)
        repaired = (*pinning, *edges)
        before, self._last_repaired[plan.uuid] = self._last_repaired.get(plan.uuid, ()), repaired
        # A program that makes the same change again and again is reported once.
        self._report(claim, findings, repaired=repaired if repaired != before else ())

    def _diff_caches(self, plan: Plan) -> tuple[str, ...]:
        """What cannot be read is drift too: another program has mounted resctrl anew. The pinning is restored nevertheless."""
        try:
            return cache.diff_group(self._host, plan)
        except HostError as error:
            return (error.message,)

    def _restore_taps(self, plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns what was restored, and the differences that remain."""
        findings: tuple[str, ...] = ()
        errors: tuple[str, ...] = ()
        try:
            findings = remaining = diff_taps(self._host, plan)
            if findings:
                self._setup.set_reception(plan)  # has an undo record, unlike the settings of the tap
                done = restore_taps(self._host, plan)
                findings, remaining = tuple(dict.fromkeys((*findings, *done.found))), done.remaining
        except HostError as error:
            remaining, errors = findings, (error.message,)
        # Others are changes made meanwhile: they are still to be restored.
        self._unrestored[plan.uuid] = tuple(finding for finding in remaining if finding in findings)
        return tuple(finding for finding in findings if finding not in remaining), (*remaining, *errors)

    def has_changed_taps(self, claim: Claim) -> bool:
        """Since they were last restored: the kernel reports each attempt as a link change, which must not cause the next one."""
        try:
            return diff_taps(self._host, claim.plan) != self._unrestored.get(claim.plan.uuid, ())
        except HostError:
            return True

    def list_current(self) -> tuple[Drift, ...]:
        """The differences that the last check has found and not restored, oldest first."""
        return tuple(sorted(self._current.copy().values(), key=lambda drift: drift.since))

    def check_pools(self, claims: tuple[Claim, ...]) -> None:
        """Reports pools that lack pages of stopped guests."""
        self._report(None, self._setup.find_pool_shortfalls(claims))

    def _report(self, claim: Claim | None, findings: tuple[str, ...], repaired: tuple[str, ...] = ()) -> None:
        key = claim.plan.uuid if claim else None
        if repaired or findings != self._last_reported.get(key, ()):
            detail = "; ".join((*(f"{finding} (restored)" for finding in repaired), *findings)) or "no differences remain"
            subject, tenant = (claim.plan.name, claim.owner) if claim else (HOST, "")
            self._ledger.append_event(EventKind.DRIFTED, subject, detail, tenant=tenant)
            self._last_reported[key] = findings
            if findings:
                self._current[key] = Drift(subject, utc_now(), findings)
            else:
                self._current.pop(key, None)
