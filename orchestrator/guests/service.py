"""The manager's functions for callers: access, idempotency and views. Guests change in `transitions`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from orchestrator.errors import Conflict, Forbidden, NotFound
from orchestrator.guests.allocate import Allocator, find_by_request_id
from orchestrator.guests.boot_images import BootImages
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.console_stream import ConsoleStream, Position
from orchestrator.guests.console_watch import guest_replaced_error
from orchestrator.guests.consoles import Consoles
from orchestrator.guests.core_manager import CoreContext, Launches
from orchestrator.guests.counters import with_counters
from orchestrator.guests.disengagement import Disengagements
from orchestrator.guests.disk_work import CountWipe, ignore_wipe
from orchestrator.guests.exit_policy import ExitPolicyWatch
from orchestrator.guests.exit_watch import ExitWatch
from orchestrator.guests.exits import Exits
from orchestrator.guests.guest_access import GuestAccess
from orchestrator.guests.host_setup import HOST, HostSetup
from orchestrator.guests.host_view import HostViews
from orchestrator.guests.host_warnings import HOST_TOPIC, HostWarnings
from orchestrator.guests.networks import Networks
from orchestrator.guests.outcome import Outcome, log_event
from orchestrator.guests.reconcile import Reconciler
from orchestrator.guests.records import Records
from orchestrator.guests.refusals import RefusalLog
from orchestrator.guests.runs import Runs
from orchestrator.guests.secrets import GuestSecrets
from orchestrator.guests.switches import SwitchService
from orchestrator.guests.transitions import Transitions
from orchestrator.guests.uplinks import Uplinks
from orchestrator.guests.vf_creation import claim_with_vfs
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Claim, Event, EventKind, Ledger, Quarantined
from orchestrator.model.access import Identity, Role, may_change, may_see
from orchestrator.model.guest_view import GuestView, view_guest, view_running
from orchestrator.model.plan import Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState
from orchestrator.model.switch import SwitchSettings
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import HairpinResult, Uplink
from orchestrator.planning.host_check import HostFinding, check_host
from orchestrator.values import CpuSet

_log = logging.getLogger(__name__)

# The host is not as the survey has it: the next plan would choose the same resource again.
_CONTRADICTS_SURVEY = (EventKind.FAILED, EventKind.PLAN_FAILED, EventKind.QUARANTINED, EventKind.UNDO_FAILED)


class GuestService:
    """Serves callers. Changes of one guest are made one after the other, changes of several guests in parallel.

    Methods with ``caller`` raise NotFound for a guest that the caller may not see, and Forbidden if it may not change the guest.
    Methods with ``expected`` (None for any) raise Stale if the guest is at another version.

    Args:
        images: folder of the built guest images.
        consoles: folder of the guests' console logs.
        count_undo_failure: called if a cleanup is not verified; must not raise.
        observe_refusal: gets kind and seconds of a refusal that is not in the event log; must not raise.
        count_wipe: called after the disks of a guest were wiped; must not raise.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, policy: Policy, *, images: Path, consoles: Path,
        count_undo_failure: Callable[[], object] = lambda: None,
        observe_refusal: Callable[[str, float], object] = lambda _kind, _seconds: None,
        switches: SwitchSettings = SwitchSettings(),  # noqa: B008
        count_wipe: CountWipe = ignore_wipe,
    ) -> None:  # fmt: skip
        self._host, self._ledger, self._uplinks, self._closed = host, ledger, Uplinks(host, ledger, policy), False
        self._warnings, logs = HostWarnings(ledger, HOST), ConsoleLogs(ledger, consoles)
        self.host_setup = setup = HostSetup(host, ledger, policy, self._warnings, count_undo_failure)
        launches, secrets, runs = Launches(), GuestSecrets(ledger), Runs(host, hypervisor)
        self.switches = SwitchService(host, ledger, switches)
        context = CoreContext(
            host, hypervisor, ledger, setup, launches, images, logs, secrets, find_tie=self.switches.find_tie,
            switch_key=switches.key,
        )  # fmt: skip
        self._disk_work, self.transitions = context.disk_work, Transitions(context, count_undo_failure, count_wipe)
        self.reconciler = Reconciler(context, self.transitions)
        self.allocator = Allocator(host, hypervisor, ledger, self._uplinks, setup.lock, images, launches, self._warnings, secrets)
        self._access = GuestAccess(ledger, self.transitions)
        self.exits = Exits(host, hypervisor, ledger, self._access)
        self.disengagements = Disengagements(context, self.exits, self._access, runs)
        self.exit_policies = ExitPolicyWatch(context, self.transitions, self._warnings, runs)
        self.exit_watch = ExitWatch(ledger, (self.disengagements.check, self.exit_policies.check))
        self._boot_images = BootImages(images, policy.boot)
        self.records, self._refusals = Records(ledger), RefusalLog(ledger, observe_refusal)
        self.networks = Networks(ledger, policy, self._refusals)
        self.host_views = HostViews(context, self.allocator, self._uplinks, self.reconciler, self.guests)
        self._consoles, self._new_event = Consoles(hypervisor, ledger, logs, images), threading.Condition()
        ledger.subscribe(self._on_event)

    # Views.

    def survey(self) -> Topology:
        return read_topology(self._host)

    def survey_with_use(self) -> Topology:
        """As ``survey``, with what the host uses its disks for: that takes longer. Guests' disks are not examined."""
        topology = self.survey()
        return replace(topology, controllers=self.allocator.read_disk_use(topology.controllers))

    def compare(self, topology: Topology) -> tuple[HostFinding, ...]:
        """Also writes an event if the findings have changed since the last call."""
        findings = check_host(self._uplinks.policy, topology)
        self._warnings.report(HOST_TOPIC, tuple(finding.text for finding in findings))
        return findings

    def uplinks(self, caller: Identity) -> tuple[Uplink, ...]:
        return self._uplinks.list(caller, self.survey())

    def uplink(self, caller: Identity, name: str) -> Uplink:
        found = self._uplinks.show(caller, name, self.survey())
        return with_counters(self._host, found, self._ledger.read().claims, self.switches.count_port)

    def set_uplink(self, caller: Identity, name: str, edge: str) -> Uplink:
        """Sets the edge mode for new guests; see ``Uplinks.set``."""
        self._uplinks.check_access(caller, name)
        topology = self.survey()
        self.allocator.lock.run(lambda: self._uplinks.set(caller, name, edge, topology))
        return self.uplink(caller, name)

    def prove_uplink(self, caller: Identity, name: str) -> HairpinResult:
        """Sends probe frames; see ``probe_hairpin``."""
        return self._uplinks.prove(caller, name)

    def guests(self, caller: Identity) -> tuple[GuestView, ...]:
        running = self.transitions.list_running()
        claims = (claim for claim in self._ledger.read().claims if may_see(caller, claim.owner))
        return tuple(view_guest(claim, running, self._disk_work.find(claim.plan.uuid)) for claim in claims)

    def guest(self, caller: Identity, name: str) -> GuestView:
        return self._view(self._access.find(caller, name))

    def quarantined(self, caller: Identity) -> tuple[Quarantined, ...]:
        if caller.role is Role.TENANT:
            raise Forbidden("a tenant may not see the quarantine", "ask the operator of the host")
        return self._ledger.quarantined()

    def events(self, caller: Identity, after: int | None = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Oldest first. ``after``: events with higher ids, or the newest if None."""
        if caller.role is not Role.TENANT:
            return self._ledger.events(after, limit)
        return tuple(event.redacted() for event in self._ledger.events(after, limit, caller.tenant))

    def last_event(self) -> int:
        """0 without events."""
        return self._ledger.last_event()

    def wait_events(self, caller: Identity, after: int, timeout: float) -> tuple[Event, ...]:
        """As ``events``; waits up to ``timeout`` seconds for the first."""
        deadline = time.monotonic() + timeout
        with self._new_event:
            while not (events := self.events(caller, after)) and not self._closed:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._new_event.wait(remaining):
                    break
        return events

    # Changes.

    def plan(self, caller: Identity, request: GuestRequest) -> GuestView:
        """Claims nothing. Returns the guest itself if it was created with the same request id."""
        known = find_by_request_id(caller, request, self._ledger.read().claims)
        if known:
            return self._view(known)
        if request.boot:
            self._boot_images.check(caller, request.boot)
        placed = self.allocator.plan(caller, request)
        warnings = () if caller.role is Role.TENANT else placed.list_warnings(self._uplinks.policy)
        return GuestView(placed.plan, "planned", request.without_secret_texts(), caller.tenant, warnings=warnings)

    def create(self, caller: Identity, request: GuestRequest) -> tuple[GuestView, bool]:
        """Plans, claims and launches a guest; undoes everything on failure. False if it exists with the same request id."""
        if not may_change(caller, caller.tenant):
            raise Forbidden(f"{caller.name} may not create guests")
        with self._refusals.logging(request.name, caller):
            # Before the wait for the lock, which can take an hour.
            other = self._ledger.find(request.name)
            if other and (other.owner != caller.tenant or request.id is None or other.request.id != request.id):
                raise Conflict(f"the name {request.name} is taken", "choose another name")
            known = find_by_request_id(caller, request, self._ledger.read().claims)
            if known and known.state not in (GuestState.CREATING, GuestState.DELETING, GuestState.WIPING):
                return self._view(known), False
            if request.boot:
                self._boot_images.ensure(caller, request.boot)
        with self.transitions.guest_locks(request.name):
            started_at = time.monotonic()
            with self._refusals.logging(request.name, caller):
                known = find_by_request_id(caller, request, self._ledger.read().claims)
                if known and known.state == GuestState.WIPING:
                    raise Conflict(f"guest {known.plan.name} was deleted and its disks are being wiped", "retry with a new id")
                if known:
                    return self._view(known), False
                claim, changed = claim_with_vfs(
                    lambda: self.allocator.claim(caller, request), self.host_setup.create_vfs, self.host_setup.release
                )
            plan = claim.plan
            pages = f"{plan.pages} pages of {plan.page_size} on node {plan.node}"
            nics = [*(f"VF {vf.address}" for vf in plan.vfs), *(f"{nic.tap} ({nic.edge})" for nic in plan.software_nics)]
            devices = [*nics, *(f"disk {disk.key}" for disk in plan.disks)]
            weaker = f"; weaker: {', '.join(plan.waived)}" if plan.waived else ""
            detail = f"CPUs {CpuSet.of(plan.cpus)}, {pages}, {', '.join(devices)}{weaker}"
            log_event(self._ledger, claim, Outcome(EventKind.CLAIMED, detail, caller.name, started_at))
            return view_running(self.transitions.launch(claim, caller.name, changed)), True

    def start(self, caller: Identity, name: str, expected: int | None = None) -> GuestView:
        """Starts a stopped guest on the resources that it owns; no-op if it runs."""
        with self._access.lock_for_change(caller, name, expected) as claim:
            return view_running(self.transitions.start(claim, caller.name))

    def stop(self, caller: Identity, name: str, timeout: float, expected: int | None = None) -> GuestView:
        """Forces the guest off after ``timeout`` seconds. Keeps its claim."""
        with self._access.lock_for_change(caller, name, expected) as claim:
            return self._stop(caller, claim, timeout)

    def kill(self, caller: Identity, name: str, expected: int | None = None) -> GuestView:
        """Forces a guest off, also during a shutdown. Keeps its claim."""
        with self._access.lock_for_change(caller, name, expected, expire_shutdown=True) as claim:
            return self._stop(caller, claim, 0)

    def restart(self, caller: Identity, name: str, timeout: float, expected: int | None = None) -> GuestView:
        """``stop`` and ``start`` without another change in between."""
        with self._access.lock_for_change(caller, name, expected):
            self.stop(caller, name, timeout)
            return self.start(caller, name)

    def delete(self, caller: Identity, name: str, expected: int | None = None) -> None:
        """Forces the guest off and releases its claim. Raises Conflict if it is quarantined before or after that."""
        with self._access.lock_for_deletion(caller, name, expected) as claim:
            if claim is None:
                return
            if claim.state == GuestState.WIPING:
                return
            if claim.state == GuestState.QUARANTINED:
                raise Conflict(f"guest {name} is in quarantine", "clear it as an operator: `nohype quarantine clear`")
            if findings := self.transitions.delete(claim, Outcome(EventKind.DELETED, "on request", caller.name)):
                reasons = "" if caller.role is Role.TENANT else f": {'; '.join(findings)}"
                message = f"guest {name} was stopped and quarantined: cleanup not verified{reasons}"
                raise Conflict(message, "check it as an operator: `nohype quarantine list`")

    def clear_quarantine(self, caller: Identity, name: str, expected: int | None = None, *, force: bool = False) -> None:
        """Repeats the cleanup and releases the claim; with ``force`` even if the cleanup is not verified."""
        if caller.role is not Role.OPERATOR:
            raise Forbidden(f"{caller.name} is not an operator and may not clear the quarantine")
        not_quarantined = NotFound(f"guest {name} is not in quarantine", "`nohype quarantine list` shows quarantined guests")
        if not self._ledger.find(name):
            raise not_quarantined
        with self._access.lock_for_change(caller, name, expected) as claim:
            if claim.state != GuestState.QUARANTINED:
                raise not_quarantined
            if findings := self.transitions.clear(claim, caller.name, force=force):
                raise Conflict(f"{name}: verification failed: {'; '.join(findings)}", "fix the cause, or use --force")

    # Consoles.

    def begin_ready(self, caller: Identity, name: str, timeout: float) -> Future[str]:
        return self._consoles.begin_ready(self._access.find(caller, name), timeout)

    def begin_command(self, caller: Identity, name: str, line: str, timeout: float, uuid: UUID | None = None) -> Future[str]:
        """Raises NotFound if ``uuid`` is not the guest's; None matches any."""
        claim = self._access.find_for_change(caller, name)
        if uuid not in (None, claim.plan.uuid):
            raise guest_replaced_error(name)
        return self._consoles.begin_command(claim, line, timeout)

    def begin_reading(
        self, caller: Identity, name: str, lines: int = 0, *, follow: bool = True, after: Position | None = None
    ) -> ConsoleStream:
        return self._consoles.begin_reading(self._access.find(caller, name), lines, follow=follow, after=after)

    def type_console(self, caller: Identity, name: str, uuid: UUID, data: bytes) -> int:
        """Returns how many bytes the console took. Raises NotFound if ``uuid`` is not the guest's."""
        claim = self._access.find_for_change(caller, name)
        if uuid != claim.plan.uuid:
            raise guest_replaced_error(name)
        return self._consoles.type(claim, data)

    def wait_ready(self, caller: Identity, name: str, timeout: float) -> str:
        return self.begin_ready(caller, name, timeout).result()

    def send_command(self, caller: Identity, name: str, line: str, timeout: float, uuid: UUID | None = None) -> str:
        """Exit policies do not judge the guest meanwhile."""
        with self.exit_policies.excused(uuid or self._access.find_for_change(caller, name).plan.uuid):
            return self.begin_command(caller, name, line, timeout, uuid).result()

    def remove_boot_images(self) -> None:
        """Removes the images from boot servers that guests have not used for some time."""
        self._boot_images.remove_unused(lambda: self._ledger.read().claims)

    def remove_old_logs(self) -> None:
        self._consoles.remove_old_logs()

    # The manager's own.

    def raise_if_stalled(self, limit: float) -> None:
        """Raises OrchestratorError if a lock that all requests need has been held for more than ``limit`` seconds."""
        self.host_setup.lock.raise_if_held_longer(limit)
        self.allocator.lock.raise_if_held_longer(limit)

    def close(self) -> None:
        """Cancels scheduled restarts and waits of clients. Guests keep running."""
        self._closed = True
        self.transitions.close()
        self.switches.close()
        self.exit_watch.close()
        self._consoles.close()
        with self._new_event:
            self._new_event.notify_all()

    def _stop(self, caller: Identity, claim: Claim, timeout: float) -> GuestView:
        if claim.state == GuestState.STOPPED:
            claim = self.transitions.cancel_restart(claim, caller.name)
        else:
            claim = self.transitions.stop(claim, caller.name, timeout)
        return view_guest(claim, frozenset())

    def _view(self, claim: Claim) -> GuestView:
        return view_guest(claim, self.transitions.list_running(), self._disk_work.find(claim.plan.uuid))

    def _on_event(self, event: Event) -> None:
        _log.log(event.severity, "%s %s: %s", event.subject, event.kind, event.detail, extra={"event": event})
        with self._new_event:
            self._new_event.notify_all()
        if event.kind in _CONTRADICTS_SURVEY:
            self.allocator.surveys.discard()
        if event.kind in (EventKind.STARTED, EventKind.ADOPT) and (claim := self._ledger.find(event.subject)):
            counts_calls = self.disengagements.counts_calls()
            self._consoles.begin_learning(claim, self.disengagements.on_ready, counts_calls=counts_calls)
