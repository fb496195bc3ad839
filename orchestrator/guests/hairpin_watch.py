"""Notices that frames between guests do not come back from the external switch, also where the switch itself cannot be read.

While guests send frames, two frames of the host's own are sent on their uplink in each round (see ``host.hairpin``): guests'
counters alone cannot tell a lost reflection from traffic to other hosts. Frames of the VFs of many drivers are not counted; their
uplinks are probed in each round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from orchestrator.errors import HostError, LedgerError, OrchestratorError
from orchestrator.guests.host_setup import HOST
from orchestrator.host.ports import find_port
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Claim, Event, EventKind, Ledger
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.state import GuestState
from orchestrator.model.uplink import FrameCounts

_log = logging.getLogger(__name__)

ROUND_SECONDS = 3.0
PAUSE_SECONDS = 0.5
"""Between a suspicion and its confirmation. All together a loss is reported within 10 s."""
_FIRST, _MORE = (1, 0.4), (6, 0.25)
"""Attempts, and seconds for each. A frame can be lost in a flood, or while the NIC is reset: more frames decide."""


@dataclass
class _Users:
    """The guests that need reflective relay on an uplink; ``taps`` are those of guests whose frames are counted."""

    guests: list[str] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)
    has_vfs: bool = False


class HairpinWatch:
    """One thread, which sleeps while no guest runs. It takes no lock, and nothing waits for it."""

    def __init__(self, host: HostRoot, ledger: Ledger) -> None:
        self._host, self._ledger = host, ledger
        self._stop, self._changed = threading.Event(), threading.Event()
        self._lost: set[str] = set()
        self._sent: dict[str, tuple[int, ...]] = {}  # as of the last probe
        ledger.subscribe(self._on_event)

    def start(self) -> None:
        threading.Thread(target=self._work, name="hairpin", daemon=True).start()

    def close(self) -> None:
        self._stop.set()
        self._changed.set()

    def check(self) -> bool:
        """One round; writes an event for each change. Returns whether any running guest needs reflective relay."""
        users = self._list_users()
        self._lost &= users.keys()
        self._sent = {uplink: sent for uplink, sent in self._sent.items() if uplink in users}
        if not users:
            return False
        counters = self._host.net.read_counters()
        due = [uplink for uplink, found in users.items() if self._is_due(uplink, found, counters)]
        if due:
            # At the same time: a loss takes seconds to confirm, and one switch may serve several uplinks.
            with ThreadPoolExecutor(len(due), thread_name_prefix="hairpin") as pool:
                list(pool.map(lambda uplink: self._check_uplink(uplink, users[uplink]), due))
        return True

    def find_lost(self) -> dict[str, bool]:
        """By watched uplink whether frames do not return, as of the last round."""
        return {uplink: uplink in self._lost for uplink in self._sent}

    def _work(self) -> None:
        while not self._stop.is_set():
            self._changed.clear()
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
        if event.kind in (EventKind.STARTED, EventKind.ADOPT):
            self._changed.set()

    def _list_users(self) -> dict[str, _Users]:
        found: dict[str, _Users] = {}
        for claim in self._ledger.read().claims:
            for nic in _list_nics(claim):
                if uplink := self._find_uplink(nic):
                    users = found.setdefault(uplink, _Users())
                    users.guests.append(claim.plan.name)
                    users.taps += [nic.tap] if nic.tap else []
                    users.has_vfs |= not nic.tap
        return found

    def _find_uplink(self, nic: NicPlan) -> str:
        """Its present name; empty if the PF has no interface now."""
        if nic.pf is None:
            return nic.interface
        try:
            return find_port(self._host, nic.pf, [nic.interface])
        except HostError:
            return ""

    def _is_due(self, uplink: str, users: _Users, counters: dict[str, FrameCounts]) -> bool:
        """Whether guests have sent frames since the last probe. Any other value of a counter counts: it may have been reset."""
        sent = tuple(counters[tap].sent for tap in sorted(users.taps) if tap in counters)
        before, self._sent[uplink] = self._sent.get(uplink), sent
        return uplink in self._lost or users.has_vfs or (sent != before and any(sent))

    def _check_uplink(self, uplink: str, users: _Users) -> None:
        returns = self._probe(uplink, *_FIRST)
        if returns is False and uplink not in self._lost:
            returns = self._probe(uplink, *_MORE)
            if returns is False:
                time.sleep(PAUSE_SECONDS)
                returns = self._probe(uplink, *_MORE)
        if returns is None or returns == (uplink not in self._lost):
            return
        names = ", ".join(sorted(set(users.guests)))
        if returns:
            self._lost.discard(uplink)
            self._note(EventKind.HAIRPIN_RETURNED, f"uplink {uplink}: frames between guests return from the switch again")
        else:
            self._lost.add(uplink)
            text = f"uplink {uplink}: frames between guests do not return from the switch; guests: {names}"
            self._note(EventKind.HAIRPIN_LOST, f"{text}; enable hairpin (reflective relay) on the switch port")

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

    def _note(self, kind: EventKind, detail: str) -> None:
        try:
            self._ledger.append_event(kind, HOST, detail)
        except LedgerError as error:
            _log.error("%s (%s)", detail, error)


def _list_nics(claim: Claim) -> Iterable[NicPlan]:
    """Those that need reflective relay: with a VLAN of its own per VF, frames return in another VLAN."""
    return [nic for nic in claim.plan.nics if claim.state == GuestState.RUNNING and nic.edge is not EdgeMode.CHANNEL]
