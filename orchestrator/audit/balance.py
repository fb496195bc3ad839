"""Invariants of frame counters on software edges: a part of the proof vepa that needs no test frames.

The counters cannot be read at one moment. Each sample reads the host's counters, then the switch's, then the host's again: what
happened between the inner readings is at most, and between the outer readings at least, what the other counter must show. So no
tolerance is needed for frames on their way, except in the NIC: it may count a frame when it has sent it, or seconds later.

Frames between the guests of an uplink are counted by rules of nftables on it (``host.edge.returns``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.errors import HostError, SwitchError
from orchestrator.host.edge.returns import is_counting, read_returns
from orchestrator.host.interfaces import find_lower
from orchestrator.host.root import HostRoot
from orchestrator.model.switch import PortCounters, SwitchTie
from orchestrator.model.uplink import EdgeReading, FrameCounts, Invariant, InvariantReading, QueueCounts, ReturnCounts
from orchestrator.switches.drivers import opened
from orchestrator.values import MacAddress

_COUNTED = "macvtap-vepa"
"""Only here the host counts a guest's frames after its rules have dropped what the guest may not send."""

LATE_SECONDS = 3.0
"""Until the uplink has counted what it has sent: drivers read the counters of the hardware every 1 or 2 s (tg3, bnxt_en, igb)."""
POLL_SECONDS = 0.5
_ENOUGH = 10
"""Frames between guests from which it is judged that none returns: a single one can be lost."""


@dataclass(frozen=True)
class Sample:
    """Attributes:
    port: the counters of the uplink's switch port, or why they are not known.
    macs: of the guests on the uplink.
    returns: frames between these guests, or why they are not counted.
    """

    outer: Mapping[str, FrameCounts]  # the first reading of a start, the last of an end
    inner: Mapping[str, FrameCounts]
    port: PortCounters | str
    queue: QueueCounts
    macs: tuple[MacAddress, ...] = ()
    returns: ReturnCounts | str = "no guest has a NIC there"


def take_sample(
    host: HostRoot, uplink: str, tie: SwitchTie | str, macs: tuple[MacAddress, ...] = (), *, is_start: bool
) -> Sample:
    """``macs``: of the guests on the uplink. Raises HostError if the host's counters cannot be read."""
    first, queue = host.net.read_counters(), _read_queues(host, uplink)
    port = _read_port(tie)
    last = host.net.read_counters()
    if not is_start:
        queue = _read_queues(host, uplink)
    outer, inner = (first, last) if is_start else (last, first)
    return Sample(outer, inner, port, queue, macs, _read_returns(host, uplink, macs))


def finish(
    host: HostRoot, uplink: str, tie: SwitchTie | str, edges: Iterable[EdgeReading], start: Sample
) -> tuple[InvariantReading, ...]:
    """Takes the second sample, and compares. The uplink gets ``LATE_SECONDS`` to count what guests have sent until then.

    Raises HostError as ``take_sample``.
    """
    known, end = tuple(edges), take_sample(host, uplink, tie, start.macs, is_start=False)
    deadline = time.monotonic() + LATE_SECONDS
    while True:
        found = compare(uplink, known, start, end)
        if time.monotonic() >= deadline or all(one.holds is not False for one in found):
            return found
        time.sleep(POLL_SECONDS)
        end = replace(
            end, outer=host.net.read_counters(), queue=_read_queues(host, uplink), returns=_wait_longer(host, uplink, end)
        )


def _wait_longer(host: HostRoot, uplink: str, end: Sample) -> ReturnCounts | str:
    """What has returned by now of the frames that had left then."""
    now = _read_returns(host, uplink, end.macs)
    return now if isinstance(now, str) or isinstance(end.returns, str) else replace(end.returns, returned=now.returned)


def _read_returns(host: HostRoot, uplink: str, macs: tuple[MacAddress, ...]) -> ReturnCounts | str:
    if not macs:
        return "no guest has a NIC there"
    try:
        if not is_counting(host, uplink, macs):
            return "the rules that count frames between these guests are missing"
        return read_returns(host, uplink) or "the rules that count frames between guests are missing"
    except HostError as error:
        return error.message


def _read_queues(host: HostRoot, uplink: str) -> QueueCounts:
    """With those of the interfaces below: a bond has no queue of its own."""
    names = (uplink, *sorted(find_lower(host.net.read_links(), uplink)))
    queues = [host.net.read_queue(name) for name in names]
    return QueueCounts(sum(queue.dropped for queue in queues), sum(queue.waiting for queue in queues))


def _read_port(tie: SwitchTie | str) -> PortCounters | str:
    if isinstance(tie, str):
        return tie
    try:
        with opened(tie.switch, tie.key) as driver:
            (port,) = driver.read([tie.port]).ports
    except (SwitchError, HostError) as error:
        return error.message
    return port.counters or f"the switch reports no counters of port {tie.port}"


def compare(uplink: str, edges: Iterable[EdgeReading], start: Sample, end: Sample) -> tuple[InvariantReading, ...]:
    """``edges``: of the guests on the uplink. Pure."""
    return (
        _compare_guests(uplink, tuple(edges), start, end),
        *_compare_switch(uplink, start, end),
        _compare_returns(uplink, start, end),
    )


def _compare_guests(uplink: str, edges: tuple[EdgeReading, ...], start: Sample, end: Sample) -> InvariantReading:
    def unknown(why: str) -> InvariantReading:
        return InvariantReading(Invariant.GUESTS_UPLINK, uplink, None, f"not measured: {why}")

    if other := next((edge.interface for edge in edges if edge.mode != _COUNTED), None):
        return unknown(f"the frames of {other} are counted before its rules drop those that the guest may not send")
    samples = (start.outer, start.inner, end.inner, end.outer)
    if missing := [edge.interface for edge in edges if any(edge.interface not in sample for sample in samples)]:
        return unknown(f"{', '.join(missing)} did not exist all the time")
    if any(uplink not in sample for sample in samples):
        return unknown(f"{uplink} did not exist all the time")
    sent = [end.inner[edge.interface].sent - start.inner[edge.interface].sent for edge in edges]
    left = end.outer[uplink].sent - start.outer[uplink].sent
    dropped = end.outer[uplink].sent_dropped - start.outer[uplink].sent_dropped + end.queue.dropped - start.queue.dropped
    if min(*sent, left, dropped, 0) < 0:
        return unknown("counters were reset meanwhile")
    allowed = left + dropped + end.queue.waiting
    text = f"guests sent {sum(sent)} frames, {left} left through {uplink}, which dropped {dropped}"
    return InvariantReading(Invariant.GUESTS_UPLINK, uplink, sum(sent) <= allowed, text)


def _compare_switch(uplink: str, start: Sample, end: Sample) -> tuple[InvariantReading, InvariantReading]:
    names = (Invariant.UPLINK_SWITCH, Invariant.SWITCH_REFLECTED)
    if isinstance(start.port, str) or isinstance(end.port, str):
        why = start.port if isinstance(start.port, str) else end.port
        first, second = (InvariantReading(name, uplink, None, f"not measured: {why}") for name in names)
        return first, second
    into, out = end.port.rx_packets - start.port.rx_packets, end.port.tx_packets - start.port.tx_packets
    samples = (start.outer, start.inner, end.inner, end.outer)
    if min(into, out) < 0 or any(uplink not in sample for sample in samples):
        first, second = (InvariantReading(name, uplink, None, "not measured: counters were reset meanwhile") for name in names)
        return first, second
    before, after = (start.inner[uplink], start.outer[uplink]), (end.inner[uplink], end.outer[uplink])
    sent = [late.sent - early.sent for early, late in zip(before, after, strict=True)]
    received = [late.received - early.received for early, late in zip(before, after, strict=True)]
    agrees = sent[0] <= into <= sent[1] and received[0] <= out <= received[1]
    text = f"{uplink} sent {sent[1]} frames and received {received[1]}, the switch port received {into} and sent {out}"
    # Many switches update their counters seconds later: a difference proves nothing.
    late = "" if agrees else "; not measured: the counters of the switch may be late"
    reflected = f"{into} frames arrived at the switch port, {out} left it"
    others = "" if into == out else "; not measured: frames from and to other hosts are counted too"
    return (
        InvariantReading(names[0], uplink, agrees or None, text + late),
        InvariantReading(names[1], uplink, into == out or None, reflected + others),
    )


def _compare_returns(uplink: str, start: Sample, end: Sample) -> InvariantReading:
    """Broken only if none returns: queues and switches drop frames of a flood, which have left by this count, and the uplink may
    merge frames that come in (GRO).
    """
    name = Invariant.MUST_RETURN
    if isinstance(start.returns, str) or isinstance(end.returns, str):
        why = start.returns if isinstance(start.returns, str) else end.returns
        return InvariantReading(name, uplink, None, f"not measured: {why}")
    left = end.returns.must_return - start.returns.must_return
    back = end.returns.returned - start.returns.returned
    if min(left, back) < 0:
        return InvariantReading(name, uplink, None, "not measured: counters were reset meanwhile")
    text = f"{left} frames between guests left through {uplink}, {back} came back"
    if back >= left:
        return InvariantReading(name, uplink, holds=True, text=text)
    if back or left < _ENOUGH:
        return InvariantReading(name, uplink, None, f"{text}; not measured: frames may have been dropped or merged")
    return InvariantReading(name, uplink, holds=False, text=f"{text}: the switch does not send them back")
