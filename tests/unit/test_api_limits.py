"""Rates and sizes, without a server."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.app import ROUTES
from orchestrator.api.body import ClientDisconnected, check_json
from orchestrator.api.fields import parse_if_match
from orchestrator.api.limits import MAX_CLIENTS, Kind, RateLimiter
from orchestrator.api.waits import Kinds, while_connected
from orchestrator.api.workers import Workers, WorkersPerClient
from orchestrator.client.answers import parse_stream
from orchestrator.client.client import Client
from orchestrator.client.problems import STATUS, STATUS_BY_CLASS, build_headers, build_problem, parse_problem
from orchestrator.errors import GuestError, HypervisorError, LedgerError, NoRoom, OrchestratorError, RequestError, TooMany
from orchestrator.model.access import Identity, Role


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_each_character_of_a_body_is_looked_at_once(end: bytes) -> None:
    """A string that never ends, of a length at which to begin again at each quote would take days."""
    with pytest.raises(RequestError, match="invalid JSON"):
        check_json(b'["' + b'\\"' * 1_000_000 + end, nesting=16)


def test_a_bucket_empties_and_fills() -> None:
    clock = Clock()
    limiter = RateLimiter(rate=2, burst=3, concurrent=10, clock=clock)
    for _ in range(3):
        limiter.consume("a")
    with pytest.raises(TooMany, match="a") as caught:
        limiter.consume("a")
    assert caught.value.wait == 0.5
    limiter.consume("b")
    clock.now = 0.5
    limiter.consume("a")
    with pytest.raises(TooMany):
        limiter.consume("a")
    clock.now = 1000
    for _ in range(3):
        limiter.consume("a")
    with pytest.raises(TooMany):
        limiter.consume("a")


def test_only_so_many_run_at_a_time() -> None:
    limiter = RateLimiter(rate=1000, burst=1000, concurrent=2, clock=Clock())
    with limiter.admit("a"), limiter.admit("a"):
        with pytest.raises(TooMany, match="a has 2 requests in progress, the limit"), limiter.admit("a"):
            pass
        with limiter.admit("b"):
            pass
    with limiter.admit("a"):
        pass


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_of_request_has_places_of_its_own(kind: Kind) -> None:
    """So that a client which waits in all places can still do everything else, and end what it waits for."""
    limiter = RateLimiter(rate=1000, burst=1000, concurrent=2, clock=Clock())
    with limiter.admit("a", kind), limiter.admit("a", kind):
        with pytest.raises(TooMany, match="a has 2 (waiting requests|requests in progress), the limit"), limiter.admit("a", kind):
            pass
        for other in set(Kind) - {kind}:
            with limiter.admit("a", other), limiter.admit("a", other):
                pass


def test_who_is_refused_is_told_how_long_it_may_take() -> None:
    clock = Clock()
    limiter = RateLimiter(rate=1000, burst=1000, concurrent=2, clock=clock)

    def refused(kind: Kind) -> tuple[float, str]:
        with pytest.raises(TooMany) as caught, limiter.admit("a", kind):
            pass
        return caught.value.wait, str(caught.value)

    with limiter.admit("a", Kind.WAIT) as first, limiter.admit("a", Kind.WAIT) as second:
        first.may_last(math.inf)
        second.may_last(math.inf)
        assert refused(Kind.WAIT)[0] == 3600
        assert "none of them ends before the client closes it" in refused(Kind.WAIT)[1]
        assert "close the connection of a waiting request" in refused(Kind.WAIT)[1]
        second.may_last(600)
        clock.now = 100
        assert refused(Kind.WAIT)[0] == 500
        assert "the first is due in 500 s" in refused(Kind.WAIT)[1]
        clock.now = 1000
        assert refused(Kind.WAIT)[0] == 1, "it is about to end"
    with limiter.admit("a") as first, limiter.admit("a"):
        first.may_last(600)
        assert refused(Kind.OTHER)[0] == 1, "of the other it is not known"
        assert "is due" not in refused(Kind.OTHER)[1]
        assert "kill and delete are accepted meanwhile" in refused(Kind.OTHER)[1]


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v1/guests/web/ready", Kind.WAIT), ("HEAD", "/v1/guests/web/ready", Kind.WAIT), ("GET", "/v1/audit", Kind.WAIT),
        ("POST", "/v1/guests/web/tell", Kind.WAIT), ("GET", "/v1/events/stream", Kind.WAIT), ("GET", "/v1/events", Kind.OTHER),
        ("POST", "/v1/guests/web/kill", Kind.END), ("DELETE", "/v1/guests/web", Kind.END), ("GET", "/v1/guests/web", Kind.OTHER),
        ("POST", "/v1/guests/web/stop", Kind.OTHER), ("DELETE", "/v1/quarantine/web", Kind.OTHER), ("GET", "/nix", Kind.OTHER),
        ("POST", "/v1/guests", Kind.OTHER), ("DELETE", "/v1/guests/web/kill", Kind.OTHER),
        ("GET", "/v1/guests/ready", Kind.OTHER),
    ],
)  # fmt: skip
def test_what_a_request_is_for_is_seen_from_its_path(method: str, path: str, kind: Kind) -> None:
    assert Kinds(ROUTES).find(method, path) is kind


def test_strangers_without_number_take_no_memory_without_bound() -> None:
    limiter = RateLimiter(rate=1, burst=1, concurrent=2, clock=Clock())
    with limiter.admit("one that stays"):
        for number in range(3 * MAX_CLIENTS):
            limiter.consume(f"address {number}")
        assert len(limiter) == MAX_CLIENTS
        with pytest.raises(TooMany):
            limiter.consume("one that stays")


def test_calls_run_side_by_side_but_only_so_many() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        if number == 7:
            raise OrchestratorError("seven")
        return number

    async def main() -> list[object]:
        workers = Workers(3)
        return await asyncio.gather(*(workers.run(work, number) for number in range(9)), return_exceptions=True)

    results = asyncio.run(main())
    assert [result for result in results if isinstance(result, int)] == [0, 1, 2, 3, 4, 5, 6, 8]
    assert str(results[7]) == "seven"
    assert most == 3


def test_a_call_that_was_given_up_keeps_its_turn_until_it_ends() -> None:
    """Else there would be more threads than limiter."""
    begun: list[int] = []
    hangs = threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        hangs.wait(10)
        return number

    async def main() -> None:
        workers = Workers(2)
        for number in range(4):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(workers.run(work, number), 0.05)
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        assert begun == [0, 1]
        hangs.set()
        assert await workers.run(work, 4) == 4
        assert begun == [0, 1, 4], "what was given up before it had begun was not done"

    asyncio.run(main())


def test_one_clients_calls_keep_no_other_waiting() -> None:
    hangs, ann, bob = threading.Event(), *(Identity(name, Role.TENANT, name) for name in "ab")

    async def main() -> None:
        workers = WorkersPerClient(2)
        many = [asyncio.ensure_future(workers.run(ann, hangs.wait, 10)) for _ in range(50)]
        await asyncio.sleep(0)
        assert await workers.run(bob, lambda: "done") == "done"
        hangs.set()
        assert await asyncio.gather(*many) == [True] * 50
        assert len(workers._workers) <= 1

    asyncio.run(main())


def test_a_wait_is_given_up_when_its_client_has_gone() -> None:
    async def main() -> None:
        messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        wait: Future[str] = Future()
        messages.put_nowait({"type": "http.request"})
        waiting = asyncio.ensure_future(while_connected(messages.get, wait))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        messages.put_nowait({"type": "http.disconnect"})
        with pytest.raises(ClientDisconnected):
            await waiting
        assert wait.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("error", [None, GuestError("no")])
def test_a_wait_ends_as_it_ends(error: GuestError | None) -> None:
    async def main() -> str:
        wait: Future[str] = Future()
        waiting = asyncio.ensure_future(while_connected(asyncio.Queue().get, wait))
        await asyncio.sleep(0)
        threading.Thread(target=lambda: wait.set_exception(error) if error else wait.set_result("yes")).start()
        return await waiting

    if error:
        with pytest.raises(GuestError):
            asyncio.run(main())
    else:
        assert asyncio.run(main()) == "yes"


def test_a_call_goes_on_when_nobody_waits_for_it_any_more() -> None:
    done = threading.Event()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Workers(1).run(lambda: (time.sleep(0.1), done.set())), 0.01)

    asyncio.run(main())
    assert done.wait(2)


@pytest.mark.parametrize(
    ("field", "versions"),
    [(None, None), ("*", None), ('"7"', {7}), (' "7" , "8"', {7, 8}), ('W/"7"', set()), ('"x"', set()), ('""', set()),
     ('"3" , , "4"', {3, 4}), (',"3",', {3}), ('"03"', set()), ('"0"', set()), ('"+3"', set()), ('W/"3", "4"', {4}),
     (f'"{10**17}"', {10**17}), (f'"{10**18}"', set())],
)  # fmt: skip
def test_if_match(field: str | None, versions: set[int] | None) -> None:
    assert parse_if_match(field) == (None if versions is None else frozenset(versions))


@pytest.mark.parametrize(
    "field", ["7", '"7', "", ",", " , ,", '*, "7"', 'w/"7"', 'W/ "7"', '"7"\n"8"', '"7";"8"', '"a b"', '"\x7f"']
)
def test_a_wrong_if_match(field: str) -> None:
    with pytest.raises(RequestError, match="If-Match"):
        parse_if_match(field)


def test_every_error_survives_the_journey() -> None:
    for kind, status in STATUS_BY_CLASS.items():
        error = kind.__new__(kind)
        OrchestratorError.__init__(error, "what", "do")
        error.reasons, error.wait = ("why",), 2.5  # type: ignore[attr-defined]
        problem = build_problem(error)
        back = parse_problem(problem)
        assert (type(back), back.code, back.message, back.hint) == (kind, error.code, "what", "do")
        assert problem["status"] == status == STATUS[error.code]
    assert parse_problem(build_problem(NoRoom("no", ("node 0: full",)))).reasons == ["node 0: full"]  # type: ignore[attr-defined]
    assert parse_problem(build_problem(HypervisorError("x", number=38))).number == 0  # type: ignore[attr-defined]
    assert build_headers(TooMany("x", wait=1.2)) == {"Retry-After": "2"}
    assert parse_problem({}).code == "error"


EVENT = {"id": 1, "time": "t", "kind": "k", "subject": "s", "who": "w", "detail": "d", "tenant": "", "took": None}


class Stream(io.BytesIO):
    headers = Message()
    headers["Content-Type"] = "text/event-stream"


def event_line(number: int) -> bytes:
    return b"data: " + json.dumps({**EVENT, "id": number}).encode() + b"\n"


def test_a_stream_of_events_is_read() -> None:
    first, comma, rest = event_line(2).partition(b",")
    begin, end = first + comma + b"\n", b"data: " + rest
    lines = [
        b": hello\n",
        b"\n",
        b"id: 1\n",
        b"event: x\n",
        event_line(1),
        b"\n",
        b": still here\n",
        b"\n",
        begin,
        end,
        b"\n",
        event_line(3),
    ]
    assert list(parse_stream(io.BytesIO(b"".join(lines)))) == [{**EVENT, "id": 1}, {**EVENT, "id": 2}]


@pytest.mark.parametrize(
    "stream",
    [b"data: \xff\n\n", b"data: {\n\n", b"data: [1]\n\n", b'data: {"id": "1"}\n\n', b"data: " + b"[" * 100_000 + b"\n\n",
     b"x" * (2 << 20), b"data: x\n" * 600_000],
)  # fmt: skip
def test_what_is_no_stream_of_events(stream: bytes) -> None:
    with pytest.raises(OrchestratorError, match="not a NoHype manager"):
        list(parse_stream(io.BytesIO(stream)))


@pytest.mark.parametrize(
    ("trouble", "pauses"),
    [(TooMany("slowly", wait=7.5), [1.0, 7.5]), (TooMany("slowly", wait=0.1), [1.0, 1.0]), (LedgerError("disk"), [1.0, 1.0])],
)  # fmt: skip
def test_who_follows_events_goes_on_after_trouble(
    monkeypatch: pytest.MonkeyPatch, trouble: OrchestratorError, pauses: list[float]
) -> None:
    answers: list[bytes | OrchestratorError] = [event_line(1) + b"\n", trouble, event_line(2) + b"\n"]
    asked, slept = [], []

    @contextmanager
    def answer(
        _self: Client, _method: str, _target: str, _body: object, headers: dict[str, str], _timeout: float
    ) -> Iterator[Any]:
        asked.append(headers["Last-Event-ID"])
        if isinstance(one := answers.pop(0), OrchestratorError):
            raise one
        yield Stream(one)

    monkeypatch.setattr(Client, "_open", answer)
    monkeypatch.setattr(time, "sleep", slept.append)
    events = Client(Path("/nowhere")).follow(0)
    assert [next(events)["id"], next(events)["id"]] == [1, 2]
    assert (asked, slept) == (["0", "1", "1"], pauses)
    answers[:] = [trouble]
    with pytest.raises(type(trouble)):
        next(Client(Path("/nowhere")).follow(0))
