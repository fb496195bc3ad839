"""Frames counted along the way of guests: at their NICs, the uplink, and the port of the external switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from orchestrator.errors import HostError
from orchestrator.host.ports import find_port
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Claim
from orchestrator.model.plan import NicPlan
from orchestrator.model.state import GuestState
from orchestrator.model.uplink import CounterPlace, CounterReading, FrameCounts, Uplink

ReadPort = Callable[[str], CounterReading | None]
"""Uplink → its switch port; None if none is configured."""


def with_counters(host: HostRoot, uplink: Uplink, claims: Iterable[Claim], read_port: ReadPort) -> Uplink:
    return replace(uplink, counters=tuple(read_uplink_counters(host, uplink.name, claims, read_port)))


def read_uplink_counters(host: HostRoot, uplink: str, claims: Iterable[Claim], read_port: ReadPort) -> Iterator[CounterReading]:
    """Of running guests only. A counter that cannot be read is a reading with the reason."""
    try:
        counters = host.net.read_counters()
    except HostError as error:
        counters, missing = {}, error.message
    else:
        missing = "there is no interface of this name"
    guests = [
        (claim.plan.name, nic)
        for claim in claims
        for nic in claim.plan.nics
        if nic.interface == uplink and claim.state == GuestState.RUNNING
    ]
    vfs = _VfCounters(host)
    for guest, nic in guests:
        if nic.tap:
            yield _build(CounterPlace.GUEST, nic.tap, counters.get(nic.tap) or missing, guest)
        else:
            yield _build(CounterPlace.GUEST, str(nic.address), vfs.read(nic), guest)
    yield _build(CounterPlace.UPLINK, uplink, counters.get(uplink) or missing)
    if port := read_port(uplink):
        yield port


class _VfCounters:
    """Reads the VFs of each PF once."""

    def __init__(self, host: HostRoot) -> None:
        self._host = host
        self._read: dict[str, dict[int, FrameCounts] | str] = {}

    def read(self, nic: NicPlan) -> FrameCounts | str:
        if nic.pf is None or nic.index is None:
            return "the guest has no VF"
        if (key := str(nic.pf)) not in self._read:
            try:
                self._read[key] = self._host.net.read_vf_counters(find_port(self._host, nic.pf, [nic.interface]))
            except HostError as error:
                self._read[key] = error.message
        found = self._read[key]
        if isinstance(found, str):
            return found
        return found.get(nic.index) or "the driver of the PF reports no frames of this VF"


def _build(place: CounterPlace, name: str, found: FrameCounts | str, guest: str = "") -> CounterReading:
    counts, gap = (None, f"not measured: {found}") if isinstance(found, str) else (found, "")
    return CounterReading(place, name, guest, counts, gap)
