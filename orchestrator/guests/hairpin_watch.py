"""Notices that frames between guests do not come back from the external switch, also where the switch itself cannot be read.

Two frames of the host's own are sent on each uplink with running guests in each round (see ``host.hairpin``). A round
without a loss is a few system calls on a socket that stays open. On software edges the frames between guests are counted too
(``host.edge.returns``): a switch may drop these, and reflect those of the host. Counters cannot replace the probe: guests may be
silent, and frames of VFs are not counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from orchestrator.errors import HostError, LedgerError, OrchestratorError
from orchestrator.guests.host_setup import HOST
from orchestrator.host.edge.returns import read_returns
from orchestrator.host.ports import find_port
from orchestrator.host.root import HostRoot, Probe
from orchestrator.ledger import Claim, Event, EventKind, Ledger
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.state import GuestState
from orchestrator.model.uplink import ReturnCounts

_log = logging.getLogger(__name__)

ROUND_SECONDS = 5.0
PAUSE_SECONDS = 0.5
"""Between a suspicion and its confirmation. All together a loss is reported within 10 s."""
_FIRST, _MORE = 0.4, (6, 0.25)
"""Attempts, and seconds for each. A frame can be lost in a flood, or while the NIC is reset: more frames decide."""
_THREADS = 16
_ENOUGH = 10
"""Frames between guests in a round from which their loss is judged."""


class HairpinWatch:
    """One thread, which sleeps while no guest runs. It takes no lock, and nothing waits for it."""

    def __init__(self, host: HostRoot, ledger: Ledger) -> None:
        self._host, self._ledger = host, ledger
        self._stop, self._changed = threading.Event(), threading.Event()
        self._changed.set()
        self._lost: set[str] = set()
        self._starved: set[str] = set()  # of which frames between guests do not return
        self._counted: dict[str, ReturnCounts] = {}
        self._unread: dict[str, str] = {}  # why the last reading of an uplink failed
        self._users: dict[str, list[str]] = {}  # guests by uplink, as of the last change of a guest
        self._software: set[str] = set()  # those of them with a tap of a guest
        # Uplinks whose switch port carries untagged frames, as those of the probe are: a guest in no network uses them, or one
        # has returned. Of others a loss is not known.
        self._untagged: set[str] = set()
        self._probes: dict[str, Probe] = {}
        ledger.subscribe(self._on_event)

    def start(self) -> None:
        threading.Thread(target=self._work, name="hairpin", daemon=True).start()

    def close(self) -> None:
        self._stop.set()
        self._changed.set()

    def check(self) -> bool:
        """One round; writes an event for each change. Returns whether any running guest needs reflective relay."""
        if self._changed.is_set():
            self._changed.clear()  # before the reading: a later change is read in the next round
            self._users, untagged, self._software = self._list_users()
            self._lost &= self._users.keys()
            self._starved &= self._users.keys()
            self._untagged = self._untagged & self._users.keys() | untagged
            for uplink in self._probes.keys() - self._users.keys():
                self._probes.pop(uplink).close()
        suspects = [uplink for uplink in self._users if self._is_suspect(uplink)]
        if suspects:
            # At the same time: a loss takes seconds to confirm, and one switch may serve several uplinks.
            with ThreadPoolExecutor(len(suspects), thread_name_prefix="hairpin") as pool:
                list(pool.map(self._confirm, suspects))
        self._compare_counts()
        return bool(self._users)

    def find_lost(self) -> dict[str, bool]:
        """By watched uplink whether frames do not return, as of the last round."""
        known = (self._untagged | self._counted.keys()) & self._users.keys()
        return {uplink: uplink in self._lost | self._starved for uplink in sorted(known)}

    def find_counts(self) -> dict[str, ReturnCounts]:
        """By uplink with software edges, the frames between guests as of the last round."""
        return dict(self._counted)

    def _work(self) -> None:
        while not self._stop.is_set():
            busy = True
            try:
                busy = self.check()
            except OrchestratorError as error:
                _log.error("cannot check whether frames return: %s", error)
            except Exception:
                _log.exception("internal error while checking whether frames return, continuing")
            if busy:
                self._stop.wait(ROUND_SECONDS)
            else:
                self._changed.wait()

    def _on_event(self, event: Event) -> None:
        if event.subject != HOST:
            self._changed.set()

    def _list_users(self) -> tuple[dict[str, list[str]], set[str], set[str]]:
        """Also returns the uplinks with guests that use untagged frames, and those with taps of guests."""
        found: dict[str, list[str]] = {}
        untagged: set[str] = set()
        software: set[str] = set()
        for claim in self._ledger.read().claims:
            for nic in _list_nics(claim):
                if uplink := self._find_uplink(nic):
                    found.setdefault(uplink, []).append(claim.plan.name)
                    untagged |= set() if nic.vlan else {uplink}
                    software |= {uplink} if nic.tap else set()
        return found, untagged, software

    def _find_uplink(self, nic: NicPlan) -> str:
        """Its present name; empty if the PF has no interface now."""
        if nic.pf is None:
            return nic.interface
        try:
            return find_port(self._host, nic.pf, [nic.interface])
        except HostError:
            return ""

    def _is_suspect(self, uplink: str) -> bool:
        returned = self._try_once(uplink)
        if returned:
            self._untagged.add(uplink)
        return returned == (uplink in self._lost) and uplink in self._untagged

    def _try_once(self, uplink: str) -> bool:
        """Whether a frame returned. An error closes the socket: the interface may be another one now."""
        try:
            if uplink not in self._probes:
                self._probes[uplink] = self._host.net.open_hairpin(uplink)
            self._probes[uplink].discard()
            return self._probes[uplink].attempt(_FIRST)
        except HostError:
            if probe := self._probes.pop(uplink, None):
                probe.close()
            self._changed.set()  # looks its name up again
            return False

    def _confirm(self, uplink: str) -> None:
        """A single frame decides that frames return, and many that they do not."""
        if uplink in self._lost:
            self._lost.discard(uplink)
            if uplink not in self._starved:  # by the frames of guests
                self._note_return(uplink)
            return
        if self._probe(uplink, *_MORE) is False:
            time.sleep(PAUSE_SECONDS)
            if self._probe(uplink, *_MORE) is False:
                self._lost.add(uplink)
                if uplink in self._starved:
                    return
                text = (
                    f"uplink {uplink}: frames between guests do not return from the switch; guests: {self._name_guests(uplink)}"
                )
                self._note(EventKind.HAIRPIN_LOST, f"{text}; enable hairpin (reflective relay) on the switch port")

    def _compare_counts(self) -> None:
        uplinks = sorted(self._software & self._users.keys())
        counted: dict[str, ReturnCounts] = {}
        if uplinks:
            # At the same time, as the suspects: guests of one uplink must not delay the next round of the others.
            with ThreadPoolExecutor(min(len(uplinks), _THREADS), thread_name_prefix="returns") as pool:
                found = pool.map(lambda uplink: self._compare(uplink, self._counted.get(uplink)), uplinks)
                counted = {uplink: counts for uplink, counts in zip(uplinks, found, strict=True) if counts}
        self._counted = counted

    def _compare(self, uplink: str, before: ReturnCounts | None) -> ReturnCounts | None:
        now = self._read_counts(uplink)
        if before and now:
            self._judge(uplink, before, now)
        return now

    def _judge(self, uplink: str, before: ReturnCounts, now: ReturnCounts) -> None:
        """Frames that return again are known from one. A loss must last: the link may have been down, or a flood is dropped."""
        left, back = now.must_return - before.must_return, now.returned - before.returned
        if uplink in self._starved and back > 0:
            self._starved.discard(uplink)
            if uplink not in self._lost:
                self._note_return(uplink)
        elif uplink not in self._starved | self._lost and left >= _ENOUGH and 0 <= 2 * back < left and self._has_link(uplink):
            time.sleep(2 * PAUSE_SECONDS)
            later = self._read_counts(uplink)
            if later and later.must_return > now.must_return and later.returned == now.returned and self._has_link(uplink):
                self._starved.add(uplink)
                lost = later.must_return - before.must_return
                text = f"uplink {uplink}: {lost} frames between guests left, {back} of them returned from the switch"
                hint = "check hairpin and port security of the switch port"
                self._note(EventKind.HAIRPIN_LOST, f"{text}; guests: {self._name_guests(uplink)}; {hint}")

    def _read_counts(self, uplink: str) -> ReturnCounts | None:
        try:
            counts, problem = read_returns(self._host, uplink), ""
        except HostError as error:
            counts, problem = None, error.message
        if problem and self._unread.get(uplink) != problem:  # once, not in each round
            _log.warning("cannot read how many frames return: %s", problem)
        self._unread[uplink] = problem
        return counts

    def _probe(self, uplink: str, attempts: int, wait: float) -> bool | None:
        """None if it is not known: the link is down, or was down meanwhile."""
        try:
            if not self._has_link(uplink):
                return None
            if self._host.net.probe_hairpin(uplink, attempts=attempts, wait=wait).returned:
                return True
            return False if self._has_link(uplink) else None
        except HostError as error:
            _log.warning("cannot check whether frames return: %s", error.message)
            return None

    def _has_link(self, uplink: str) -> bool:
        return any(link.name == uplink and link.up and link.carrier for link in self._host.net.read_links())

    def _name_guests(self, uplink: str) -> str:
        return ", ".join(sorted(set(self._users[uplink])))

    def _note_return(self, uplink: str) -> None:
        self._note(EventKind.HAIRPIN_RETURNED, f"uplink {uplink}: frames between guests return from the switch again")

    def _note(self, kind: EventKind, detail: str) -> None:
        try:
            self._ledger.append_event(kind, HOST, detail)
        except LedgerError as error:
            _log.error("%s (%s)", detail, error)


def _list_nics(claim: Claim) -> Iterable[NicPlan]:
    """Those that need reflective relay: with a VLAN of its own per VF, frames return in another VLAN."""
    return [nic for nic in claim.plan.nics if claim.state == GuestState.RUNNING and nic.edge is not EdgeMode.CHANNEL]
