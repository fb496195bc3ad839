"""Looks now and then whether running guests are still as they were made, and says each change once."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from orchestrator.errors import NotFound
from orchestrator.guests.core_manager import HOST, CoreManager
from orchestrator.ledger import Claim, EventKind, Ledger
from orchestrator.resources.cores import diff_pinning, diff_vcpus, restore_pinning
from orchestrator.resources.nic import VfStates, diff_devices, diff_vf, find_drivers

_LOOKS = 10
"""Looks after which the VFs are read though nobody has told of a change."""


class Lookout:
    """Compares guests with their claims. A guest's own methods are called with its lock held."""

    def __init__(self, cores: CoreManager, ledger: Ledger) -> None:
        self._cores, self._hypervisor, self._ledger = cores, cores.hypervisor, ledger
        # What was found last of each guest, and of the host; and what was put right.
        self._found: dict[str, tuple[str, ...]] = {}
        self._pins: dict[str, tuple[str, ...]] = {}
        # What the PFs enforce for their VFs, and whether that may have changed since: reading it costs.
        self._vfs: VfStates = {}
        self._links_changed = threading.Event()
        self._links_changed.set()
        self._looks = 0

    def links_changed(self) -> None:
        """An uplink or one of its VFs was set, as far as the kernel tells: the next look is at the VFs too."""
        self._links_changed.set()

    def begin(self) -> None:
        """Begins a look."""
        self._looks += 1
        # Now and then in any case: of a PF that is down, and of a request that fails half-way, the kernel does not tell.
        if self._links_changed.is_set() or self._looks % _LOOKS == 0:
            self._links_changed.clear()  # first: what changes while they are read is read at the next look
            self._vfs = self._cores.read_vfs()

    def look_at(self, claim: Claim) -> None:
        """Compares a running guest with its claim. What differs is reported, and put right only where that cannot hurt.

        Raises:
            HypervisorError, HostError: it can't be looked at.
        """
        plan, housekeeping = claim.plan, self._cores.housekeeping
        vfs = self._vfs
        if diff_vf(plan, vfs):
            vfs = self._cores.read_vfs()  # it may have been started again since: nobody else changes it from here on
        try:
            live = self._hypervisor.bounds(plan.uuid)
        except NotFound:
            return  # it is just ending
        pins = diff_pinning(plan, housekeeping, live)
        found = (*diff_vcpus(plan, live), *diff_devices(plan, live, find_drivers(self._cores.host, plan), vfs))
        if offline := self._cores.find_offline(plan):
            found = (f"its CPUs {offline} are offline", *found)
        if self._hypervisor.is_paused(plan.uuid):
            found = ("it is suspended", *found)
        if pins:
            restore_pinning(self._hypervisor, plan, housekeeping, live)
        before, self._pins[plan.name] = self._pins.get(plan.name, ()), pins
        # Something that changes pins again and again is told of once.
        self._report(plan.name, claim.owner, found, repaired=pins if pins != before else ())

    def look_at_pools(self, claims: Iterable[Claim]) -> None:
        """Whether what stopped guests own is still there."""
        self._report(HOST, "", self._cores.check_pools(tuple(claims)))

    def forget(self, name: str) -> None:
        """The guest is gone."""
        self._found.pop(name, None)
        self._pins.pop(name, None)

    def _report(self, subject: str, tenant: str, found: tuple[str, ...], repaired: tuple[str, ...] = ()) -> None:
        """Once for each change of what is found."""
        if repaired or found != self._found.get(subject, ()):
            said = (*(f"{one}: pinned again" for one in repaired), *found)
            self._ledger.log(EventKind.DRIFTED, subject, "; ".join(said) or "all is as it was", tenant=tenant)
            self._found[subject] = found
