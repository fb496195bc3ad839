"""The server of `nohype web` on loopback: what it accepts, from whom, and what reaches the manager."""

from __future__ import annotations

import base64
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.web import server as web_server
from orchestrator.web import session as web_session
from orchestrator.web.files import find_file
from orchestrator.web.server import WebServer
from tests.harness.api_server import Served
from tests.harness.example_host import serve_example
from tests.harness.terminal import COMMAND


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_example(tmp_path_factory.mktemp("example")) as served:
        yield served


@contextmanager
def run_server(client: Client) -> Iterator[WebServer]:
    with WebServer(client) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(served: Served) -> Iterator[WebServer]:
    with run_server(served.client) as server:
        yield server


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.content = response.status, response.headers, response.read()


def ask(web: WebServer, method: str, target: str, body: str | bytes | None = None, **fields: str) -> Answer:
    """Names of fields with underscores."""
    connection = http.client.HTTPConnection("127.0.0.1", web.server_port, timeout=60)
    try:
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in fields.items()})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def send(web: WebServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", web.server_port), 60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def open_session(web: WebServer) -> str:
    answer = ask(web, "POST", "/session", urlsplit(web.address).fragment)
    assert answer.status == 200
    return str(json.loads(answer.content)["token"])


@pytest.fixture
def secret(web: WebServer) -> str:
    return f"Bearer {open_session(web)}"


def test_requests_reach_the_manager_as_they_are(web: WebServer, served: Served, secret: str) -> None:
    answer = ask(web, "GET", "/v1/guests/web", Authorization=secret)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert json.loads(answer.content) == served.client.guest("web")
    assert answer.headers["ETag"] == f'"{served.client.guest("web")["version"]}"'
    stale = ask(web, "POST", "/v1/guests/web/kill", None, Authorization=secret, If_Match='"1"')
    assert (stale.status, json.loads(stale.content)["code"]) == (412, "stale")
    body = json.dumps({"name": "x", "image": "none", "memory": "64M"})
    refused = ask(web, "POST", "/v1/plans", body, Authorization=secret, Content_Type="application/json")
    assert (refused.status, json.loads(refused.content)["code"]) == (404, "not-found")
    for word in ("é", "Ł"):
        text = json.dumps({"name": "x", "image": word, "memory": "64M"}, ensure_ascii=False).encode()
        refused = ask(web, "POST", "/v1/plans", text, Authorization=secret, Content_Type="application/json")
        assert (refused.status, json.loads(refused.content)["code"]) == (400, "bad-request")
        assert "image" in json.loads(refused.content)["detail"], "the manager has read it as UTF-8"


def test_head_is_a_get_without_content(web: WebServer, secret: str) -> None:
    for target in ("/", "/app.js", "/v1/guests", "/v1/guests/web", "/v1/guests/none", "/nothing"):
        answers = {method: ask(web, method, target, Authorization=secret) for method in ("GET", "HEAD")}
        assert answers["HEAD"].status == answers["GET"].status, target
        assert answers["HEAD"].content == b""
        assert answers["HEAD"].headers["Content-Length"] == answers["GET"].headers["Content-Length"]
    assert ask(web, "HEAD", "/v1/guests").status == 401


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS"])
def test_method_that_the_manager_does_not_know_is_refused_by_it(web: WebServer, secret: str, method: str) -> None:
    answer = ask(web, method, "/v1/host", Authorization=secret)
    assert (answer.status, json.loads(answer.content)["code"]) == (405, "method")
    assert "GET" in answer.headers["Allow"]
    assert ask(web, method, "/v1/host").status == 401


def test_stream_passes_at_once_and_ends_with_the_browser(web: WebServer, served: Served, secret: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", web.server_port, timeout=60)
    connection.request("GET", "/v1/events/stream", headers={"Authorization": secret, "Last-Event-ID": "0"})
    response = connection.getresponse()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert b"event: claimed" in b"".join(response.readline() for _ in range(6))
    connection.close()


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer x", "Basic eDp5", "Bearer \xe9"])
def test_request_without_the_secret_is_refused(web: WebServer, authorization: str) -> None:
    open_session(web)
    for method, target in (("GET", "/v1/guests"), ("POST", "/v1/guests/web/kill"), ("GET", "/nothing"), ("DELETE", "/")):
        answer = ask(web, method, target, **({"Authorization": authorization} if authorization else {}))
        assert answer.status == 401
        assert json.loads(answer.content)["code"] == "unauthorized"


def test_cookie_with_the_secret_does_not_count(web: WebServer, secret: str) -> None:
    token = secret.split()[1]
    assert ask(web, "GET", "/v1/guests", Cookie=f"nohype-token={token}; token={token}").status == 401
    assert ask(web, "GET", f"/v1/guests?token={token}").status == 401


def test_address_opens_once(web: WebServer) -> None:
    open_session(web)
    answer = ask(web, "POST", "/session", urlsplit(web.address).fragment)
    assert answer.status == 401
    assert "opened before" in json.loads(answer.content)["detail"]


def test_wrong_word_opens_nothing_and_does_not_use_up_the_address(web: WebServer) -> None:
    for word in ("", "x", "x" * 43, "é", web.session.word[:-1]):
        assert ask(web, "POST", "/session", word.encode()).status == 401
    open_session(web)


def test_old_address_opens_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_session, "WORD_SECONDS", -1.0)
    with run_server(served.client) as web:
        assert ask(web, "POST", "/session", urlsplit(web.address).fragment).status == 401


def test_two_browsers_at_the_same_time_get_one_session(web: WebServer) -> None:
    found: list[int] = []
    word = urlsplit(web.address).fragment
    threads = [threading.Thread(target=lambda: found.append(ask(web, "POST", "/session", word).status)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] + [401] * 7


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost:{port}.evil.example", "",
             "0.0.0.0:{port}", "[::1]:{port}", "127.0.0.1:{port}@evil.example"],
)  # fmt: skip
def test_name_that_an_attacker_points_at_loopback_is_refused(web: WebServer, secret: str, host: str) -> None:
    host = host.format(port=web.server_port)
    for target in ("/", "/v1/guests", "/app.js"):
        assert ask(web, "GET", target, Authorization=secret, Host=host).status == 400
    assert ask(web, "POST", "/session", web.session.word, Host=host).status == 400
    assert ask(web, "GET", "/v1/guests", Authorization=secret, Host=f"localhost:{web.server_port}").status == 200


@pytest.mark.parametrize(
    "fields", [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Origin": "https://127.0.0.1:{port}"}, {"Origin": "http://localhost:{port}"},
    ],
)  # fmt: skip
def test_request_of_another_site_is_refused_even_with_the_secret(
    web: WebServer, served: Served, secret: str, fields: dict[str, str]
) -> None:
    given = {name: value.format(port=web.server_port) for name, value in fields.items()}
    version = served.client.guest("web")["version"]
    for method, target in (("GET", "/v1/guests"), ("POST", "/v1/guests/web/kill"), ("POST", "/session")):
        assert ask(web, method, target, Authorization=secret, **given).status == 403
    assert served.client.guest("web")["version"] == version


def test_own_page_may_change_guests(web: WebServer, served: Served, secret: str) -> None:
    own = {"Origin": f"http://127.0.0.1:{web.server_port}", "Sec_Fetch_Site": "same-origin"}
    assert ask(web, "POST", "/v1/guests/idle/start", Authorization=secret, **own).status == 200
    assert ask(web, "POST", "/v1/guests/idle/kill", Authorization=secret, **own).status == 200


def test_nobody_may_ask_first_for_another_site(web: WebServer) -> None:
    """A preflight (https://fetch.spec.whatwg.org/#cors-preflight-fetch) is not answered with permission."""
    answer = ask(web, "OPTIONS", "/v1/guests", Origin="https://evil.example", Access_Control_Request_Headers="authorization")
    assert answer.status >= 400
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "target", ["/v2/x", "/metrics", "//evil.example/v1/guests", "/v1/../x", "/v1/%2e%2e/x", "http://evil.example/v1/guests",
               "/v1/a b", "/v1/guests#x", "*", "/page/app.js", "/../setup.cfg", "/%2e%2e/setup.cfg", "/app.js/", "/APP.JS"],
)  # fmt: skip
def test_other_targets_do_not_reach_the_manager(
    web: WebServer, secret: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.client, "forward", None)
    lines = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{web.server_port}\r\nAuthorization: {secret}\r\n\r\n"
    assert re.match(rb"HTTP/1.1 40[04] ", send(web, lines.encode()))


@pytest.mark.parametrize(
    "fields", ["Authorization: {secret}\r\nHost: 127.0.0.1:{port}", "Transfer-Encoding: chunked", "Content-Length: -1",
               "Content-Length: 99999999", "Content-Length: 5, 5", "X: a\r\n b"],
)  # fmt: skip
def test_ambiguous_requests_are_refused(web: WebServer, secret: str, fields: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.client, "forward", None)
    more = fields.format(secret=secret, port=web.server_port)
    head = f"POST /v1/guests/web/kill HTTP/1.1\r\nHost: 127.0.0.1:{web.server_port}\r\nAuthorization: {secret}\r\n{more}\r\n"
    assert re.match(rb"HTTP/1.1 400 ", send(web, f"{head}\r\n0\r\n\r\n".encode()))


@pytest.mark.parametrize(
    "data", [b"", b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000, b"<script>\r\n\r\n"]
)
def test_what_is_not_http_is_no_harm(web: WebServer, data: bytes) -> None:
    assert b"<script>" not in send(web, data)
    assert ask(web, "GET", "/").status == 200


def test_second_request_of_a_connection_is_not_read(web: WebServer, secret: str) -> None:
    one = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{web.server_port}\r\n\r\n"
    assert send(web, (one * 3).encode()).count(b"HTTP/1.1 ") == 1


def test_each_response_keeps_others_out(web: WebServer, secret: str) -> None:
    for target in ("/", "/app.js", "/style.css", "/v1/guests", "/nothing"):
        answer = ask(web, "GET", target, Authorization=secret)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Set-Cookie" not in answer.headers


def test_page_never_makes_markup_of_text() -> None:
    for path in ("/app.js", "/api.js", "/host.js", "/console.js", "/"):
        file = find_file(path)
        assert file
        text = file.content.decode()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|\.on[a-z]+ ?=", text
        )
        assert not re.search(r"https?://|<script>|style=|<style", text)


def test_too_many_connections_are_closed_and_the_page_recovers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "CONNECTIONS", 4)
    with run_server(served.client) as web:
        idle = [socket.create_connection(("127.0.0.1", web.server_port), 60) for _ in range(4)]
        for one in idle:
            one.sendall(b"GET / HT")
        with socket.create_connection(("127.0.0.1", web.server_port), 60) as more:
            assert more.recv(1) == b""
        for one in idle:
            one.close()
        for _ in range(600):
            try:
                if ask(web, "GET", "/").status == 200:
                    break
            except (ConnectionError, http.client.HTTPException):
                threading.Event().wait(0.1)
        else:
            pytest.fail("the places were not given back")


def test_manager_that_is_gone_is_a_problem_document(tmp_path: Path) -> None:
    with run_server(Client(tmp_path / "none.sock")) as web:
        answer = ask(web, "GET", "/v1/guests", Authorization=f"Bearer {open_session(web)}")
    assert answer.status == json.loads(answer.content)["status"] == 502
    assert "cannot reach the manager" in json.loads(answer.content)["detail"]


def test_server_is_on_loopback_only(web: WebServer) -> None:
    assert web.server_address[0] == "127.0.0.1"


def test_command_prints_the_address_and_ends_by_interrupt(served: Served) -> None:
    words = [*COMMAND, "--socket", str(served.path), "web"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as command:
        assert command.stdout
        address = urlsplit(command.stdout.readline().strip())
        connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=60)
        connection.request("POST", "/session", address.fragment)
        assert connection.getresponse().status == 200
        connection.close()
        command.send_signal(signal.SIGINT)
        command.stdout.read()
        assert command.wait(60) == 130


def test_port_that_is_taken_is_a_clear_error(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.listen()
        words = [*COMMAND, "--socket", str(served.path), "web", "--port", str(other.getsockname()[1])]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    assert re.match(r"nohype: cannot listen on 127\.0\.0\.1:\d+: Address already in use", done.stderr)


def test_port_that_needs_root_is_a_clear_error(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(_server: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(WebServer, "server_bind", bind)
    done = CliRunner().invoke(nohype, ["--socket", str(served.path), "web", "--port", "80"], standalone_mode=False)
    error = done.exception
    assert isinstance(error, OrchestratorError)
    assert error.message == "cannot listen on 127.0.0.1:80: Permission denied"
    assert error.hint == "choose a --port above 1023, or run as root"


def test_console_is_typed_on(web: WebServer, served: Served, secret: str) -> None:
    data = base64.b64encode(b"ls\r").decode()
    body = json.dumps({"uuid": "00000000-0000-0000-0000-000000000000", "data": data})
    answer = ask(web, "POST", "/v1/guests/web/console", body, Authorization=secret, Content_Type="application/json")
    assert (answer.status, json.loads(answer.content)["code"]) == (404, "not-found")  # another guest
