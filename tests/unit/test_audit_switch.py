"""The count of test frames by the driver of a switch: by address pairs, by counters of the port, and what cannot be counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from orchestrator.audit.switch import start_count
from orchestrator.errors import SwitchError
from orchestrator.model.switch import PairCount, PortCounters, SwitchPort, SwitchState
from orchestrator.model.uplink import CountWay, SwitchCount, Traffic

A, B = "02:4e:48:00:00:01", "02:4e:48:00:00:02"
TRAFFIC = Traffic("guest1", "guest2", 248, 20, 20, 0, {}, 0)
PORT = SwitchPort("swp1", True, True, True, "forwarding", None, 1500, (), None, (), (), None)


@dataclass
class FakeSwitch:
    """A driver that counts the frames of `pass_frames`, late by ``late`` reads."""

    late: int = 0
    pairs: bool = False
    counters: bool = True
    fail_at: int = -1
    frames: list[tuple[int, int]] = field(default_factory=lambda: [(1000, 2000)])
    reads: int = 0

    def pass_frames(self, into: int, out: int) -> None:
        self.frames.append((self.frames[-1][0] + into, self.frames[-1][1] + out))

    def read(self, ports: Sequence[str] | None = None, *, neighbours: bool = False) -> SwitchState:
        self.reads += 1
        if self.reads - 1 == self.fail_at:
            raise SwitchError("cannot connect to root@192.0.2.90 port 22: timed out")
        into, out = self.frames[-1] if len(self.frames) > 1 and self.reads > 1 + self.late else self.frames[0]
        counters = PortCounters(into, out, 0, 0, 0, 0) if self.counters else None
        pairs = (PairCount(A, B, into), PairCount(B, A, into)) if self.pairs else ()
        assert ports == ["swp1"]
        assert not neighbours
        return SwitchState((replace(PORT, counters=counters, pairs=pairs),), None, None, None, None, None)


def count(switch: FakeSwitch, send: Callable[[], object] = lambda: None, settle: float = 60.0) -> SwitchCount | str:
    port = start_count(switch, "swp1", (A, B), 248, settle=settle)  # type: ignore[arg-type]
    with port.running():
        send()
    return port.finish(TRAFFIC)


@pytest.mark.parametrize("late", [0, 2])
def test_counters_that_lag_are_read_until_they_have_counted(late: int) -> None:
    switch = FakeSwitch(late=late)
    assert count(switch, lambda: switch.pass_frames(40, 41)) == SwitchCount("swp1", 40, 41, way=CountWay.PORT)


def test_counters_of_the_address_pair_are_preferred() -> None:
    switch = FakeSwitch(pairs=True)
    assert count(switch, lambda: switch.pass_frames(20, 0)) == SwitchCount("swp1", 40, 40, way=CountWay.PAIRS)


def test_frames_that_never_arrive_are_counted_as_such() -> None:
    assert count(FakeSwitch(), settle=0) == SwitchCount("swp1", 0, 0, way=CountWay.PORT)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_switch_that_cannot_be_read_gives_the_reason(at: int) -> None:
    switch = FakeSwitch(fail_at=at)
    found = count(switch, lambda: switch.pass_frames(40, 40))
    assert found == "cannot connect to root@192.0.2.90 port 22: timed out"


def test_switch_without_counters_gives_the_reason() -> None:
    assert count(FakeSwitch(counters=False)) == "the switch reports no counters of port swp1"


def test_counters_that_were_reset_prove_nothing() -> None:
    switch = FakeSwitch()
    assert count(switch, lambda: switch.pass_frames(-900, 40), settle=0) == "the counters of port swp1 were reset meanwhile"
