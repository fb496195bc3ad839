"""Resources of all guests: VFs, edge modes, kernel threads and interrupts. Undone after the last guest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from orchestrator.errors import HostError, OrchestratorError
from orchestrator.guests.host_warnings import HostWarnings
from orchestrator.guests.outcome import log_errors
from orchestrator.host.cpus import read_isolated, read_online, read_possible
from orchestrator.host.edge import SOFTWARE, find_link, may_have_vepa, read_edge_mode
from orchestrator.host.exit_trace import is_counting, make_room
from orchestrator.host.hugepages import survey_pools
from orchestrator.host.isolation import Division
from orchestrator.host.partitions import add_exclusive, list_parents, make_partition
from orchestrator.host.ports import find_port, has_port
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_numvfs, read_pf
from orchestrator.host.switch_trace import make_room as make_room_for_switches
from orchestrator.ledger import Claim, EventKind, Ledger
from orchestrator.locks import WatchedLock
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.state import GuestState
from orchestrator.model.topology import VfState
from orchestrator.resources.cache import ShrinkDefaultGroup
from orchestrator.resources.cores import clear_cores
from orchestrator.resources.exit_trace import CountExits
from orchestrator.resources.isolation import AddExclusive, describe_failure, plan_isolation_settings
from orchestrator.resources.nic import CreateVfs, VfStates
from orchestrator.resources.step import UndoContext, run_steps, try_steps, undo_steps
from orchestrator.resources.switch_trace import CountSwitches
from orchestrator.resources.uplink import CountReturns, SetEdgeMode, SetPromiscuous
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_log = logging.getLogger(__name__)

HOST = "host"
"""Owner of the host's undo records, which is not a valid name for a guest."""

_WITH_TAPS = (GuestState.CREATING, GuestState.STARTING, GuestState.RUNNING)


class HostSetup:
    """Prepares the host for guests. ``lock`` is held while resources of all guests change.

    Args:
        warnings: receives what could not be moved off the guest cores.
        count_undo_failure: called if a change could not be undone; must not raise.
    """

    def __init__(
        self, host: HostRoot, ledger: Ledger, policy: Policy, warnings: HostWarnings, count_undo_failure: Callable[[], object]
    ) -> None:
        self.lock = WatchedLock()
        self._host, self._ledger, self._policy, self._warnings = host, ledger, policy, warnings
        self._count_undo_failure = count_undo_failure
        # PFs and uplinks of software edges. While it is not empty, movable kernel threads and interrupts are off the guest cores.
        # Changed with the lock held.
        self._prepared: set[PciAddress | str] = set()
        self._undo_error = ""

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def housekeeping(self) -> CpuSet:
        """The online housekeeping CPUs, or all of them if none is online: the kernel confines nothing to offline CPUs."""
        housekeeping = self._policy.housekeeping
        return housekeeping & read_online(self._host) or housekeeping

    def prepare(self, plan: Plan) -> tuple[str, ...]:
        """Prepares the plan's uplinks unless that is done; returns what was changed."""
        changed: tuple[str, ...] = ()
        for pf, interface in _list_pfs([plan]).items():
            if pf not in self._prepared or not read_numvfs(self._host, pf):
                changed += self.create_vfs(pf, interface)
        for uplink in sorted({nic.interface for nic in plan.software_nics} - self._prepared):
            changed += self._prepare_uplink(uplink)
        if plan.caches and plan.caches.shares:
            with self.lock:
                changed += run_steps(self._host, self._ledger, HOST, [ShrinkDefaultGroup(plan.caches)])
        changed += self.set_reception(plan)
        self.count_returns()
        return changed

    def set_reception(self, plan: Plan) -> tuple[str, ...]:
        """Lets the plan's uplinks receive the frames to the guest; returns what was changed. Each time: another program may have
        reset it. No-op for an uplink that does not exist.
        """
        if not (wanted := {nic.interface for nic in plan.software_nics if SOFTWARE[nic.edge].PROMISCUOUS}):
            return ()
        steps = [SetPromiscuous(uplink) for uplink in sorted(wanted) if find_link(self._host, uplink)]
        with self.lock:
            return run_steps(self._host, self._ledger, HOST, steps)

    def count_returns(self) -> None:
        """Counts the frames between the guests of each uplink with software edges. Guests run without it: why it is impossible
        becomes an event.
        """
        if not any(claim.plan.software_nics for claim in self._ledger.read().claims):
            return
        with self.lock:
            macs: dict[str, list[MacAddress]] = {}
            for claim in self._ledger.read().claims:
                for nic in claim.plan.software_nics:
                    macs.setdefault(nic.interface, []).extend([nic.mac] if claim.state in _WITH_TAPS else [])
            steps = [
                CountReturns(uplink, tuple(sorted(found))) for uplink, found in macs.items() if find_link(self._host, uplink)
            ]
            changed, failed = try_steps(self._host, self._ledger, HOST, steps)
        # A success counts when the rules are found in place: a firewall may flush them again and again.
        if failed or not changed:
            self._warnings.report("frames between guests are not counted", tuple(str(error) for _, error in failed))

    def _prepare_uplink(self, uplink: str) -> tuple[str, ...]:
        """Of a software edge. Raises HostError if the external switch does not send frames back."""
        self._require_hairpin(uplink)  # without the lock: it takes seconds if the switch does not send frames back
        with self.lock:
            moved = self._clear_cores()
            self._prepared.add(uplink)
        return moved

    def _require_hairpin(self, uplink: str) -> None:
        result = self._host.net.probe_hairpin(uplink)
        if not result.returned:
            hint = f"enable hairpin (reflective relay) on the switch port of {uplink}; check with `nohype uplink prove {uplink}`"
            raise HostError(f"guests on {uplink} cannot reach each other: {result}", hint)

    def _clear_cores(self) -> tuple[str, ...]:
        """Only once, since it reads every thread of the host; the audit finds later threads. And once per manager process: the
        journal outlives a reboot, the affinities do not.
        """
        if self._prepared:
            return ()
        housekeeping = self.housekeeping
        cleared = clear_cores(self._host, self._ledger, HOST, housekeeping)
        self._warnings.report("not moved off the guest cores", cleared.failures)
        changed = self._isolate(housekeeping)
        self._count_exits()
        moved = (f"move {len(cleared.moved)} threads and interrupts to CPUs {housekeeping}",) if cleared.moved else ()
        return (*moved, *changed)

    def _isolate(self, housekeeping: CpuSet) -> tuple[str, ...]:
        """Keeps unbound work, new interrupts and watchdogs off the guest cores. What is left as it is becomes an event."""
        try:
            possible = read_possible(self._host)
        except HostError:  # the survey names it
            possible = CpuSet()
        guest_cpus = (possible or read_online(self._host)) - self._policy.housekeeping
        planned = plan_isolation_settings(self._host, Division(housekeeping, guest_cpus, CpuSet()))
        changed, failed = try_steps(self._host, self._ledger, HOST, planned.steps)
        failures = [failure for step, error in failed if (failure := describe_failure(step, error))]
        self._warnings.report("settings that keep the kernel off the guest cores", (*planned.left, *failures))
        return changed

    def restore_isolation(self) -> None:
        """At the manager's start: the guests may be of an earlier version, or another program may have changed a setting."""
        with self.lock:
            if self._has_guests():
                self._isolate(self.housekeeping)

    def isolate(self, plan: Plan, scope: str, groups: Mapping[str, CpuSet]) -> None:
        """Isolates the CPUs of a guest's vCPUs where the host has not done so at boot (`isolcpus`). What fails becomes an event.

        ``scope``, ``groups``: the control groups of the guest and of each vCPU. What is done below the scope ends with it.
        """
        try:
            if CpuSet.of(plan.cpus) <= read_isolated(self._host):
                return
            if len(groups) < len(plan.cpus):
                raise HostError(
                    f"its {len(plan.cpus)} vCPUs have {len(groups)} control groups", "let libvirt use the controller cpuset"
                )
            for group, cpus in groups.items():
                above = list_parents(group)
                outer = [parent for parent in above if not f"{parent}/".startswith(f"{scope.strip('/')}/")]
                with self.lock:
                    run_steps(self._host, self._ledger, HOST, [AddExclusive(parent, cpus) for parent in outer])
                for parent in above[len(outer) :]:
                    add_exclusive(self._host, parent, cpus)
                make_partition(self._host, group, cpus)
        except HostError as error:
            self._warnings.note(plan.name, (f"its CPUs are not isolated from the scheduler's load balancing: {error}",))

    def restore_switch_counts(self) -> None:
        """Before the counters of a guest that starts are read. Other threads that have ended may have filled the histogram."""
        with self.lock:
            make_room_for_switches(self._host, self._policy.housekeeping)

    def restore_exit_counts(self) -> None:
        """Another program may have removed the trace instance, or a guest may have been adopted after an update. And ended guests
        may have filled the histogram.
        """
        with self.lock:
            if self._has_guests():
                self._count_exits()
                if is_counting(self._host):
                    make_room(self._host)

    def _count_exits(self) -> None:
        """Unless that is done already. Guests run without it: why it is impossible becomes an event."""
        _, failed = try_steps(self._host, self._ledger, HOST, [CountExits()])
        self._warnings.report("VM exits are not counted by reason", tuple(str(error) for _, error in failed))
        # Not if the trace instance is missing: it is the same cause.
        steps = [] if failed else [CountSwitches(self._policy.housekeeping)]
        _, failed_switches = try_steps(self._host, self._ledger, HOST, steps)
        reasons = tuple(str(error) for _, error in failed_switches)
        self._warnings.report("thread switches on guest CPUs are not counted", reasons)

    def create_vfs(self, address: PciAddress, interface: str) -> tuple[str, ...]:
        """Creates the VFs of a PF and, for the first PF, clears the guest cores; returns what was changed."""
        with self.lock:
            moved = self._clear_cores()
            pf = read_pf(self._host, address)
            created = run_steps(self._host, self._ledger, HOST, [CreateVfs(pf.address, interface, self._policy.count_vfs(pf))])
            self._prepared.add(pf.address)
        return (*moved, *created)

    def restore_edge_mode(self, plan: Plan) -> None:
        """Puts the guest's PFs back into VEPA mode. For the edge mode channel that is done where it is possible: a NIC that
        switches locally may take a frame to a VF of another VLAN as local, and drop it (Intel X550 data sheet 7.8.3.4).
        """
        for pf, (interface, is_needed) in _list_vepa_pfs([plan]).items():
            try:
                self._restore_edge_mode(pf, interface, is_needed=is_needed)
            except HostError as error:
                if is_needed:
                    raise
                text = f"cannot stop PF {pf} from switching between its VFs; it may drop frames to VFs in other VLANs"
                self._warnings.note(plan.name, ("; ".join(filter(None, (f"{text}: {error.message}", error.hint))),))

    def restore_edge_modes(self) -> None:
        """As ``restore_edge_mode``, for all guests. An error of one PF does not stop the others."""
        for pf, (interface, is_needed) in _list_vepa_pfs(claim.plan for claim in self._ledger.read().claims).items():
            try:
                self._restore_edge_mode(pf, interface, is_needed=is_needed)
            except OrchestratorError as error:
                _log.error("cannot restore VEPA mode on PF %s: %s", pf, error)

    def has_guest_on(self, interface: str) -> bool:
        """Whether a guest has a VF of this PF, by its planned or present name: it need not be a configured uplink. Or whether it
        is the tap of a guest, or its uplink.
        """
        plans = [claim.plan for claim in self._ledger.read().claims]
        return any(interface in (nic.interface, nic.tap) for plan in plans for nic in plan.nics) or any(
            has_port(self._host, vf.pf, interface) for plan in plans for vf in plan.vfs
        )

    def release(self) -> None:
        """Undoes the preparation if no claim is left. A failure is one event per cause; ``retry_release`` repeats it."""
        try:
            self._undo()
            self._undo_error = ""
        except OrchestratorError as error:
            before, self._undo_error = self._undo_error, error.message
            if self._undo_error != before:
                self._count_undo_failure()
                log_errors(lambda: self._ledger.append_event(EventKind.UNDO_FAILED, HOST, self._undo_error))

    def retry_release(self) -> None:
        if self._undo_error:
            self.release()

    def read_vf_states(self) -> VfStates:
        return {pf: self._read_vf_states(pf, name) for pf, name in self._list_guest_pfs().items()}

    def find_pool_shortfalls(self, claims: tuple[Claim, ...]) -> tuple[str, ...]:
        """One sentence per pool with fewer free pages than stopped guests own: another program has taken pages."""
        owned: Counter[tuple[int, Size]] = Counter()
        for claim in claims:
            if claim.state == GuestState.STOPPED:
                owned[claim.plan.node, claim.plan.page_size] += claim.plan.pages
        if not owned:
            return ()
        pools, problems = survey_pools(self._host)
        free = {(pool.node, pool.page_size): pool.free for pool in pools}
        unread = f" ({'; '.join(problem.message for problem in problems)})" if problems else ""
        return tuple(
            f"node {node}: {available} huge pages of {size} are free, but stopped guests own {count}{unread}"
            for (node, size), count in sorted(owned.items())
            if (available := free.get((node, size), 0)) < count
        )

    def _restore_edge_mode(self, address: PciAddress, interface: str, *, is_needed: bool) -> None:
        pf = read_pf(self._host, address, [interface, *self._policy.uplinks])
        if not is_needed and not may_have_vepa(pf):
            return
        if read_edge_mode(self._host, pf) is not EdgeMode.VEPA:
            with self.lock:
                run_steps(self._host, self._ledger, HOST, [SetEdgeMode(pf, EdgeMode.VEPA)])

    def _list_guest_pfs(self) -> dict[PciAddress, str]:
        return _list_pfs(claim.plan for claim in self._ledger.read().claims)

    def _undo(self) -> None:
        if self._has_guests():
            return
        with self.lock:
            # Cleared before the check: a guest that is claimed later finds no prepared PF, and waits for the lock.
            self._prepared.clear()
            if not self._has_guests():
                undo_steps(UndoContext(self._host), self._ledger, HOST)

    def _has_guests(self) -> bool:
        """Without guests of which only the disks are left."""
        return any(claim.plan.cores for claim in self._ledger.read().claims)

    def _read_vf_states(self, pf: PciAddress, name: str) -> tuple[VfState, ...] | str:
        try:
            return self._host.net.read_vfs(find_port(self._host, pf, [name, *self._policy.uplinks], odd=True))
        except HostError as error:
            return error.message


def _list_pfs(plans: Iterable[Plan]) -> dict[PciAddress, str]:
    """PF → its interface at planning time."""
    return {vf.pf: vf.interface for plan in plans for vf in plan.vfs}


def _list_vepa_pfs(plans: Iterable[Plan]) -> dict[PciAddress, tuple[str, bool]]:
    """PF → its interface, and whether a guest needs VEPA mode: those of the mode channel only profit from it."""
    nics = [nic for plan in plans for nic in plan.nics]
    needed = {nic.pf for nic in nics if nic.edge is EdgeMode.VEPA}
    return {nic.pf: (nic.interface, nic.pf in needed) for nic in nics if nic.pf}
