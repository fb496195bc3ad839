"""What somebody may ask the system manager for: who may, what is planned and claimed for it, and what is shown of it."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from uuid import UUID

from orchestrator.errors import Conflict, Forbidden, NotFound
from orchestrator.guests.allocate import Placing, find_repeated
from orchestrator.guests.changes import Changes
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.console_watch import explain_gone
from orchestrator.guests.consoles import Consoles
from orchestrator.guests.core_manager import HOST, CoreManager
from orchestrator.guests.host_warnings import HOST_TOPIC, HostWarnings
from orchestrator.guests.observer import Observer, Unobserved
from orchestrator.guests.refusals import RefusalLog
from orchestrator.guests.transitions import Supervisor
from orchestrator.guests.vf_making import claim_with_vfs
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Claim, Event, EventKind, Ledger, Quarantined
from orchestrator.locks import WatchedLock
from orchestrator.model.access import Identity, Role, may_change, may_see
from orchestrator.model.guest_view import GuestView, view_guest
from orchestrator.model.plan import Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState
from orchestrator.model.topology import Topology
from orchestrator.planning.host_check import HostFinding, check_host
from orchestrator.values import CpuSet

_log = logging.getLogger(__name__)


class SystemManager:
    """Takes requests and makes guests of them. Changes of one guest come one after the other, those of several side by side.

    Args:
        host: the kernel's files.
        hypervisor: the connection to libvirt.
        ledger: claims and undo journal.
        policy: how the host is divided.
        images: folder of the built guest images.
        consoles: folder of the guests' console logs.
        observer: counts what no event tells.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, policy: Policy, *,
        images: Path, consoles: Path, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        observer = observer or Unobserved()
        self._host, self._hypervisor, self._ledger, self._policy = host, hypervisor, ledger, policy
        self._images = images
        # Held while something is changed that serves all guests.
        self._shared = WatchedLock()
        self._warnings = HostWarnings(ledger, HOST)
        logs = ConsoleLogs(ledger, consoles)
        self._cores = CoreManager(host, hypervisor, ledger, policy, self._warnings, self._shared, images, logs)
        self._placing = Placing(host, hypervisor, ledger, policy, self._shared, images, self._cores.launched, self._warnings)
        self.supervisor = Supervisor(self._cores, ledger, observer)
        self._refusals = RefusalLog(ledger, observer)
        self._consoles = Consoles(hypervisor, ledger, logs, images)
        self._changes = Changes(ledger, self._cores, self.supervisor.changing)
        self._happened = threading.Condition()
        self._closed = False
        ledger.on_event(self._wake)

    # What there is.

    def survey(self) -> Topology:
        """What the host has now."""
        return read_topology(self._host)

    def compare(self, topology: Topology) -> tuple[HostFinding, ...]:
        """How the configuration differs from the host; an event, if that has changed since the last time."""
        found = check_host(self._policy, topology)
        self._warnings.report(HOST_TOPIC, tuple(finding.text for finding in found))
        return found

    def guests(self, who: Identity) -> tuple[GuestView, ...]:
        """All guests that hold a claim and that ``who`` may see."""
        running = self._hypervisor.uuids()
        return tuple(view_guest(claim, running) for claim in self._ledger.read().claims if may_see(who, claim.owner))

    def guest(self, who: Identity, name: str) -> GuestView:
        """One guest.

        Raises:
            NotFound: no guest of this name holds a claim, or ``who`` may not see it.
        """
        return view_guest(self._changes.find(who, name), self._hypervisor.uuids())

    @property
    def housekeeping(self) -> CpuSet:
        """The CPUs that QEMU's threads of all guests may use, except vCPUs."""
        return self._cores.housekeeping

    def quarantined(self, who: Identity) -> tuple[Quarantined, ...]:
        """What could not be verified clean, for operators and viewers.

        Raises:
            Forbidden: ``who`` is a tenant.
        """
        if who.role is Role.TENANT:
            raise Forbidden("a tenant may not see the quarantine", "ask the operator of the host")
        return self._ledger.quarantined()

    def events(self, who: Identity, after: int | None = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Events that ``who`` may see, oldest first: those with ids above ``after``, or the newest if that is None."""
        if who.role is not Role.TENANT:
            return self._ledger.events(after, limit)
        return tuple(event.redacted() for event in self._ledger.events(after, limit, who.tenant))

    def last_event(self) -> int:
        """Id of the newest event, 0 before the first."""
        return self._ledger.last_event()

    def wait_events(self, who: Identity, after: int, timeout: float) -> tuple[Event, ...]:
        """As ``events``; waits at most ``timeout`` seconds until there are some."""
        deadline = time.monotonic() + timeout
        with self._happened:
            while not (found := self.events(who, after)) and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or not self._happened.wait(left):
                    break
        return found

    # What somebody asks for.

    def plan(self, who: Identity, request: GuestRequest) -> GuestView:
        """What the guest would get, without claiming it; or the guest, if the same was asked for before, by the same id.

        Raises:
            Conflict: the name is taken, or the id stands for another request.
            QuotaExceeded: the tenant may not have so much.
            RequestError, NotFound, NoRoom: see ``plan_guest`` and ``find_image``.
        """
        known = find_repeated(who, request, self._ledger.read().claims)
        if known:
            return view_guest(known, self._hypervisor.uuids())
        placed = self._placing.plan(who, request)
        warnings = () if who.role is Role.TENANT else placed.warnings
        return GuestView(placed.plan, "planned", request, who.tenant, warnings=warnings)

    def create(self, who: Identity, request: GuestRequest) -> tuple[GuestView, bool]:
        """Makes a guest: plan, claim, change the host, start. On any error all of it is undone.

        Returns:
            The guest, and whether it is new: False if the same was asked for before, by the same id.

        Raises:
            Conflict: the name is taken, or the id stands for another request.
            Forbidden: ``who`` may not change anything.
            QuotaExceeded: the tenant may not have so much.
            RequestError, NotFound, NoRoom: the request can't be met.
            HostError, HypervisorError: the kernel or libvirt refused.
        """
        if not may_change(who, who.tenant):
            raise Forbidden(f"{who.name} may look, but not make guests")
        with self._refusals.logging(request.name, who):
            other = self._ledger.find(request.name)
            if other and (other.owner != who.tenant or request.id is None or other.request.id != request.id):
                # At once: to wait until somebody is done with it would be no help, and could take an hour.
                raise Conflict(f"the name {request.name} is taken", "choose another name")
            known = find_repeated(who, request, self._ledger.read().claims)
            if known and known.state not in (GuestState.CREATING, GuestState.DELETING):
                # Likewise. Only what ends by itself soon is waited for: the first request, or the end of its guest.
                return view_guest(known, self._hypervisor.uuids()), False
        with self.supervisor.changing(request.name):
            began = time.monotonic()
            with self._refusals.logging(request.name, who):
                known = find_repeated(who, request, self._ledger.read().claims)
                if known:
                    return view_guest(known, self._hypervisor.uuids()), False
                plan, made = claim_with_vfs(lambda: self._placing.claim(who, request), self._cores, self.supervisor.release_host)
            pages = f"{plan.pages} pages of {plan.page_size} on node {plan.node}"
            what = f"CPUs {CpuSet.of(plan.cpus)}, {pages}, {', '.join(f'VF {nic.address}' for nic in plan.nics)}"
            claim = self._changes.find(who, plan.name)
            self.supervisor.note(EventKind.CLAIMED, claim, what, who.name, time.monotonic() - began)
            return view_guest(self.supervisor.start(claim, who.name, made), frozenset({plan.uuid})), True

    def start(self, who: Identity, name: str, expected: int | None = None) -> GuestView:
        """Starts a guest that is stopped, on the cores, pages and VF that it has claimed. One that runs already is fine.

        Args:
            expected: the version of the guest that the caller has seen, or None for any.

        Raises:
            NotFound: no such guest, or ``who`` may not see it.
            Forbidden: ``who`` may not change it.
            Stale: it is of another version.
            Conflict: its state does not allow it.
            HostError, HypervisorError: the kernel or libvirt refused; what was done is undone.
        """
        with self._changes.change(who, name, expected) as claim:
            runs = claim.plan.uuid in self._hypervisor.uuids()
            if claim.state == GuestState.RUNNING and not runs:
                claim = self.supervisor.stop(claim, who.name, 0)  # nobody has told of its end yet
            if claim.state == GuestState.STOPPED and runs:
                self.supervisor.recover_one(claim)
                raise Conflict(f"guest {name} runs already: somebody else has started it", "it is in quarantine now, and runs on")
            if claim.state != GuestState.RUNNING:
                self.supervisor.cancel_restart(name)
                claim = self._ledger.set_state(name, GuestState.STARTING, restarts=0)
                claim = self.supervisor.start(claim, who.name)
            return view_guest(claim, frozenset({claim.plan.uuid}))

    def stop(self, who: Identity, name: str, timeout: float, expected: int | None = None) -> GuestView:
        """Asks a guest to power off, and ends it if it has not after ``timeout`` seconds. Its claim is kept.

        Raises:
            As ``start``.
        """
        with self._changes.change(who, name, expected) as claim:
            return self._stop(who, claim, timeout)

    def kill(self, who: Identity, name: str, expected: int | None = None) -> GuestView:
        """Ends a guest at once, as pulling the plug does, even one that is just being stopped. Its claim is kept.

        Raises:
            As ``start``.
        """
        with self._changes.change(who, name, expected, hurry=True) as claim:
            return self._stop(who, claim, 0)

    def restart(self, who: Identity, name: str, timeout: float, expected: int | None = None) -> GuestView:
        """As ``stop``, then ``start``, with nobody in between."""
        with self._changes.change(who, name, expected):
            self.stop(who, name, timeout)
            return self.start(who, name)

    def delete(self, who: Identity, name: str, expected: int | None = None) -> None:
        """Ends a guest at once if it runs, and gives back all that it had, its claim included.

        Raises:
            As ``start``; Conflict also if it has ended, but went into quarantine, or was there already.
        """
        with self._changes.change(who, name, expected, hurry=True) as claim:
            if claim.state == GuestState.QUARANTINED:
                raise Conflict(f"guest {name} is in quarantine", "an operator can clear it: nohype quarantine clear")
            self._ledger.set_state(name, GuestState.DELETING)
            if findings := self.supervisor.delete(claim, EventKind.DELETED, "on request", who.name):
                what = f"guest {name} has ended, but is in quarantine, since not all that it had is clean"
                found = "" if who.role is Role.TENANT else f": {'; '.join(findings)}"
                raise Conflict(what + found, "an operator can look and clear it: nohype quarantine list")

    def clear_quarantine(self, who: Identity, name: str, expected: int | None = None, *, force: bool = False) -> None:
        """Tries once more to clean what a guest had, and gives it free.

        Args:
            expected: as of ``start``.
            force: give it free even if it is still not clean, since the operator has seen to it.

        Raises:
            Forbidden: ``who`` is no operator.
            NotFound: no such guest is in quarantine, or another guest has taken the name meanwhile.
            Stale: it is of another version.
            Conflict: it is still not clean; with the reasons.
        """
        if who.role is not Role.OPERATOR:
            raise Forbidden(f"{who.name} is no operator, and may not clear the quarantine")
        none = NotFound(f"no guest {name} is in quarantine", "`nohype quarantine list` shows what is")
        if not self._ledger.find(name):
            raise none
        with self._changes.change(who, name, expected) as claim:
            if claim.state != GuestState.QUARANTINED:
                raise none
            # First: one that runs and is to be deleted would count as running if this failed.
            self._hypervisor.destroy(claim.plan.uuid)
            claim = self._ledger.set_state(name, GuestState.DELETING)
            if force:
                self._cores.clean(claim.plan)
                self._cores.forget(claim.plan)
                self.supervisor.release(claim, EventKind.CLEARED, "by force", who.name)
            elif findings := self.supervisor.delete(claim, EventKind.CLEARED, "clean now", who.name):
                raise Conflict(f"{name} is still not clean: {'; '.join(findings)}", "see to it, then clear it with --force")

    def begin_ready(self, who: Identity, name: str, timeout: float) -> Future[str]:
        """Waits for the guest's own word that it is ready: that line. As ``Consoles.begin_ready``."""
        return self._consoles.begin_ready(self._changes.find(who, name), timeout)

    def begin_tell(self, who: Identity, name: str, line: str, timeout: float, uuid: UUID | None = None) -> Future[str]:
        """Types a line on the guest's console: its answer. As ``Consoles.begin_tell``.

        Args:
            uuid: the guest's id, None if the name is enough.

        Raises:
            NotFound: ``who`` may not see it, or another guest has the name.
            Forbidden: ``who`` may only look.
        """
        claim = self._changes.find_to_change(who, name)
        if uuid not in (None, claim.plan.uuid):
            raise explain_gone(name)
        return self._consoles.begin_tell(claim, line, timeout)

    def wait_ready(self, who: Identity, name: str, timeout: float) -> str:
        """As ``begin_ready``, and waits for it."""
        return self.begin_ready(who, name, timeout).result()

    def tell(self, who: Identity, name: str, line: str, timeout: float, uuid: UUID | None = None) -> str:
        """As ``begin_tell``, and waits for it."""
        return self.begin_tell(who, name, line, timeout, uuid).result()

    def tidy(self) -> None:
        """Removes what nobody needs any more; now and then. Raises as ``Consoles.tidy``."""
        self._consoles.tidy()

    def check(self, limit: float) -> None:
        """Looks whether what all requests need goes on.

        Raises:
            OrchestratorError: it has been held up for more than ``limit`` seconds.
        """
        self._shared.check(limit)
        self._placing.check(limit)

    def close(self) -> None:
        """Starts nothing any more, and ends what clients wait for. Guests go on."""
        self._closed = True
        self.supervisor.close()
        self._consoles.close()
        with self._happened:
            self._happened.notify_all()

    # How.

    def _stop(self, who: Identity, claim: Claim, timeout: float) -> GuestView:
        """See ``stop``; with the guest's lock held."""
        name = claim.plan.name
        if claim.state != GuestState.STOPPED:
            return view_guest(self.supervisor.stop(claim, who.name, timeout), frozenset())
        self.supervisor.cancel_restart(name)
        if claim.restarts:  # it waits to be started again: also for a manager that starts meanwhile
            claim = self._ledger.set_state(name, GuestState.STOPPED, restarts=0)
            self.supervisor.note(EventKind.STOPPED, claim, "it had ended, and is not started again", who.name)
        return view_guest(claim, frozenset())

    def _wake(self, event: Event) -> None:
        _log.log(event.severity, "%s %s: %s", event.subject, event.kind, event.detail, extra={"event": event})
        with self._happened:
            self._happened.notify_all()
