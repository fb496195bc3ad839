"""Rates and sizes, without a server."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import SimpleQueue
from socketserver import UnixStreamServer

import pytest

from orchestrator.api.app import ROUTES
from orchestrator.api.body import ClientDisconnected, parse_json
from orchestrator.api.fields import parse_if_match
from orchestrator.api.limits import MAX_CLIENTS, Kind, RateLimiter
from orchestrator.api.routing import Route, RouteTable
from orchestrator.api.waits import while_connected
from orchestrator.api.workers import Threads, Workers, WorkersPerClient
from orchestrator.client.answers import parse_stream
from orchestrator.client.client import Client
from orchestrator.client.problems import MEDIA_TYPE, STATUS, STATUS_BY_CLASS, build_headers, build_problem, parse_problem
from orchestrator.errors import GuestError, HypervisorError, LedgerError, NoRoom, OrchestratorError, RequestError, TooMany
from orchestrator.model.access import Identity, Role
from tests.harness.pauses import record_pauses


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_each_byte_of_a_body_is_scanned_once(end: bytes) -> None:
    """A string that never ends, of a length at which to begin again at each quote would take days."""
    with pytest.raises(RequestError, match="invalid JSON"):
        parse_json(b'["' + b'\\"' * 1_000_000 + end, nesting=16)


def test_bucket_empties_and_fills() -> None:
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


def test_requests_in_progress_are_limited() -> None:
    limiter = RateLimiter(rate=1000, burst=1000, concurrent=2, clock=Clock())
    with limiter.admit("a"), limiter.admit("a"):
        with pytest.raises(TooMany, match="a has 2 requests in progress, the limit"), limiter.admit("a"):
            pass
        with limiter.admit("b"):
            pass
    with limiter.admit("a"):
        pass


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_of_request_has_its_own_limit(kind: Kind) -> None:
    """So that a client which waits in all places can still do everything else, and end what it waits for."""
    limiter = RateLimiter(rate=1000, burst=1000, concurrent=2, clock=Clock())
    with limiter.admit("a", kind), limiter.admit("a", kind):
        with pytest.raises(TooMany, match="a has 2 (waiting requests|requests in progress), the limit"), limiter.admit("a", kind):
            pass
        for other in set(Kind) - {kind}:
            with limiter.admit("a", other), limiter.admit("a", other):
                pass


def test_refusal_contains_the_seconds_to_wait() -> None:
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
def test_kind_of_a_request_follows_from_its_path(method: str, path: str, kind: Kind) -> None:
    assert RouteTable(ROUTES).find_kind(method, path) is kind


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_path_of_each_operation_leads_to_it(route: Route) -> None:
    table, path = RouteTable(ROUTES), re.sub(r"\{.*?\}", "a b%", route.path)
    values = dict.fromkeys(re.findall(r"\{(.*?)\}", route.path), "a b%")
    assert table.find(route.method, path) == (route, values)
    assert route.method in table.methods(path)
    for other in (path + "/", path[1:], path + "/x/y/z", route.path.replace("{name}", "")):
        assert other == path or table.find(route.method, other) is None, other


def test_remembered_clients_are_bounded() -> None:
    limiter = RateLimiter(rate=1, burst=1, concurrent=2, clock=Clock())
    with limiter.admit("one that stays"):
        for number in range(3 * MAX_CLIENTS):
            limiter.consume(f"address {number}")
        assert len(limiter) == MAX_CLIENTS
        with pytest.raises(TooMany):
            limiter.consume("one that stays")


def test_calls_run_concurrently_up_to_the_limit() -> None:
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


def test_cancelled_call_counts_until_it_ends() -> None:
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


def test_call_after_call_uses_the_same_thread() -> None:
    """A result arrives when the thread is free again: otherwise the next call would start another one."""

    async def main() -> list[threading.Thread]:
        workers = Workers(4)
        return [await workers.run(threading.current_thread) for _ in range(20)]

    used = asyncio.run(main())
    assert len(set(used)) == 1
    assert used[0].daemon


def test_call_does_not_wait_for_a_thread_in_use() -> None:
    hangs = threading.Event()

    async def main() -> None:
        workers = Workers(3)
        waiting = [asyncio.ensure_future(workers.run(hangs.wait, 30)) for _ in range(2)]
        await asyncio.sleep(0)
        assert await workers.run(lambda: "done") == "done"
        hangs.set()
        assert await asyncio.gather(*waiting) == [True] * 2

    asyncio.run(main())


def test_thread_without_work_ends() -> None:
    """None of the calls is lost, whether its thread was still there or has just ended."""
    threads, results = Threads(idle=0.001), SimpleQueue[threading.Thread]()
    used = set()

    def job() -> Callable[[], object]:
        return partial(results.put, threading.current_thread())

    for _ in range(200):
        threads.start("test", job)
        used.add(results.get(timeout=30))
    for thread in used:
        thread.join(30)
    assert not any(thread.is_alive() for thread in used)


def test_calls_of_one_client_delay_no_other() -> None:
    hangs, ann, bob = threading.Event(), *(Identity(name, Role.TENANT, name) for name in "ab")

    async def main() -> None:
        workers = WorkersPerClient(2)
        many = [asyncio.ensure_future(workers.run(ann, hangs.wait, 10)) for _ in range(50)]
        await asyncio.sleep(0)
        assert await workers.run(bob, lambda: "done") == "done"
        hangs.set()
        assert await asyncio.gather(*many) == [True] * 50
        gc.collect()
        assert len(workers) <= 1, "entries without calls are dropped"

    asyncio.run(main())


def test_wait_is_cancelled_when_its_client_disconnects() -> None:
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
def test_wait_returns_its_result_or_error(error: GuestError | None) -> None:
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


def test_call_continues_without_its_client() -> None:
    go_on, done = threading.Event(), threading.Event()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Workers(1).run(lambda: (go_on.wait(30), done.set())), 0.01)

    asyncio.run(main())
    assert not done.is_set()
    go_on.set()
    assert done.wait(30)


@pytest.mark.parametrize(
    ("field", "versions"),
    [(None, None), ("*", None), ('"7"', {7}), (' "7" , "8"', {7, 8}), ('W/"7"', set()), ('"x"', set()), ('""', set()),
     ('"3" , , "4"', {3, 4}), (',"3",', {3}), ('"03"', set()), ('"0"', set()), ('"+3"', set()), ('W/"3", "4"', {4}),
     (f'"{10**17}"', {10**17}), (f'"{10**18}"', set())],
)  # fmt: skip
def test_if_match_is_parsed(field: str | None, versions: set[int] | None) -> None:
    assert parse_if_match(field) == (None if versions is None else frozenset(versions))


@pytest.mark.parametrize(
    "field", ["7", '"7', "", ",", " , ,", '*, "7"', 'w/"7"', 'W/ "7"', '"7"\n"8"', '"7";"8"', '"a b"', '"\x7f"']
)
def test_invalid_if_match_is_refused(field: str) -> None:
    with pytest.raises(RequestError, match="If-Match"):
        parse_if_match(field)


def test_every_error_survives_serialization() -> None:
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


def test_event_stream_is_parsed() -> None:
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
def test_invalid_event_stream_is_refused(stream: bytes) -> None:
    with pytest.raises(OrchestratorError, match="not a NoHype manager"):
        list(parse_stream(io.BytesIO(stream)))


@pytest.mark.parametrize(
    ("trouble", "pauses"),
    [(TooMany("slowly", wait=7.5), [1.0, 7.5]), (TooMany("slowly", wait=0.1), [1.0, 1.0]), (LedgerError("disk"), [1.0, 1.0])],
)  # fmt: skip
def test_follow_continues_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: OrchestratorError, pauses: list[float]
) -> None:
    slept = record_pauses(monkeypatch)
    with answer_in_turn(tmp_path / "socket", [event_line(1) + b"\n", trouble, event_line(2) + b"\n", trouble]) as asked:
        events = Client(tmp_path / "socket").follow(0)
        assert [next(events)["id"], next(events)["id"]] == [1, 2]
        assert (asked, slept) == (["0", "1", "1"], pauses)
        with pytest.raises(type(trouble)):
            next(Client(tmp_path / "socket").follow(0))


@contextmanager
def answer_in_turn(path: Path, answers: list[bytes | OrchestratorError]) -> Iterator[list[str]]:
    """Serves each request to a stream of events with the next answer; yields the fields Last-Event-ID of the requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Last-Event-ID"])
            one = answers.pop(0)
            if isinstance(one, OrchestratorError):
                problem = build_problem(one)
                self.send_response_only(problem["status"])
                fields, content = {"Content-Type": MEDIA_TYPE, **build_headers(one)}, json.dumps(problem).encode()
            else:
                self.send_response_only(200)
                fields, content = {"Content-Type": "text/event-stream"}, one
            for name, value in fields.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    with UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield asked
        server.shutdown()
        thread.join()
