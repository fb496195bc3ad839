"""Rates and sizes, without a server."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.answers import parse_stream
from orchestrator.api.body import check_json
from orchestrator.api.client import Client
from orchestrator.api.fields import parse_if_match
from orchestrator.api.limits import _REMEMBERED, Turns
from orchestrator.api.problems import _KINDS, STATUS, build_headers, build_problem, parse_problem
from orchestrator.api.work import Workers
from orchestrator.errors import HypervisorError, LedgerError, NoRoom, OrchestratorError, RequestError, TooMany


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_each_character_of_a_body_is_looked_at_once(end: bytes) -> None:
    """A string that never ends, of a length at which to begin again at each quote would take days."""
    with pytest.raises(RequestError, match="not JSON"):
        check_json(b'["' + b'\\"' * 1_000_000 + end, nesting=16)


def test_a_bucket_empties_and_fills() -> None:
    clock = Clock()
    turns = Turns(rate=2, burst=3, concurrent=10, clock=clock)
    for _ in range(3):
        turns.charge("a")
    with pytest.raises(TooMany, match="a") as caught:
        turns.charge("a")
    assert caught.value.wait == 0.5
    turns.charge("b")
    clock.now = 0.5
    turns.charge("a")
    with pytest.raises(TooMany):
        turns.charge("a")
    clock.now = 1000
    for _ in range(3):
        turns.charge("a")
    with pytest.raises(TooMany):
        turns.charge("a")


def test_only_so_many_run_at_a_time() -> None:
    turns = Turns(rate=1000, burst=1000, concurrent=2, clock=Clock())
    with turns.turn("a"), turns.turn("a"):
        with pytest.raises(TooMany, match="2 requests of a are running"), turns.turn("a"):
            pass
        with turns.turn("b"):
            pass
    with turns.turn("a"):
        pass


def test_strangers_without_number_take_no_memory_without_bound() -> None:
    turns = Turns(rate=1, burst=1, concurrent=2, clock=Clock())
    with turns.turn("one that stays"):
        for number in range(3 * _REMEMBERED):
            turns.charge(f"address {number}")
        assert len(turns._accounts) == _REMEMBERED
        with pytest.raises(TooMany):
            turns.charge("one that stays")


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
    for kind, status in _KINDS.items():
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
    with pytest.raises(OrchestratorError, match="the program at this address did not answer as a manager does"):
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
