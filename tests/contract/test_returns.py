"""The counters of frames that must return, on a real kernel: two guests of a software edge, and a switch with hairpin."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.guests.hairpin_watch import HairpinWatch
from orchestrator.host.edge import SOFTWARE, SoftwareEdge
from orchestrator.host.edge.returns import count_returns, is_counting, read_returns, stop_counting
from orchestrator.host.netlink import replace_table, set_hairpin
from orchestrator.host.root import Chain
from orchestrator.host.run import run
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.uplink import ReturnCounts
from orchestrator.waiting import wait_until
from tests.harness.edge_network import ALL, GROUP, HOST, MAC1, MAC2, ONE, PORT, REAL, SWITCH, TWO, UPLINK, Guests
from tests.harness.netns import within

pytestmark = pytest.mark.netns
MACS = (MAC1, MAC2)
OUTSIDE = "02:00:00:00:00:50"


@pytest.fixture(params=[EdgeMode.MACVTAP_VEPA, EdgeMode.NFT_VEPA])
def edge(request: pytest.FixtureRequest, network: None) -> SoftwareEdge:
    found: SoftwareEdge = SOFTWARE[request.param]
    within(HOST, lambda: REAL.net.set_promiscuous(UPLINK, on=found.PROMISCUOUS))
    for tap in (ONE, TWO):
        within(HOST, lambda t=tap: found.create(REAL, t))  # type: ignore[misc]
    return found


@pytest.fixture
def guests(edge: SoftwareEdge, tmp_path: Path) -> Iterator[Guests]:
    guests = Guests(edge.KIND, tmp_path)
    within(HOST, lambda: count_returns(REAL, UPLINK, MACS))
    yield guests
    guests.close()


def counts() -> ReturnCounts | None:
    return within(HOST, lambda: read_returns(REAL, UPLINK))


def test_each_frame_between_guests_is_counted_once_each_way(guests: Guests) -> None:
    sent = [guests.send(MAC2), guests.send(MAC1, TWO), guests.send(ALL), guests.send(ALL, TWO)]
    for ident in sent:
        assert wait_until(lambda i=ident: guests.port.count(i, "out") == 1, timeout=20, interval=0.01)  # type: ignore[misc]
    assert wait_until(lambda: counts() == ReturnCounts(4, 4), timeout=20, interval=0.02), counts()


def test_other_frames_are_not_counted(guests: Guests) -> None:
    """Those need not return; and by some of them, which a switch drops, a guest could make the manager report a loss."""
    for target in (OUTSIDE, GROUP, MAC1):  # the last is its own
        guests.send(target)
    guests.send(MAC2, source=OUTSIDE)
    guests.send_from_outside(MAC1)
    guests.send_from_outside(ALL)
    last = guests.send(MAC2)
    assert wait_until(lambda: guests.port.count(last, "out") == 1, timeout=20, interval=0.01)
    assert wait_until(lambda: counts() == ReturnCounts(1, 1), timeout=20, interval=0.02), counts()


def test_frames_that_the_switch_keeps_are_missing_in_one_counter(guests: Guests) -> None:
    set_hairpin(PORT, SWITCH, on=False)
    last = [guests.send(MAC2) for _ in range(20)][-1]
    assert wait_until(lambda: guests.port.count(last, "in") == 1, timeout=20, interval=0.01)
    assert counts() == ReturnCounts(20, 0)


def test_rules_are_replaced_removed_and_missed(network: None) -> None:
    def check(macs: tuple[Any, ...]) -> bool:
        return within(HOST, lambda: is_counting(REAL, UPLINK, macs))

    assert counts() is None
    for macs in ((MAC1,), MACS, (MAC2,)):
        assert not check(macs)
        within(HOST, lambda m=macs: count_returns(REAL, UPLINK, m))  # type: ignore[misc]
        assert check(macs)
        assert not check((*macs, "02:00:00:00:00:99"))  # type: ignore[arg-type]
        assert counts() == ReturnCounts(0, 0)
    within(HOST, lambda: replace_table(f"nohype-returns-{UPLINK}", Chain("must-return", "egress", UPLINK, [])))
    assert not check((MAC2,)), "another program has changed them"
    assert counts() is None
    for _ in range(2):
        within(HOST, lambda: stop_counting(REAL, UPLINK))
        assert check(())


@pytest.mark.parametrize("name", ["eth0.100", "0", "drop", "wan+", "a@b", 'a"b', "a;b", "a{b", "table*"])
def test_uplink_can_have_any_name(network: None, name: str) -> None:
    """Names that are not words of nft, or words with another meaning there."""

    def count() -> tuple[object, ...]:
        run(["ip", "link", "add", "name", name, "type", "veth"])
        try:
            count_returns(REAL, name, MACS)
            found = is_counting(REAL, name, MACS), read_returns(REAL, name)
            stop_counting(REAL, name)
            return (*found, is_counting(REAL, name, ()), run(["nft", "list", "tables"]).stdout)
        finally:
            REAL.net.delete_link(name)

    assert within(HOST, count) == (True, ReturnCounts(0, 0), True, "")


class Records:
    """The part of the ledger that the watch uses: two running guests."""

    def __init__(self, mode: EdgeMode) -> None:
        nics = [NicPlan(None, UPLINK, None, None, tap.mac, mode, tap=tap.name) for tap in (ONE, TWO)]
        self.claims = [SimpleNamespace(plan=SimpleNamespace(name=nic.tap, nics=(nic,)), state="running") for nic in nics]
        self.events: list[tuple[str, str, float]] = []

    def read(self) -> Any:
        return self

    def subscribe(self, _call: object) -> None:
        pass

    def append_event(self, kind: str, _subject: str, detail: str) -> None:
        self.events.append((str(kind), detail, time.monotonic()))


@contextmanager
def talking(guests: Guests) -> Iterator[None]:
    """The guests send to each other all the time."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.02):
            with suppress(BlockingIOError):  # the tap's buffer is full
                guests.send(MAC2)
                guests.send(MAC1, TWO)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def filtered() -> Iterator[None]:
    """The switch port does not send frames of the two guests, as with port security. It reflects those of the host."""
    rule = [
        {"match": {"op": "==", "left": {"payload": {"protocol": "ether", "field": "saddr"}}, "right": {"set": [*map(str, MACS)]}}}
    ]
    within(SWITCH, lambda: replace_table("filter", Chain("out", "egress", PORT, [[*rule, {"drop": None}]])))
    yield
    within(SWITCH, lambda: REAL.net.delete_table("filter"))


def await_rounds(check: Callable[[], object], records: Records, kinds: list[str]) -> None:
    """A round compares with the round before it, so there must be traffic between them."""

    def again() -> bool:
        check()
        return len(records.events) >= len(kinds)

    assert wait_until(again, timeout=60, interval=0.5)
    assert [kind for kind, *_ in records.events] == kinds, records.events


def test_guests_frames_that_do_not_return_are_reported_once_although_the_probe_returns(
    guests: Guests, edge: SoftwareEdge
) -> None:
    mode = next(mode for mode, one in SOFTWARE.items() if one is edge)
    records = Records(mode)
    watch = HairpinWatch(REAL, records)  # type: ignore[arg-type]

    def check() -> None:
        within(HOST, watch.check)

    with talking(guests):
        for _ in range(3):
            check()
        assert (records.events, watch.find_lost()) == ([], {UPLINK: False})
        with filtered():
            await_rounds(check, records, ["hairpin-lost"])
            assert watch.find_lost() == {UPLINK: True}
            detail = records.events[0][1]
            assert f"uplink {UPLINK}: " in detail
            assert "frames between guests left" in detail
            assert "guests: nh-1, nh-2" in detail
            check()
        await_rounds(check, records, ["hairpin-lost", "hairpin-returned"])
        found = watch.find_counts()[UPLINK]
        assert found.must_return > found.returned > 0
