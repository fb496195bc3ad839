"""Reports an address of a guest that the switch has seen at another port than its uplink's: another station uses it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from orchestrator.ledger import Claim
from orchestrator.model.state import GuestState
from orchestrator.model.switch import SwitchState, UplinkPort
from orchestrator.switches.verify import find_strays

CALM_SECONDS = 60.0
"""Two stations with one address take turns in the switch's table: only after this long one of them is gone."""


class Duplicates:
    """``report`` gets one sentence when an address is first seen elsewhere, and one when it is gone. Thread-safe.

    ``clock``: monotonic, in seconds.
    """

    def __init__(self, report: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._clock = report, clock
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], float] = {}  # by switch and address: when it was last seen elsewhere

    def inspect(self, switch: str, state: SwitchState, guests: Mapping[str, tuple[str, str]]) -> None:
        """``guests``: name of the guest and port of its uplink by address; only those of this switch."""
        now = self._clock()
        strays = find_strays(state, {mac: port for mac, (_, port) in guests.items()})
        texts: list[str] = []
        with self._lock:
            for mac, port in strays.items():
                if (switch, mac) not in self._seen:
                    guest, own = guests[mac]
                    text = f"switch {switch}: address {mac} of guest {guest} was seen at port {port}, expected {own}"
                    texts.append(f"{text}; find the other station that sends from this address")
                self._seen[switch, mac] = now
            for key, last in list(self._seen.items()):
                if key[0] != switch or key[1] in strays:
                    continue
                if key[1] not in guests:
                    del self._seen[key]
                elif now - last >= CALM_SECONDS:
                    del self._seen[key]
                    texts.append(f"switch {switch}: address {key[1]} was not seen at another port for {CALM_SECONDS:.0f} s")
        for text in texts:
            self._report(text)


def list_addresses(claims: Iterable[Claim], ties: Iterable[UplinkPort]) -> dict[str, tuple[str, str]]:
    """Guest and port by address, of the running guests on these uplinks."""
    ports = {tie.uplink: tie.port for tie in ties}
    return {
        str(nic.mac): (claim.plan.name, ports[nic.interface])
        for claim in claims
        if claim.state == GuestState.RUNNING
        for nic in claim.plan.nics
        if nic.interface in ports
    }
