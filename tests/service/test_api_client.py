"""The client against programs that are not a manager, and managers that refuse: one error, whatever comes."""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import answers, shapes, transport
from orchestrator.client.answers import has_shape
from orchestrator.client.client import Client
from orchestrator.client.problems import parse_problem
from orchestrator.client.transport import TlsConnection, Unreachable, parse_url
from orchestrator.errors import NoRoom, OrchestratorError, RequestError, TooMany
from tests.harness.api_server import Authority

GUEST: dict[str, Any] = {
    "name": "web", "state": "running", "owner": "", "version": 3, "restarts": 1, "cores": ["2-3"], "cpus": [2, 3], "node": 0,
    "memory": 256, "huge_pages": 128, "page_size": 2, "housekeeping": "0-1", "image": "minimal", "cmdline": "", "id": None,
    "created": None, "creator": None,
    "vf": {"pf": "p", "interface": "nic0", "index": 0, "address": "a", "mac": "m", "edge": "vepa",
           "network": "", "vlan": 0, "rate": 0, "tap": ""}, "cpu_features": [], "restart": "never",
    "hostname": "web", "ssh_keys": 0, "user_data": None, "network_config": None,
    "nics": [], "disks": [], "waived": [], "caches": None, "progress": None, "warnings": [],
    "addresses": [], "ssh_host_key": None, "initiator": None, "disengaged": None,
    "exit_policy": None, "housekeeping_vcpus": None,
}  # fmt: skip


@contextmanager
def answering(folder: Path, answer: Callable[[socket.socket], object]) -> Iterator[Path]:
    """Another server on a Unix socket, which gives the same answer to each request."""
    path = folder / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve_all() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.settimeout(10)
                    connection.recv(65536)
                    answer(connection)

        thread = threading.Thread(target=serve_all)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def send(head: bytes, body: bytes = b"", media: bytes = b"application/json") -> Callable[[socket.socket], object]:
    length = b"" if b"Content-Length" in head or b"Transfer" in head else b"Content-Length: %d\r\n" % len(body)
    return lambda connection: connection.sendall(
        b"HTTP/1.1 " + head + b"\r\nContent-Type: " + media + b"\r\n" + length + b"\r\n" + body
    )


ASKS: dict[str, Callable[[Client], object]] = {
    "version": lambda client: client.version(),
    "survey": lambda client: client.survey(),
    "guests": lambda client: client.guests(),
    "guest": lambda client: client.guest("web"),
    "plan": lambda client: client.plan({}),
    "stop": lambda client: client.stop("web"),
    "delete": lambda client: client.delete("web"),
    "ready": lambda client: client.wait_ready("web", 1),
    "send_command": lambda client: client.send_command("web", "x", 1),
    "quarantined": lambda client: client.quarantined(),
    "uplinks": lambda client: client.uplinks(),
    "uplink": lambda client: client.uplink("nic0"),
    "set_uplink": lambda client: client.set_uplink("nic0", "auto"),
    "prove_uplink": lambda client: client.prove_uplink("nic0"),
    "clear": lambda client: client.clear_quarantine("web"),
    "audit": lambda client: client.audit(0),
    "events": lambda client: client.events(),
    "metrics": lambda client: client.metrics(),
    "follow": lambda client: next(client.follow(0)),
}
OTHERS = {
    "a list of numbers": send(b"200 OK", b"[1]"),
    "null": send(b"200 OK", b"null"),
    "a list of empty objects": send(b"200 OK", b"[{}]"),
    "a guest that lacks something": send(b"200 OK", json.dumps([{**GUEST, "vf": {}}]).encode()),
    "deep JSON": send(b"200 OK", b"[" * 100_000 + b"]" * 100_000),
    "deep objects": send(b"200 OK", b'{"a":' * 100_000),
    "no UTF-8": send(b"200 OK", b"\xff\xfe", b"application/json"),
    "HTML": send(b"200 OK", b"<html>", b"text/html"),
    "an empty answer": send(b"200 OK"),
    "a problem that is a list": send(b"400 Bad", b"[1]", b"application/problem+json"),
    "a deep problem": send(b"400 Bad", b"[" * 100_000, b"application/problem+json"),
    "not modified": send(b"304 Not Modified"),
    "a huge length": send(b"200 OK\r\nContent-Length: 99999999999999999999", b"[]"),
    "a length that is cut off": send(b"200 OK\r\nContent-Length: 1000", b"[]"),
    "chunks that are none": send(b"200 OK\r\nTransfer-Encoding: chunked", b"zz\r\n"),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_client_of_another_program_raises_one_error(
    tmp_path: Path, ask: Callable[[Client], object], other: Callable[[socket.socket], object]
) -> None:
    with answering(tmp_path, other) as path:
        with pytest.raises(OrchestratorError):
            ask(Client(path))


@pytest.mark.parametrize("ask", [name for name in ASKS if name not in ("delete", "clear", "follow")])
def test_empty_response_is_refused(tmp_path: Path, ask: str) -> None:
    with (
        answering(tmp_path, send(b"204 No Content")) as path,
        pytest.raises(OrchestratorError, match="not a NoHype manager"),
    ):
        ASKS[ask](Client(path))


@pytest.mark.parametrize("length", [b"Content-Length: 99999999999999", b"Transfer-Encoding: chunked", b"Connection: close"])
def test_endless_response_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: bytes) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWER", 1 << 20)

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length + b"\r\n\r\n")
        part = b" " * 65536
        while True:
            connection.sendall(b"10000\r\n" + part + b"\r\n" if b"chunked" in length else part)

    with answering(tmp_path, pour) as path, pytest.raises(OrchestratorError, match="longer than 1 MB"):
        Client(path).guests()


def test_response_with_unknown_fields_is_accepted(tmp_path: Path) -> None:
    newer = {**GUEST, "gadgets": [], "restart": "always", "vf": {**GUEST["vf"], "vlan": 5}}
    with answering(tmp_path, send(b"200 OK", json.dumps([newer]).encode())) as path:
        assert Client(path).guests() == [newer]


@pytest.mark.parametrize(
    ("value", "kind", "good"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), (1, float, True), (True, float, False), ("x", float, False),
        (None, str | None, True), (1, str | None, False), ([], list[int], True), ([1, "x"], list[int], False),
        ({"line": "x"}, shapes.Ready, True), ({"line": 1}, shapes.Ready, False), ({}, shapes.Ready, False),
        ([], shapes.Ready, False), ({"a": 1}, dict[str, int], True), ({"a": ""}, dict[str, int], False),
    ],
)  # fmt: skip
def test_value_is_checked_against_its_type(value: object, kind: object, good: bool) -> None:
    assert has_shape(value, kind) is good


@pytest.mark.parametrize(
    "url",
    ["https://a b", "https://a\tb:80", "https://a\x1b[2J", "https://a<b>", "https://a\\b", "https://[::1%eth 0]:1", "https://a,b",
     "https://" + "a" * 64, "https://\u3002", "https://a\x00b"],
)  # fmt: skip
def test_invalid_host_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="invalid manager URL"):
        parse_url(url)


def test_valid_hosts_are_accepted() -> None:
    assert parse_url("https://server1.example:8443") == ("server1.example", 8443)
    assert parse_url("https://b\u00fccher.example") == ("b\u00fccher.example", 443)
    assert parse_url("https://under_score") == ("under_score", 443)
    assert parse_url("https://[fe80::1%eth0]:1")[1] == 1


@pytest.mark.parametrize("value", ["x", None, [], -1, float("nan"), float("inf"), 1e300, True])
def test_problem_of_another_program_is_converted_to_the_expected_types(value: object) -> None:
    error = parse_problem({"code": "too-many", "wait": value, "detail": 5, "hint": None})
    assert isinstance(error, TooMany)
    assert 0 <= error.wait <= 3600
    refused = parse_problem({"code": "no-room", "reasons": value})
    assert isinstance(refused, NoRoom)
    assert all(isinstance(reason, str) for reason in refused.reasons)
    assert "\n".join(refused.reasons) is not None


@pytest.mark.parametrize("failure", [BrokenPipeError(32, "Broken pipe"), ConnectionResetError(104, "Connection reset by peer"),
                                     ssl.SSLEOFError(8, "EOF occurred in violation of protocol")])  # fmt: skip
@pytest.mark.parametrize("body", [None, {"name": "x"}])
def test_tls_alert_is_read_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError, body: dict[str, str] | None
) -> None:
    """The manager refuses after the client's handshake is over, and may have closed before the request is written."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("manager", addresses=("127.0.0.1",)))
    context.load_verify_locations(authority.file)
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = stranger.issue("alice")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            raw, _ = listener.accept()
            with raw, suppress(ssl.SSLError):
                context.wrap_socket(raw, server_side=True)

        thread = threading.Thread(target=refuse)
        thread.start()
        client = Client(f"https://127.0.0.1:{listener.getsockname()[1]}", ca=authority.file, certificate=certificate, key=key)

        def fail(connection: HTTPConnection, _data: object) -> None:
            assert select.select([connection.sock], [], [], 10)[0], "no alert has come"
            raise failure

        monkeypatch.setattr(TlsConnection, "send", fail)
        with pytest.raises(Unreachable, match="alert") as caught:
            client.plan(body) if body else client.guests()
        thread.join(10)
    assert "signed by client_ca" in caught.value.hint
    assert "nohyped runs" not in caught.value.hint


@pytest.mark.parametrize("failure", [BrokenPipeError(32, "Broken pipe"), ConnectionResetError(104, "Connection reset by peer"),
                                     ssl.SSLEOFError(8, "EOF occurred in violation of protocol")])  # fmt: skip
def test_connection_lost_without_an_alert_gets_the_hint_of_a_running_manager(failure: OSError) -> None:
    said = transport.map_connection_error("https://x", failure, connected=True)
    assert "client_ca covers the certificate" in said.hint
    assert "nohyped runs" not in said.hint
    assert "_ssl.c" not in said.message


def test_named_pipe_as_tls_file_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for files in ({"ca": tmp_path / "pipe"}, {"certificate": tmp_path / "pipe"}, {"certificate": Path("/dev/null")}):
        with pytest.raises(RequestError, match="not a regular file"):
            Client("https://x", **files)
