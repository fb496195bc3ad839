"""Which connection gives way, without sockets."""

from __future__ import annotations

import pytest

from orchestrator.api import shares as shares_module
from orchestrator.api.shares import Pace, Place, Shares


class Holder:
    """Makes places, and remembers in which order they were closed."""

    def __init__(self, shares: Shares) -> None:
        self.shares, self.closed, self.now = shares, [], 0.0

    def open(self, key: str, *, busy: bool = False, always: bool = False, later: float = 1) -> Place | None:
        self.now += later
        place = Place(key, lambda: self.closed.append(place), busy=lambda: busy, since=self.now)
        return place if self.shares.admit(place, always=always) else None


@pytest.fixture
def holder() -> Holder:
    return Holder(Shares(each=4, most=10, spare=2, few=2))


def test_client_at_its_limit_loses_its_oldest_idle_connection(holder: Holder) -> None:
    first, second = holder.open("a", busy=True), holder.open("a")
    for _ in range(2):
        assert holder.open("a", busy=True)
    assert holder.open("b")
    assert holder.open("a", busy=True)
    assert holder.closed == [second]
    assert holder.open("a") is None, "all four are busy"
    assert first
    assert len(holder.shares) == 5


def test_client_with_the_most_connections_loses_one_first(holder: Holder) -> None:
    held = {key: [holder.open(key) for _ in range(count)] for key, count in (("a", 3), ("b", 4), ("c", 3))}
    assert holder.open("d")
    assert holder.closed == [held["b"][0]]
    # Three, three, three, one: of equals any, and always the oldest.
    assert holder.open("d")
    assert holder.closed[1] in [places[0 if key != "b" else 1] for key, places in held.items()]
    assert len(holder.shares) == 10


def test_client_with_as_many_connections_loses_none(holder: Holder) -> None:
    for key in ("a", "b"):
        for _ in range(4):
            assert holder.open(key)
    own = [holder.open("c"), holder.open("c")]
    for key in ("d", "d"):
        assert holder.open(key)  # a and b lose one each
    assert {place.key for place in holder.closed} == {"a", "b"}
    for _ in range(2):
        assert holder.open("c")  # they have three, c gets three, then as many as they have
    assert holder.closed[-1] in own or holder.closed[-1].key in ("a", "b")
    assert len(holder.shares) == 10


def test_1000_idle_connections_of_one_user_lock_out_no_other() -> None:
    holder = Holder(Shares(each=128, most=400))
    for _ in range(1000):
        assert holder.open("root", always=True)
    assert len(holder.shares) == 128
    for user in ("a", "b", "c", "d"):
        for _ in range(127):
            assert holder.open(user)
    for newcomer in range(300):
        assert holder.open(f"user {newcomer}"), newcomer
    assert len(holder.shares) == 400


def test_clients_with_few_connections_are_admitted_while_all_are_busy(holder: Holder) -> None:
    for key in ("a", "b", "c"):
        for _ in range(4):
            holder.open(key, busy=True)
    assert len(holder.shares) == 10
    assert holder.open("c", busy=True) is None
    assert holder.open("d", busy=True)
    assert holder.open("e", busy=True)
    assert holder.open("f", busy=True) is None, "there is a bound on those too"
    assert [bool(holder.open("root", busy=True, always=True)) for _ in range(9)] == [True] * 8 + [False]
    assert holder.closed == []


def test_ended_connection_is_not_counted(holder: Holder) -> None:
    places = [holder.open("a", busy=True) for _ in range(4)]
    assert holder.open("a") is None
    assert places[0]
    for _ in range(2):  # closed by us, and then lost
        holder.shares.release(places[0])
    assert holder.open("a")
    assert len(holder.shares) == 4


def test_connection_with_an_unread_response_is_closed_last(holder: Holder) -> None:
    places = [holder.open("a") for _ in range(4)]
    assert all(places)
    holder.shares.hold(places[0], 1000)  # type: ignore[arg-type]
    assert holder.open("a")
    assert holder.closed == [places[1]]


def test_unread_responses_are_bounded(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "MAX_HELD", 100)
    places = [holder.open("a", busy=True) for _ in range(3)]
    for place in places[:2]:
        holder.shares.hold(place, 50)  # type: ignore[arg-type]
    assert holder.closed == []
    holder.shares.hold(places[2], 1)  # type: ignore[arg-type]
    assert holder.closed == [places[0]], "the one that has waited longest"
    holder.shares.hold(places[2], 400)  # type: ignore[arg-type]
    assert holder.closed == places[:2], "one answer alone is sent, however long it is"
    for key in ("b", "c", "d", "e"):
        holder.shares.hold(holder.open(key, busy=True), 90)  # type: ignore[arg-type]
    assert [place.key for place in holder.closed[2:]] == ["a"], "all together have four times as much"


def test_client_that_reopens_connections_is_refused(holder: Holder) -> None:
    for _ in range(4):
        assert holder.open("a", later=0.01)
    for _ in range(50):
        assert holder.open("a", later=0.01) is None, "the four are as new"
    assert holder.open("a", later=2)
    assert len(holder.closed) == 1
    for key in ("b", "c", "d", "e", "f", "g", "h", "i"):
        assert holder.open(key, later=0.01), "others do not wait"


def test_clients_with_many_connections_do_not_displace_each_other(holder: Holder) -> None:
    for key in ("a", "b"):
        for _ in range(4):
            assert holder.open(key, later=0.01)
    for _ in range(2):
        assert holder.open("c", later=0.01)
    for _ in range(50):
        assert holder.open("c", later=0.01) is None, "it holds two, which is not few here"
    assert holder.closed == []
    assert holder.open("d", later=0.01)
    assert holder.open("c", later=2)
    assert [place.key for place in holder.closed] == ["a", "b"]


def test_idle_connections_of_root_are_limited(holder: Holder) -> None:
    opened = [holder.open("root", always=True, later=0.01) for _ in range(20)]
    assert sum(map(bool, opened)) == 4


def test_pace_delays_operations_above_the_rate() -> None:
    now = 0.0
    pace = Pace(rate=10, burst=3, clock=lambda: now)
    assert [round(pace.reserve("a"), 3) for _ in range(5)] == [0, 0, 0, 0.1, 0.2]
    assert pace.reserve("b") == 0
    now = 0.5
    assert [round(pace.reserve("a"), 3) for _ in range(4)] == [0, 0, 0, 0.1]
    for number in range(5000):
        pace.reserve(f"address {number}")
    assert pace.reserve("a") == 0, "forgotten: memory is bounded"
    assert [round(pace.reserve("address 4999"), 3) for _ in range(3)] == [0, 0, 0.1], "what was seen last is remembered"


def test_make_room_closes_an_idle_connection(holder: Holder) -> None:
    assert not holder.shares.make_room()
    holder.open("b")
    first, _ = holder.open("a"), holder.open("a")
    assert holder.shares.make_room()
    assert holder.closed == [first]
