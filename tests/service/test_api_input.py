"""Bad input and trouble: each is one clear problem document with a stable code, and nothing is lost."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from orchestrator.api import connection as api_connection
from orchestrator.model.secret import MAX_NETWORK_CONFIG, MAX_USER_DATA
from tests.fakes.server import CLOUD_IMAGE
from tests.harness.api_server import Served, send, serve

GOOD = {"name": "one", "memory": "64M", "image": "minimal"}
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("input")) as served:
        yield served


def ask(served: Served, method: str, target: str, body: bytes | None = None, *fields: str) -> tuple[int, dict, dict[str, str]]:
    """Sends exactly this; returns status, document and header fields."""
    lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *fields]
    if body is not None and not any(field.startswith("Transfer") for field in fields):
        lines += [f"Content-Length: {len(body)}"]
        lines += [] if any(field.startswith("Content-Type") for field in fields) else ["Content-Type: application/json"]
    answer = send(served.path, "\r\n".join([*lines, "", ""]).encode() + (body or b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    return int(first.split()[1]), json.loads(content) if content else {}, headers


def check(answer: tuple[int, dict, dict[str, str]], status: int, code: str, said: str = "") -> None:
    found, problem, headers = answer
    assert (found, problem.get("code")) == (status, code), problem
    assert said in problem["detail"], problem
    assert headers["content-type"] == "application/problem+json"
    assert "Traceback" not in json.dumps(problem)


def text(**change: object) -> bytes:
    return json.dumps({**GOOD, **change}).encode()


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        (b"{", 400, "bad-request", "invalid JSON"),
        (b"", 400, "bad-request", "Field required"),
        (b"null", 400, "bad-request", ""),
        (b"[]", 400, "bad-request", "valid"),
        (b'"text"', 400, "bad-request", ""),
        (b"\xff\xfe{}", 400, "bad-request", "invalid UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", 400, "bad-request", "invalid JSON"),
        (b'{"name": "one", "name": "two"}', 400, "bad-request", "duplicate member 'name'"),
        (b'{"a": {"b": 1, "b": 1}}', 400, "bad-request", "duplicate member 'b'"),
        (b'{"cores": NaN}', 400, "bad-request", "NaN is not allowed"),
        (b'{"cores": -Infinity}', 400, "bad-request", "-Infinity is not allowed"),
        (b'{"cores": 1e999}', 400, "bad-request", "too large"),
        (b'{"cores": ' + b"9" * 5000 + b"}", 400, "bad-request", "too large"),
        (b'{"name": "\\ud800"}', 400, "bad-request", "surrogate"),
        (b"[" * 17 + b"]" * 17, 413, "too-large", "nested deeper than 16"),
        (b"[" * 30000, 413, "too-large", "nested deeper than 16"),
        (b'"' + b'\\"' * 30000, 400, "bad-request", "invalid JSON"),
        (b'"' + b'\\"' * 30000 + b"\\", 400, "bad-request", "invalid JSON"),
        (text(placement={"cpus": "0-99999"}), 400, "bad-request", "more CPUs than the kernel supports"),
        (text(placement={"cpus": ",".join(["0-8191"] * 500)}), 400, "bad-request", "more CPUs than the kernel supports"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 413, "too-large", "nested"),
        (text(cores=True), 400, "bad-request", "cores"),
        (text(cores="1"), 400, "bad-request", "cores"),
        (text(cores=1.0), 400, "bad-request", "cores"),
        (text(cores=10**19), 400, "bad-request", "cores"),
        (text(memory=64), 400, "bad-request", "memory"),
        (text(name="a\u0000b"), 400, "bad-request", "name"),
        (text(name="a\nb"), 400, "bad-request", "name"),
        (text(name="../etc"), 400, "bad-request", "name"),
        (text(name="."), 400, "bad-request", "name"),
        (text(name="раypal"), 400, "bad-request", "name"),
        (text(name="ｏne"), 400, "bad-request", "name"),
        (text(name="one\u200b"), 400, "bad-request", "name"),
        (text(name="a" * 41), 400, "bad-request", "name"),
        (text(image="../../etc/passwd"), 400, "bad-request", "image"),
        (text(id="a/b"), 400, "bad-request", "id"),
        (json.dumps({**GOOD, "\u001b[31m": 1}).encode(), 400, "bad-request", "\\x1b[31m: Extra inputs"),
    ],
)
def test_invalid_body_is_refused(served: Served, body: bytes, status: int, code: str, said: str) -> None:
    check(ask(served, "POST", "/v1/plans", body), status, code, said)


@pytest.mark.parametrize("body", [{"timeout": True}, {"timeout": "5"}, {"timeout": 0}, {"timeout": 3601}, {"time": 5}, [], 5])
def test_invalid_body_of_a_stop_is_refused(served: Served, body: object) -> None:
    check(ask(served, "POST", "/v1/guests/one/stop", json.dumps(body).encode()), 400, "bad-request")


@pytest.mark.parametrize("path", ["/v1/guests", "/v1/version", "/v1/guests/one/kill"])
def test_line_end_after_a_path_makes_another_path(served: Served, path: str) -> None:
    check(ask(served, "GET", f"{path}%0A"), 404, "not-found", "no such endpoint")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "multipart/form-data"])
def test_body_of_another_media_type_is_refused(served: Served, kind: str) -> None:
    check(ask(served, "POST", "/v1/plans", text(), f"Content-Type: {kind}"), 415, "media-type", "")


def test_body_above_the_limit_is_refused(served: Served) -> None:
    fits = text(cmdline="x").replace(b'"x"', b'"' + b" " * (LIMIT - len(text(cmdline="x")) + 1) + b'"')
    assert len(fits) == LIMIT
    check(ask(served, "POST", "/v1/plans", fits), 400, "bad-request", "cmdline")
    check(ask(served, "POST", "/v1/plans", fits + b" "), 413, "too-large", f"{LIMIT} bytes")
    check(ask(served, "DELETE", "/v1/guests/one", fits + b" "), 413, "too-large")


@pytest.mark.parametrize(
    "sign", ["x", '"', "\u0436", "\u6f22", "\U0001f511"], ids=["ASCII", "quote", "2 bytes", "3 bytes", "4 bytes"]
)
def test_user_data_of_the_maximum_size_fits(served: Served, sign: str) -> None:
    start = "#cloud-config\n#"
    fits = start + sign * ((MAX_USER_DATA - len(start)) // len(sign.encode()))
    fields = {"image": CLOUD_IMAGE, "network_config": "version: 2\n#" + "\u0436" * ((MAX_NETWORK_CONFIG - 12) // 2)}
    status, plan, _ = ask(served, "POST", "/v1/plans", text(**fields, user_data=fits))
    assert (status, len(plan.get("user_data", ""))) == (200, 8), plan
    check(ask(served, "POST", "/v1/plans", text(**fields, user_data=fits + sign * 4)), 400, "bad-request", "262144 bytes")


def test_chunked_body_above_the_limit_is_refused(served: Served) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    fields = ("Transfer-Encoding: chunked", "Content-Type: application/json")
    check(ask(served, "POST", "/v1/plans", chunk * 17 + b"0\r\n\r\n", *fields), 413, "too-large")
    small = b"%x\r\n%b\r\n0\r\n\r\n" % (len(text()), text())
    assert ask(served, "POST", "/v1/plans", small, *fields)[0] == 200


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/v1/guests/a%2Fb", 400, "bad-request"),
        ("/v1/guests/one%2fstop", 400, "bad-request"),
        ("/v1/guests/..", 400, "bad-request"),
        ("/v1/guests/%2e%2e", 400, "bad-request"),
        ("/v1/guests/a%00b", 400, "bad-request"),
        ("/v1/guests/a%0Ab", 400, "bad-request"),
        ("/v1/guests/%FF%FE", 400, "bad-request"),
        ("/v1/guests/%D1%80aypal", 400, "bad-request"),
        ("/v1/guests/One", 400, "bad-request"),
        ("/v1/guests/" + "a" * 41, 400, "bad-request"),
        ("/v1/guests/nobody", 404, "not-found"),
        ("/v1/guests/", 404, "not-found"),
        ("/v1//guests", 404, "not-found"),
        ("/v2/guests", 404, "not-found"),
        ("/", 404, "not-found"),
        ("/docs", 404, "not-found"),
        ("/v1/guests/one/nix", 404, "not-found"),
        ("/v1/guests/one/ready?timeout=nan", 400, "bad-request"),
        ("/v1/guests/one/ready?timeout=inf", 400, "bad-request"),
        ("/v1/guests/one/ready?timeout=-1", 400, "bad-request"),
        ("/v1/events?after=-1", 400, "bad-request"),
        ("/v1/events?after=99999999999999999999", 400, "bad-request"),
        ("/v1/events?limit=0", 400, "bad-request"),
        ("/v1/events?limit=true", 400, "bad-request"),
        ("/v1/audit?frames=10001", 400, "bad-request"),
    ],
)
def test_invalid_target_is_refused(served: Served, target: str, status: int, code: str) -> None:
    check(ask(served, "GET", target), status, code)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [("/v1/guests", "GET, HEAD, POST"), ("/v1/guests/one", "DELETE, GET, HEAD"), ("/v1/plans", "POST")],
)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "HEAD", "NIX"])
def test_wrong_method_is_refused_with_the_allowed_ones(served: Served, target: str, allowed: str, method: str) -> None:
    if method not in allowed:
        status, _, headers = ask(served, method, target)
        assert (status, headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    "target",
    ["/v1/version", "/v1/survey", "/v1/audit", "/v1/quarantine", "/v1/guests", "/v1/guests/one", "/v1/events", "/v1/openapi.json",
     "/v1/guests/none", "/v1/nothing"],
)  # fmt: skip
def test_head_is_answered_as_get_without_content(served: Served, target: str) -> None:
    served.client.create(GOOD)
    wanted, _, fields = ask(served, "GET", target)
    answer = send(served.path, f"HEAD {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    found = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    assert (int(first.split()[1]), content) == (wanted, b"")
    assert {**found, "date": ""} == {**fields, "date": ""}
    assert int(found["content-length"]) > 0
    served.client.delete("one")


def test_head_of_the_event_stream_ends(served: Served) -> None:
    """And the connection can be used for the next request."""
    connection = (
        b"HEAD /v1/events/stream HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    answer = send(served.path, connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/event-stream" in answer
    assert answer.endswith(b'"}')


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/v1/guests", text()),
        ("/v1/plans", text()),
        ("/v1/guests/one/tell", b'{"line": "mac", "timeout": 0.1}'),
    ],
)
def test_if_match_on_a_request_that_ignores_it_is_refused(served: Served, target: str, body: bytes) -> None:
    check(ask(served, "POST", target, body, 'If-Match: "1"'), 400, "bad-request", "If-Match")
    assert served.client.guests() == []


def test_if_match_on_clearing_a_quarantine_is_checked(served: Served) -> None:
    check(ask(served, "DELETE", "/v1/quarantine/one", None, 'If-Match: "1"'), 404, "not-found")
    served.client.create(GOOD)
    check(ask(served, "DELETE", "/v1/quarantine/one", None, 'If-Match: "999999"'), 412, "stale")
    served.client.delete("one")


@pytest.mark.parametrize("field", ["7", '"7', "nix", '"7" "8"', ",", "W/7"])
def test_invalid_if_match_is_refused(served: Served, field: str) -> None:
    check(ask(served, "DELETE", "/v1/guests/one", None, f"If-Match: {field}"), 400, "bad-request", "If-Match")


def test_if_match_with_an_old_version_is_refused(served: Served) -> None:
    made = served.client.create(GOOD)
    tag = ask(served, "GET", "/v1/guests/one")[2]["etag"]
    assert tag == f'"{made["version"]}"'
    number = tag.strip('"')
    for field in ('"999999"', f"W/{tag}", '"x"', '"999998", "999999"', f'"0{number}"', '"999998", , "999999"'):
        answer = ask(served, "POST", "/v1/guests/one/kill", None, f"If-Match: {field}")
        check(answer, 412, "stale", f"version {number}")
        assert "-1" not in answer[1]["detail"]
    check(ask(served, "POST", "/v1/guests/none/kill", None, 'If-Match: W/"1"'), 404, "not-found")
    running = ask(served, "POST", "/v1/guests/one/start", None, 'If-Match: "999999"', f"If-Match: {tag}")
    assert (running[0], running[2]["etag"]) == (200, tag), "lines are one list"
    status, killed, headers = ask(served, "POST", "/v1/guests/one/kill", None, f'If-Match: "999999", {tag}')
    assert (status, killed["state"]) == (200, "stopped")
    assert headers["etag"] != tag
    assert ask(served, "DELETE", "/v1/guests/one", None, "If-Match: *")[0] == 204


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1/guests HTTP/1.1\r\n\r\n",
        b"GET /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /v1/guests HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1000000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_malformed_http_is_refused(served: Served, request_: bytes) -> None:
    answer = send(served.path, request_)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "bad-request"


@pytest.mark.parametrize(
    "fields", [(b"Content-Length: 2", b"Transfer-Encoding: chunked"), (b"transfer-encoding: chunked", b"content-length: 0")]
)
def test_body_with_two_lengths_is_refused(served: Served, fields: tuple[bytes, bytes]) -> None:
    """By one of the fields what follows is the body's, by the other a request. No proxy before us may be of another opinion."""
    head = b"\r\n".join([b"POST /v1/guests/one/kill HTTP/1.1", b"Host: x", b"Content-Type: application/json", *fields])
    answer = send(served.path, head + b"\r\n\r\n0\r\n\r\nGET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert "both Content-Length and Transfer-Encoding" in json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]


@pytest.mark.parametrize(
    ("method", "target", "body", "said"),
    [
        ("DELETE", "/v1/guests/one", b'{"dry_run": true}', "no body"),
        ("POST", "/v1/guests/one/kill", b'{"timeout": 5}', "no body"),
        ("POST", "/v1/guests/one/start", b"[]", "no body"),
        ("GET", "/v1/guests", b"null", "no body"),
        ("GET", "/v1/events?limt=1", None, "'limt'"),
        ("GET", "/v1/events?after=1&after=2", None, "'after' is given 2 times"),
        ("GET", "/v1/events/stream?limit=1", None, "'limit'"),
        ("GET", "/v1/guests/one?timeout=1", None, "'timeout'"),
        ("POST", "/v1/guests/one/kill?force=true", None, "'force'"),
        ("POST", "/v1/guests/one/stop?timeout=5", None, "'timeout'"),
        ("DELETE", "/v1/guests/one?name=two", None, "'name'"),
        ("GET", "/v1/version?=", None, "''"),
    ],
)
def test_parameters_without_effect_are_refused(served: Served, method: str, target: str, body: bytes | None, said: str) -> None:
    made = served.client.create(GOOD)
    check(ask(served, method, target, body), 400, "bad-request", said)
    assert served.client.guest("one") == made
    served.client.delete("one")


def test_empty_object_is_handled_as_no_body(served: Served) -> None:
    served.client.create(GOOD)
    for method, target in (("POST", "/stop"), ("POST", "/start"), ("POST", "/kill"), ("DELETE", "")):
        assert ask(served, method, f"/v1/guests/one{target}", b" {}\n")[0] in (200, 204)


CROSS_SITE = [
    ("Origin: https://evil.example", "Sec-Fetch-Site: cross-site"),
    ("Origin: null",),
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: same-site",),
]


@pytest.mark.parametrize("fields", CROSS_SITE)
def test_cross_site_request_is_refused(served: Served, fields: tuple[str, ...]) -> None:
    """A form without fields is asked of nobody first, and its browser shows the user's client certificate."""
    made = served.client.create(GOOD)
    form = ("Content-Type: application/x-www-form-urlencoded", *fields)
    for method, target in (("POST", "/kill"), ("POST", "/stop"), ("DELETE", "")):
        check(ask(served, method, f"/v1/guests/one{target}", b"", *form), 403, "cross-site")
    check(ask(served, "POST", "/v1/plans", text(name="two"), *fields), 403, "cross-site")
    assert ask(served, "GET", "/v1/guests/one", None, *fields)[1] == made
    for site in ("none", "same-origin"):
        assert ask(served, "POST", "/v1/guests/one/start", b"", f"Sec-Fetch-Site: {site}")[0] == 200
    served.client.delete("one")


@pytest.mark.parametrize(
    ("target", "status"),
    [("http://nohype/v1/version", 200), ("HTTPS://[::1]:8443/v1/events?after=0", 200), ("http://x", 404),
     ("http://x/v1/gu%65sts", 200), ("http://x/v1/guests/a%2Fb", 400), ("http://x?/v1/version", 404),
     ("ftp://x/v1/version", 404)],
)  # fmt: skip
def test_target_in_absolute_form_is_accepted(served: Served, target: str, status: int) -> None:
    assert ask(served, "GET", target)[0] == status


def test_creation_continues_when_its_client_disconnects(served: Served) -> None:
    whole = b"POST /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text())
    half = (whole + text())[:-5]
    send(served.path, half, then_close=True)
    time.sleep(0.3)
    assert served.client.guests() == []
    send(served.path, whole + text(), then_close=True)
    deadline = time.monotonic() + 60
    while not [one for one in served.client.guests() if one["state"] == "running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert served.client.create({**GOOD, "name": "two"})["state"] == "running"
    for name in ("one", "two"):
        served.client.delete(name)


def test_connection_without_a_request_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_connection, "IDLE_TIMEOUT", 0.3)
    for begin in (b"", b"GET /v1/guests HTTP/1.1\r\nHo"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(served.path))
            connection.sendall(begin)
            assert connection.recv(100) == b""


def test_read_is_not_delayed_by_waiting_requests(served: Served) -> None:
    served.client.create(GOOD)
    waits = [threading.Thread(target=ask, args=(served, "GET", "/v1/guests/one/ready?timeout=100")) for _ in range(80)]
    for wait in waits:
        wait.start()
    time.sleep(0.5)
    assert [one["name"] for one in served.client.guests()] == ["one"]
    assert any(wait.is_alive() for wait in waits)
    served.client.delete("one")
    for wait in waits:
        wait.join()


def read_responses(connection: socket.socket, count: int) -> list[tuple[int, object]]:
    """Status and document of each response with a Content-Length, in the order of arrival."""
    found: list[tuple[int, object]] = []
    with connection.makefile("rb") as file:
        for _ in range(count):
            status = int(file.readline().split()[1])
            length = 0
            while line := file.readline().strip():
                name, _, value = line.partition(b": ")
                length = int(value) if name == b"content-length" else length
            found.append((status, json.loads(file.read(length))))
    return found


PIECES = {"whole": 1 << 20, "bytes": 1, "parts": 40}


@pytest.mark.parametrize("size", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("together", [False, True], ids=["one after another", "pipelined"])
def test_requests_of_one_connection_are_answered_in_order(served: Served, size: int, *, together: bool) -> None:
    """However they are cut and joined: some of them are read without h11, others by it."""
    reads = [b"GET /v1/guests/no-%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(4)]
    body = text(name="UPPER")
    plan = b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )
    chunked = (
        b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    )
    requests = [reads[0], plan, reads[1], chunked, reads[2], plan, reads[3]]
    expected = [(404, "no-0"), (400, "UPPER"), (404, "no-1"), (400, "UPPER"), (404, "no-2"), (400, "UPPER"), (404, "no-3")]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(served.path))
        found: list[tuple[int, object]] = []
        for data in [b"".join(requests)] if together else requests:
            for begin in range(0, len(data), size):
                connection.sendall(data[begin : begin + size])
            if not together:
                found += read_responses(connection, 1)
        found += read_responses(connection, len(requests)) if together else []
    assert [status for status, _ in found] == [status for status, _ in expected]
    assert all(said in json.dumps(problem) for (_, problem), (_, said) in zip(found, expected, strict=True)), found


def test_request_during_a_wait_is_answered_after_it(served: Served) -> None:
    served.client.create(GOOD | {"name": "waits"})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(served.path))
        connection.sendall(b"GET /v1/guests/waits/ready?timeout=0.5 HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.sendall(b"GET /v1/guests/no-such HTTP/1.1\r\nHost: x\r\n\r\n")
        first, second = read_responses(connection, 2)
    served.client.delete("waits")
    assert "no-such" not in json.dumps(first)
    assert second[0] == 404
    assert "no-such" in json.dumps(second)
