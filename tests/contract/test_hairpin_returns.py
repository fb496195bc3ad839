"""The watch for frames that do not return, on a real kernel: guests' macvtaps on a veth, and a bridge as the switch.

tap [macvtap] -- UPLINK (namespace HOST) == veth == PORT (namespace SWITCH, bridge)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.guests.hairpin_watch import HairpinWatch
from orchestrator.host import netlink
from orchestrator.host.edge import macvtap
from orchestrator.host.netlink import read_counters, set_hairpin
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.waiting import wait_until
from tests.harness.edge_network import HOST, MAC1, ONE, PORT, REAL, SWITCH, UPLINK, plug
from tests.harness.netns import Tap as GuestEnd
from tests.harness.netns import build_frame, within

pytestmark = pytest.mark.netns


@pytest.fixture
def guest(network: None, tmp_path: Path) -> Iterator[GuestEnd]:
    end = plug(macvtap, ONE, tmp_path)
    yield end
    end.close()


class Records:
    """The part of the ledger that the watch uses: one running guest."""

    def __init__(self) -> None:
        nic = NicPlan(None, UPLINK, None, None, MAC1, EdgeMode.MACVTAP_VEPA, tap=ONE.name)
        plan = SimpleNamespace(name="web", nics=(nic,))
        self.claims = [SimpleNamespace(plan=plan, state="running")]
        self.events: list[tuple[str, float]] = []

    def read(self) -> Any:
        return self

    def subscribe(self, _call: object) -> None:
        pass

    def append_event(self, kind: str, subject: str, detail: str) -> None:
        assert (subject, UPLINK in detail) == ("host", True)
        self.events.append((str(kind), time.monotonic()))


class Talk:
    """The guest sends a broadcast now and then; as fast as it can in a flood."""

    def __init__(self, end: GuestEnd, pause: float) -> None:
        self._end, self._pause, self._stop = end, pause, threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self._pause):
            for _ in range(1 if self._pause else 100):
                try:
                    self._end.send(build_frame("ff:ff:ff:ff:ff:ff", str(MAC1), 1))
                except BlockingIOError:
                    break


def until(records: Records, kinds: list[str]) -> None:
    wait_until(lambda: len(records.events) >= len(kinds), timeout=60, interval=0.05)
    assert [kind for kind, _ in records.events] == kinds


@pytest.mark.parametrize("pause", [0.05, 0.0], ids=["talk", "flood"])
def test_hairpin_that_goes_off_is_reported_once_and_its_return_once(guest: GuestEnd, pause: float) -> None:
    records = Records()
    watch = HairpinWatch(REAL, records)  # type: ignore[arg-type]
    with Talk(guest, pause):
        assert within(HOST, watch.check)
        within(HOST, watch.check)
        assert records.events == []
        set_hairpin(PORT, SWITCH, on=False)
        for _ in range(2):
            within(HOST, watch.check)
        until(records, ["hairpin-lost"])
        set_hairpin(PORT, SWITCH, on=True)
        for _ in range(2):
            within(HOST, watch.check)
        until(records, ["hairpin-lost", "hairpin-returned"])


def test_thread_reports_a_loss_without_being_asked(guest: GuestEnd) -> None:
    records = Records()
    watch = HairpinWatch(REAL, records)  # type: ignore[arg-type]
    with Talk(guest, 0.05):
        within(HOST, watch.start)  # its thread stays in the namespace
        try:
            off = time.monotonic()
            set_hairpin(PORT, SWITCH, on=False)
            until(records, ["hairpin-lost"])
            print(f"reported after {records.events[0][1] - off:.1f} s")
            set_hairpin(PORT, SWITCH, on=True)
            until(records, ["hairpin-lost", "hairpin-returned"])
        finally:
            watch.close()


def test_counters_of_a_tap_and_of_its_uplink_grow_with_each_frame(guest: GuestEnd) -> None:
    def read() -> tuple[int, int]:
        counters = within(HOST, read_counters)
        return counters[ONE.name].sent, counters[UPLINK].sent

    assert wait_until(
        lambda: within(HOST, lambda: all(link.carrier for link in netlink.read_links() if link.name != "lo")),
        timeout=30,
        interval=0.05,
    )
    tap, uplink = read()
    for number in range(10):
        guest.send(build_frame("ff:ff:ff:ff:ff:ff", str(MAC1), number))
    after = read()
    assert after[0] == tap + 10
    assert after[1] >= uplink + 10


def test_frames_of_a_guest_with_the_ethertype_of_the_probe_do_not_hide_those_that_return(guest: GuestEnd) -> None:
    """They would fill the buffer of the probe, which is small: no frame would seem to return."""
    probe = within(HOST, lambda: netlink.open_hairpin(UPLINK))
    try:
        frame = build_frame("ff:ff:ff:ff:ff:ff", str(MAC1), 1)
        for _ in range(2000):
            with suppress(BlockingIOError):
                guest.send(frame[:12] + b"\x88\xb6" + frame[14:])
        assert within(HOST, lambda: probe.attempt(2.0))
    finally:
        probe.close()
