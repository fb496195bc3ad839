"""What the fast path of the connection accepts, h11 accepts too, and reads in the same way."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.connection import Parser
from orchestrator.api.whole_request import WholeCycle, parse_whole

MAX_HEAD = 16 << 10
COMMON = b"POST /v1/guests?x=%20 HTTP/1.1\r\nHost: localhost\r\nContent-Type:application/json\r\nContent-Length: 2\r\n\r\n{}"
READ = b"GET /v1/guests HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: identity\r\nConnection: Keep-Alive\r\nX-Empty: \r\n\r\n"
PARTS = [
    b"GET", b"POST", b"HEAD", b"get", b" ", b"/", b"*", b"http://h/", b"?", b"#", b"\x00", b"\xff", b"HTTP/1.1", b"HTTP/1.0",
    b"\r\n", b"\n", b"\r", b"\t", b":", b",", b"Host: x\r\n", b"host:", b"Host : y\r\n", b"X: a\x0bb\r\n", b" folded\r\n",
    b"Content-Length: 2\r\n", b"Content-Length: 02\r\n", b"content-length: 2, 2\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: +2\r\n", b"Content-Length: 99999999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n",
    b"{}", b"0\r\n\r\n", b"\r\n\r\n", b"{}GET / HTTP/1.1\r\nHost: x\r\n\r\n",
]  # fmt: skip


def read_with_h11(data: bytes) -> tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes, bool]:
    """Method, target, fields, body, and whether the connection stays open for another request."""
    parser = Parser(h11.SERVER, MAX_HEAD)
    parser.receive_data(data)
    request = parser.next_event()
    assert isinstance(request, h11.Request)
    assert request.http_version == b"1.1"
    body = b""
    while isinstance(event := parser.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert parser.trailing_data[0] == b""
    assert not parser.they_are_waiting_for_100_continue
    stays_open = parser.their_state is h11.DONE
    return request.method, request.target, [(name.lower(), value) for name, value in request.headers], body, stays_open


def check(data: bytes) -> bool:
    """Whether the fast path accepts the data; if so, h11 must read the same."""
    if not (whole := parse_whole(data, MAX_HEAD)):
        return False
    assert read_with_h11(data) == (whole.method, whole.target, whole.fields, whole.body, True)
    return True


@pytest.mark.parametrize("data", [COMMON, READ])
def test_common_requests_are_accepted(data: bytes) -> None:
    assert check(data)


@pytest.mark.parametrize("data", [COMMON, READ])
def test_part_of_a_request_is_left_to_h11(data: bytes) -> None:
    assert not any(check(data[:end]) for end in range(len(data)))
    assert not check(data + b"x")
    assert not check(data + data)


CHANGES = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 3), st.sampled_from(PARTS)), max_size=4)


@given(st.sampled_from([COMMON, READ]), CHANGES)
def test_changed_request_is_read_as_by_h11_or_left_to_it(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    for place, removed, added in changes:
        data = data[:place] + added + data[place + removed :]
    check(data)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_at_each_place_is_read_as_by_h11_or_left_to_it(part: bytes) -> None:
    for data in (COMMON, READ):
        for place in range(len(data) + 1):
            check(data[:place] + part + data[place:])


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_at_each_place_is_read_as_by_h11_or_left_to_it(byte: int) -> None:
    for place in range(len(COMMON)):
        check(COMMON[:place] + bytes([byte]) + COMMON[place + 1 :])


def test_head_at_the_limits() -> None:
    def build(fields: int, size: int) -> bytes:
        lines = b"".join(b"X-%d: 1\r\n" % number for number in range(fields - 2))
        start = b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"Y: "
        return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"

    assert check(build(100, 4000))
    assert not check(build(101, 4000))
    assert check(build(5, MAX_HEAD))
    assert not check(build(5, MAX_HEAD + 1))


def respond(*messages: dict[str, Any]) -> tuple[bytes, Mock, WholeCycle]:
    """What is written for the ASGI messages; the transport; the cycle."""
    transport, flow = Mock(), Mock(write_paused=False)

    async def run() -> WholeCycle:
        cycle = WholeCycle(
            scope={"headers": []}, conn=Mock(they_are_waiting_for_100_continue=False), transport=transport, flow=flow,
            logger=Mock(), access_logger=Mock(), access_log=False, default_headers=[(b"date", b"now")],
            message_event=asyncio.Event(), on_response=Mock(),
        )  # fmt: skip
        for message in messages:
            await cycle.send(message)
        return cycle

    cycle = asyncio.run(run())
    return b"".join(call.args[0] for call in transport.write.call_args_list), transport, cycle


def start(status: int, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def content(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


LENGTH = (b"content-length", b"4")


@pytest.mark.parametrize(
    "messages",
    [
        (start(200, LENGTH), content(b"text")), (start(404, LENGTH), content(b"co", more=True), content(b"py")),
        (start(200), content(b"co", more=True), content(b"", more=True), content(b"py")), (start(200), content(b"")),
        (start(204), content(b"")), (start(200, (b"content-length", b"0")), content(b"")),
    ],
)  # fmt: skip
def test_response_is_what_h11_reads(messages: tuple[dict[str, Any], ...]) -> None:
    data, transport, cycle = respond(*messages)
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    assert response.status_code == messages[0]["status"]
    assert (b"date", b"now") in response.headers
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert body == b"".join(message["body"] for message in messages[1:])
    assert client.their_state is h11.DONE
    assert cycle.response_complete
    assert not transport.close.called


def test_response_that_ends_the_connection_closes_it() -> None:
    assert respond(start(200, LENGTH, (b"connection", b"close")), content(b"text"))[1].close.called


@pytest.mark.parametrize(
    "messages",
    [
        (start(200, LENGTH), content(b"tex")), (start(200, LENGTH), content(b"texts", more=True)), (start(204), content(b"x")),
        (content(b""),), (start(200), start(200)), (start(200), content(b""), content(b"")),
        (start(200, (b"location", b"/\r\nx: y")),), (start(200, (b"a\nb", b"c")),), (start(200, (b"a", b"\0")),),
    ],
)  # fmt: skip
def test_malformed_response_is_an_error(messages: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(RuntimeError):
        respond(*messages)
