"""The part of the proof vepa at the external switch: its driver counts the test frames at the port of the uplink."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from orchestrator.errors import OrchestratorError, SwitchError
from orchestrator.host.frames import EchoFilter, FrameCount
from orchestrator.model.switch import SwitchPort
from orchestrator.model.uplink import CountWay, SwitchCount, Traffic
from orchestrator.switches.base import Driver
from orchestrator.switches.linux_bridge import LinuxBridge

SETTLE = 8.0
"""Seconds until a counter must have counted: Open vSwitch reads its statistics every 5 s, drivers of NICs every 2 s."""
_POLL = 0.5
_LONGEST = 10.0
"""Seconds without test frames in which the other frames are counted."""


def start_count(driver: Driver, port: str, macs: tuple[str, str], size: int, *, settle: float = SETTLE) -> Captured | Counters:
    """``running`` is for the time in which the frames are sent, once; then ``finish`` returns the count, or why there is none.

    ``macs``: of the two guests; ``size``: bytes of ICMP data in a counted request; ``settle``: as of ``SETTLE``.
    """
    return Captured(driver, port, size) if isinstance(driver, LinuxBridge) else Counters(driver, port, macs, settle)


@dataclass
class Captured:
    """Captures the requests at a port of a bridge on this host."""

    driver: LinuxBridge
    port: str
    size: int
    _count: FrameCount | None = field(default=None, init=False)
    _gap: str = field(default="", init=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        counter = None
        with ExitStack() as stack:
            try:
                self.driver.read([self.port])  # an interface outside the bridge is not its port
                counter = stack.enter_context(self.driver.count_frames(self.port, EchoFilter(size=self.size)))
            except OrchestratorError as error:
                self._gap = error.message
            yield
        if counter:
            self._count = counter.count()

    def finish(self, traffic: Traffic) -> SwitchCount | str:
        count = self._count
        if count is None:
            return self._gap
        return SwitchCount(self.port, sum(count.incoming.values()), sum(count.outgoing.values()), count.dropped)


@dataclass
class Counters:
    """Reads the counters of a port before and after."""

    driver: Driver
    port: str
    macs: tuple[str, str]
    settle: float
    _before: SwitchCount | str = field(default="", init=False)
    _took: float = field(default=0.0, init=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self._before = self._read()
        except SwitchError as error:
            self._before = error.message
        start = time.monotonic()
        yield
        self._took = time.monotonic() - start

    def finish(self, traffic: Traffic) -> SwitchCount | str:
        """Waits until the frames are counted, then as long as the frames took: in that time it counts the other frames."""
        before = self._before
        if isinstance(before, str):
            return before
        try:
            now = self._await(before, traffic.sent + traffic.received)
            found = _subtract(now, before)
            if found is None:
                return f"the counters of port {self.port} were reset meanwhile"
            start = time.monotonic()
            time.sleep(min(self._took, _LONGEST))
            quiet = _subtract(self._read(), now)
        except SwitchError as error:
            return error.message
        if quiet is None:
            return f"the counters of port {self.port} were reset meanwhile"
        scale = self._took / max(time.monotonic() - start, 0.001)
        return replace(found, others=math.ceil(max(quiet.into_switch, quiet.out_of_switch) * scale))

    def _await(self, before: SwitchCount, expected: int) -> SwitchCount:
        deadline = time.monotonic() + self.settle
        while True:
            now = self._read()
            if min(now.into_switch - before.into_switch, now.out_of_switch - before.out_of_switch) >= expected:
                return now
            if time.monotonic() >= deadline:
                return now
            time.sleep(_POLL)

    def _read(self) -> SwitchCount:
        (port,) = self.driver.read([self.port]).ports
        if count := _count_pairs(port, self.macs):
            return count
        if port.counters is None:
            raise SwitchError(f"the switch reports no counters of port {self.port}")
        return SwitchCount(port.name, port.counters.rx_packets, port.counters.tx_packets, way=CountWay.PORT)


def _count_pairs(port: SwitchPort, macs: tuple[str, str]) -> SwitchCount | None:
    """Frames between the two guests, which the switch sent back; None if it does not count both directions."""
    counts = {(pair.source, pair.target): pair.frames for pair in port.pairs}
    both = [counts.get(ends) for ends in (macs, macs[::-1])]
    found = [count for count in both if count is not None]
    return SwitchCount(port.name, sum(found), sum(found), way=CountWay.PAIRS) if len(found) == 2 else None


def _subtract(after: SwitchCount, before: SwitchCount) -> SwitchCount | None:
    """None if the counters cannot be compared: they were reset, or are others."""
    into, out = after.into_switch - before.into_switch, after.out_of_switch - before.out_of_switch
    return None if min(into, out) < 0 or after.way is not before.way else replace(after, into_switch=into, out_of_switch=out)
