"""Requests that would cost much, or could be read in two ways: each is refused before the costly part, with one short problem."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from orchestrator.api.body import check_media_type, parse_json
from orchestrator.client.problems import WrongMedia
from orchestrator.errors import RequestError, TooLarge
from orchestrator.model.fields import describe
from orchestrator.model.request import GuestRequest
from tests.harness.api_server import Served, send, serve

GOOD = {"name": "one", "memory": "64M", "image": "minimal"}
LONG = 60_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("costly")) as served:
        yield served


def ask(served: Served, head: str, *fields: str, body: bytes = b"") -> tuple[int, dict[str, str]]:
    lines = [f"{head} HTTP/1.1", "Host: x", "Connection: close", *fields]
    if body:
        lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    answer = send(served.path, "\r\n".join([*lines, "", ""]).encode() + body)
    first, _, content = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(content) if content else {}


MANY = {
    "unknown names": b"{" + b",".join(b'"%d":[]' % number for number in range(6500)) + b"}",
    "empty lists": b"[" + b",".join([b"[]"] * 20_000) + b"]",
    "empty objects": b'{"placement":[' + b",".join([b"{}"] * 20_000) + b"]}",
    "numbers": b"[" + b",".join([b"1"] * 30_000) + b"]",
    "strings": b'{"name":[' + b",".join([b'"a"'] * 15_000) + b"]}",
    "one name again and again": b"{" + b",".join([b'"a":1'] * 10_000) + b"}",
    "no commas": b'"a"' * 20_000,
    "a list that never ends": b"[" + b"1," * 30_000,
}


@pytest.mark.parametrize("body", MANY.values(), ids=MANY.keys())
def test_body_of_too_many_values_is_refused_before_parsing(served: Served, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError("it was parsed")

    status, problem = ask(served, "POST /v1/plans", body=body)
    assert (status, problem["code"]) == (413, "too-large"), problem
    monkeypatch.setattr(json, "loads", never)
    with pytest.raises(TooLarge):
        parse_json(body, nesting=16)


def test_body_within_the_limits_is_accepted(served: Served) -> None:
    everything = {**GOOD, "cores": 1, "placement": {"cpus": ",".join(map(str, range(2, 400)))}, "cmdline": ',[{"' * 250}
    status, problem = ask(served, "POST /v1/plans", body=json.dumps(everything).encode())
    assert (status, problem["code"]) == (409, "no-room")


@pytest.mark.parametrize("field", ["name", "memory", "image", "address", "page_size", "id", "cmdline", "restart"])
@pytest.mark.parametrize("sign", ["\ue000", "a", "1", ":", "/"])
def test_problem_about_a_long_text_is_short(served: Served, field: str, sign: str) -> None:
    body = json.dumps({**GOOD, field: sign * (LONG // len(sign.encode()))}, ensure_ascii=False).encode()
    status, problem = ask(served, "POST /v1/plans", body=body)
    assert (status, problem["code"]) == (400, "bad-request")
    assert len(json.dumps(problem)) < 1000


def test_description_of_a_long_text_is_short() -> None:
    for field in ("name", "memory", "image", "address", "page_size", "id"):
        with pytest.raises(ValueError, match=field) as caught:
            GuestRequest.model_validate({**GOOD, field: "\ue000" * LONG})
        assert len(describe(caught.value)) < 400  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="placement") as caught:
        GuestRequest.model_validate({**GOOD, "placement": {"cpus": "2", "vf": ":" * LONG}})
    assert len(describe(caught.value)) < 400  # type: ignore[arg-type]


def test_problem_with_many_findings_describes_the_first() -> None:
    with pytest.raises(ValueError, match="Extra inputs") as caught:
        GuestRequest.model_validate({**GOOD, **{f"{number}" + "x" * 5000: 1 for number in range(100)}})
    said = describe(caught.value)  # type: ignore[arg-type]
    assert said.endswith("; and 80 more")
    assert len(said) < 6000


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (b"9" * 4301, "too large"),
        (b"-" + b"9" * LONG, "too large"),
        (b"0." + b"1" * LONG, "too many digits"),
        (b"1" * LONG + b"e-60000", "too many digits"),
        (b"1e" + b"0" * LONG, "too many digits"),
    ],
)
def test_number_with_too_many_digits_is_refused(served: Served, number: bytes, said: str) -> None:
    status, problem = ask(served, "POST /v1/plans", body=b'{"cores": ' + number + b"}")
    assert (status, problem["code"]) == (400, "bad-request")
    assert said in problem["detail"]
    assert len(problem["detail"]) < 200


def test_long_body_that_is_not_utf8_is_refused() -> None:
    for body in (b'{"name": "' + b"a" * LONG + b"\xff", b"\xff" * LONG, "\U0001f4a9".encode() * 15_000 + b"\xf0\x9f"):
        with pytest.raises(RequestError, match="invalid UTF-8") as caught:
            parse_json(body, nesting=16)
        assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/v1/events?" + "&".join(["limit=1"] * 2000), ()),
        ("/v1/events?" + "&" * 2000, ()),
        ("/v1/events?" + "&".join(f"a{number}" for number in range(1000)), ()),
        ("/v1/guests/one/ready?timeout=" + "1" * 8000, ()),
    ],
)
def test_query_of_many_parts_is_refused(served: Served, target: str, fields: tuple[str, ...]) -> None:
    status, problem = ask(served, f"GET {target}", *fields)
    assert (status, problem["code"]) == (400, "bad-request")
    assert len(json.dumps(problem)) < 1000


def test_long_if_match_is_refused(served: Served) -> None:
    served.client.create(GOOD)
    lists = (['"1",' * 1000], [f'"{number}"' for number in range(90)] * 2, ["," * 5000])
    for values in lists:
        fields = [f"If-Match: {value}" for value in values[:90]]
        fields = fields if len(fields) == 1 else [f"{field}, {', '.join(values)}" for field in fields[:8]]
        status, problem = ask(served, "POST /v1/guests/one/kill", *fields)
        assert (status, problem["code"]) == (400, "bad-request")
    assert served.client.guest("one")["state"] == "running"
    served.client.delete("one")


def test_unused_header_fields_are_not_parsed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The framework reads all cookies of each request, though no route has any."""
    seen: list[str] = []
    monkeypatch.setattr("starlette.requests.cookie_parser", lambda field: seen.append(field) or {})
    cookies = "; ".join(f"c{number}=1" for number in range(500))
    accept = ", ".join(["application/json;q=0.1"] * 300)
    assert ask(served, "GET /v1/version", f"Cookie: {cookies}", f"Accept: {accept}", "X-Forwarded-For: 1.2.3.4")[0] == 200
    assert seen == []


def test_long_response_is_encoded_outside_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of events, a big host's survey, or the description of the interface, which is long to make."""
    encoded: dict[str, str] = {}
    dumps = json.dumps

    def watch(value: object, **options: object) -> str:
        if options.get("separators"):
            encoded[threading.current_thread().name] = type(value).__name__
        return dumps(value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(json, "dumps", watch)
    for target in ("guests", "events", "survey", "audit", "quarantine", "openapi.json"):
        encoded.clear()
        assert ask(served, f"GET /v1/{target}")[0] == 200
        assert len(encoded) == 1, target
        assert next(iter(encoded)).startswith("api-"), target


@pytest.mark.parametrize("number", ["1_0", "%201%20", "+5", "%2B5", "1.0", "0x10", "01", "1e1", "%D9%A3", "", "-0.5", "9" * 30])
@pytest.mark.parametrize("target", ["/v1/events?after=", "/v1/events?limit=", "/v1/audit?frames="])
def test_integer_parameter_in_another_spelling_is_refused(served: Served, target: str, number: str) -> None:
    status, problem = ask(served, f"GET {target}{number}")
    assert (status, problem["code"]) == (400, "bad-request"), problem


@pytest.mark.parametrize("number", ["1_0", "%201%20", "+5", "%2B5", "01", "0x1p3", "nan", "inf", ".5", "5.", "", "%D9%A3"])
def test_seconds_in_another_spelling_are_refused(served: Served, number: str) -> None:
    status, problem = ask(served, f"GET /v1/guests/none/ready?timeout={number}")
    assert (status, problem["code"]) == (400, "bad-request"), problem
    for good in ("1", "0.5", "1e-05", "2.0"):
        assert ask(served, f"GET /v1/guests/none/ready?timeout={good}")[0] == 404


@pytest.mark.parametrize("word", ["1", "yes", "on", "TRUE", "t", "", "%20true"])
def test_boolean_parameter_in_another_spelling_is_refused(served: Served, word: str) -> None:
    assert ask(served, f"DELETE /v1/quarantine/none?force={word}")[0] == 400
    assert ask(served, "DELETE /v1/quarantine/none?force=true")[0] == 404


@pytest.mark.parametrize(
    "fields",
    [
        ("Authorization: Bearer a", "Authorization: Bearer b"),
        ("Authorization: Bearer a", "Authorization: Bearer a"),
        ("Content-Type: application/json", "Content-Type: text/plain"),
        ("Origin: null", "Origin: null"),
        ("Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"),
        ("Last-Event-ID: 1", "Last-Event-ID: 2"),
        ("Content-Encoding: identity", "Content-Encoding: identity"),
    ],
)
def test_repeated_header_field_is_refused(served: Served, fields: tuple[str, ...]) -> None:
    status, problem = ask(served, "GET /v1/version", *fields)
    assert (status, problem["code"]) == (400, "bad-request")
    assert fields[0].partition(":")[0].lower() in problem["detail"].lower()


@pytest.mark.parametrize(
    ("media", "coding"),
    [
        ("application/json", "gzip"),
        ("application/json", "br, gzip"),
        ("application/json", "identity, gzip"),
        ("application/json;charset=utf-16", ""),
        ('application/json; charset="UTF-16LE"', ""),
        ("application/json; a=b; CharSet = latin-1", ""),
        ("application/json" + ";a=b" * 1000, ""),
        ("application/json-seq", ""),
    ],
)
def test_body_with_another_media_type_or_coding_is_refused(media: str, coding: str) -> None:
    with pytest.raises(WrongMedia):
        check_media_type(media, coding)


def test_compressed_body_is_refused(served: Served) -> None:
    status, problem = ask(served, "POST /v1/plans", "Content-Encoding: gzip", body=json.dumps(GOOD).encode())
    assert (status, problem["code"]) == (415, "media-type")
    for media in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"; x=y'):
        check_media_type(media, "Identity")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /nix HTTP/1.0\r\n",
        b"GET /nix HTTP/1.0\r\nHost:\r\n",
        b"GET /nix HTTP/1.1\r\nHost: a/b?c#d\r\n",
        b"GET /nix HTTP/1.1\r\nHost: user@x\r\n",
        b"GET /nix HTTP/1.1\r\nHost: [::1\r\n",
        b"PUT /v1/guests HTTP/1.0\r\n",
        b"PUT /v1/gu\x1b[2Jests HTTP/1.0\r\n",
        b"GET /%1b%5b2Jnix HTTP/1.0\r\n",
        b"PUT /v1/guests/%1b%5b2J%c2%9b HTTP/1.0\r\n",
    ],
)
def test_response_shows_no_socket_path_and_no_control_characters(served: Served, head: bytes) -> None:
    answer = send(served.path, head + b"Connection: close\r\n\r\n")
    problem = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert 400 <= problem["status"] < 406
    for text in problem.values():
        assert served.path.name not in str(text)
        assert str(text).isprintable()


@pytest.mark.parametrize("host", ["x", "example.org:8443", "[::1]:8443", "192.0.2.1", "nohype", ""])
def test_valid_host_field_is_accepted(served: Served, host: str) -> None:
    assert b" 200 " in send(served.path, f"GET /v1/version HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())


def test_refusals_before_identification_count_against_the_rate_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Else they would be the one kind of request without a rate."""
    limits = {"limits": {"rate": 0.001, "burst": 3}}
    with serve(tmp_path_factory.mktemp("counted"), limits) as served:
        twice = ("Authorization: Bearer a", "Authorization: Bearer b")
        assert [ask(served, "GET /v1/version", *twice)[0] for _ in range(4)] == [400, 400, 400, 429]
