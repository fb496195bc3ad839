"""The page on the manager's TLS port (``[api] page``): what it sends to whom, and which changes of which sites it takes."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.identity import hash_token
from orchestrator.api.limits import RateLimiter
from orchestrator.client.transport import build_context
from tests.harness import browser as harness
from tests.harness.api_server import Authority, Served, serve
from tests.harness.browser import start_browser
from tests.harness.example_host import serve_example

OPERATOR, ACME = "operator-token-0123456789", "acme-token-0123456789"
FILES = ("/", "/style.css", "/app.js", "/api.js", "/host.js", "/console.js")


@dataclass
class Port:
    served: Served
    authority: Authority

    @property
    def host(self) -> str:
        return self.served.url.removeprefix("https://")

    def ask(self, method: str, target: str, certificate: tuple[Path, Path] | None = None, **fields: str) -> Any:
        """The status, the header fields and the content."""
        context = build_context(self.authority.file, *(certificate or (None, None)))
        connection = http.client.HTTPSConnection(self.host, context=context, timeout=60)
        try:
            connection.request(method, target, headers={name.replace("_", "-"): value for name, value in fields.items()})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


def build_settings(authority: Authority, *, page: bool) -> dict[str, Any]:
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    api = {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key), "client_ca": str(authority.file)}
    return {
        "api": {**api, "page": page},
        "access": {"operators": {"certificates": ["olga"]}},
        "tenants": {"acme": {}},
        "tokens": {
            "root": {"hash": f"sha256:{hash_token(OPERATOR).hex()}", "role": "operator"},
            "acme": {"hash": f"sha256:{hash_token(ACME).hex()}", "role": "tenant", "tenant": "acme"},
        },
    }


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder)
    with serve_example(folder, settings=build_settings(authority, page=True)) as served:
        yield Port(served, authority)


def test_page_is_sent_only_where_it_is_configured(port: Port, tmp_path: Path) -> None:
    for target in FILES:
        status, fields, content = port.ask("GET", target)
        assert (status, bool(content)) == (200, True)
        assert "default-src 'none'" in fields["Content-Security-Policy"]
        assert fields.get_all("Cache-Control") == ["no-store"]
        assert fields.get_all("X-Content-Type-Options") == ["nosniff"]
    assert port.ask("HEAD", "/")[0] == 200
    authority = Authority(tmp_path)
    with serve(tmp_path, build_settings(authority, page=False)) as served:
        other = Port(served, authority)
        assert {other.ask("GET", target)[0] for target in FILES} == {401}
        own = {"Origin": served.url, "Sec_Fetch_Site": "same-origin", "Authorization": f"Bearer {OPERATOR}"}
        assert json.loads(other.ask("POST", "/v1/guests/web/kill", **own)[2])["code"] == "cross-site"


def test_nothing_else_is_sent_without_credentials(port: Port) -> None:
    for target in ("/v1/version", "/v1/guests", "/index.html", "/page/app.js", "/app.js/", "/../app.js", "//", "/app.js?x"):
        status, _, content = port.ask("GET", target)
        # The files are the same for everybody, with or without a query.
        assert status == (200 if target == "/app.js?x" else 401), (target, content)
    assert port.ask("POST", "/")[0] == 401


def test_files_count_against_the_rate_limit(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port.served.server.config.app, "limiter", RateLimiter(rate=0.5, burst=3, concurrent=8))
    assert [port.ask("GET", "/")[0] for _ in range(4)] == [200, 200, 200, 429]


def test_own_page_with_a_token_may_change_guests(port: Port) -> None:
    own = {"Origin": port.served.url, "Sec_Fetch_Site": "same-origin", "Authorization": f"Bearer {OPERATOR}"}
    assert port.ask("POST", "/v1/guests/idle/start", **own)[0] == 200
    assert port.ask("POST", "/v1/guests/idle/kill", **own)[0] == 200


@pytest.mark.parametrize(
    "fields", [
        {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"}, {"Origin": "https://evil.example"},
        {"Origin": "https://evil.example", "Sec_Fetch_Site": "same-origin"}, {"Origin": "null", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "{url}", "Sec_Fetch_Site": "same-site"}, {"Origin": "{url}"},
        {"Origin": "http://{host}", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "https://evil.example", "Host": "evil.example", "Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
)  # fmt: skip
def test_other_sites_change_nothing_even_with_credentials(port: Port, fields: dict[str, str]) -> None:
    given = {name: value.format(url=port.served.url, host=port.host) for name, value in fields.items()}
    version = port.served.client.guest("web")["version"]
    for more in ({"Authorization": f"Bearer {OPERATOR}"}, {"certificate": port.authority.issue("olga")}):
        status, _, content = port.ask("POST", "/v1/guests/web/kill", **given, **more)  # type: ignore[arg-type]
        assert (status, json.loads(content)["code"]) == (403, "cross-site")
    assert port.served.client.guest("web")["version"] == version


def test_certificate_alone_changes_nothing_in_a_browser(port: Port) -> None:
    """A browser sends the certificate of its user with the requests of every page: only a token shows whose page it is."""
    olga = port.authority.issue("olga")
    own = {"Origin": port.served.url, "Sec_Fetch_Site": "same-origin"}
    assert json.loads(port.ask("POST", "/v1/guests/web/kill", olga, **own)[2])["code"] == "cross-site"
    assert port.ask("GET", "/v1/host", olga, Sec_Fetch_Site="same-origin")[0] == 200


def test_unix_socket_has_no_page(port: Port) -> None:
    with port.served.client.forward("GET", "/", None, {}, 60) as response:
        assert response.status == 404
    own = {"Origin": "https://localhost", "Sec-Fetch-Site": "same-origin", "Authorization": "Bearer x"}
    with port.served.client.forward("POST", "/v1/guests/web/kill", None, own, 60) as response:
        assert response.status == 403


@pytest.mark.skipif(not (harness.BROWSER and harness.DRIVER), reason="apt-get install chromium chromium-driver")
def test_page_asks_for_a_token_and_shows_what_its_owner_may_see(port: Port, tmp_path: Path) -> None:
    with start_browser(tmp_path) as browser:
        browser.open(port.served.url)
        browser.until("!document.getElementById('login').hidden")
        browser.type("#token", "wrong-token-0123456789\ue007")
        browser.until("document.getElementById('problem').textContent.includes('token')")
        browser.type("#token", f"{OPERATOR}\ue007")
        browser.until("document.querySelectorAll('#guests tr').length === 4")
        browser.type("button[aria-label='start: guest idle']", "\ue007")
        browser.until("document.querySelector(\"button[aria-label='stop: guest idle']\")")
        assert port.served.client.guest("idle")["state"] == "running"
        browser.run("sessionStorage.clear()")
        browser.open(f"{port.served.url}/?acme")
        browser.until("!document.getElementById('login').hidden")
        browser.type("#token", f"{ACME}\ue007")
        browser.until("document.getElementById('summary').textContent === '0 guests of your tenant'")
        assert browser.run("return document.getElementById('map').hidden")


@contextmanager
def relay_with_certificate(port: Port, authority: Authority, certificate: tuple[Path, Path]) -> Iterator[str]:
    """The address of a program that connects to the manager with a client certificate, as a browser with one does."""
    inner = build_context(authority.file, *certificate)
    outer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    outer.load_cert_chain(*authority.issue("relay", addresses=("127.0.0.1",)))
    name, number = port.host.split(":")

    def copy(source: ssl.SSLSocket, target: ssl.SSLSocket) -> None:
        with suppress(OSError, ValueError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with suppress(OSError):
                browser = outer.wrap_socket(connection, server_side=True)
                manager = inner.wrap_socket(socket.create_connection((name, int(number)), 60), server_hostname=name)
                for pair in ((browser, manager), (manager, browser)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.skipif(not (harness.BROWSER and harness.DRIVER), reason="apt-get install chromium chromium-driver")
def test_page_opened_with_a_certificate_offers_a_token_for_changes(port: Port, tmp_path: Path) -> None:
    """The form is hidden only while the tab has a token that the manager takes."""
    login = "document.getElementById('login').hidden"
    shown = "document.querySelectorAll('#guests tr').length === 4"
    with relay_with_certificate(port, port.authority, port.authority.issue("olga")) as url, start_browser(tmp_path) as browser:
        browser.open(url)
        browser.until(shown)
        assert browser.run(f"return {login}") is False
        browser.type("button[aria-label='start: guest batch'], button[aria-label='stop: guest web']", "\ue007")
        browser.until("document.getElementById('problem').textContent.includes('cross-site')")
        browser.type("#token", "wrong-token-0123456789\ue007")
        browser.until("document.getElementById('problem').textContent.includes('unknown token')")
        assert browser.run("return sessionStorage.getItem('nohype-token')") is None
        age = "document.getElementById('summary').textContent"
        before = browser.run(f"return {age}")
        browser.until(f"{age} !== {json.dumps(before)}")  # the certificate is still good for reading
        assert browser.run(f"return {login}") is False
        browser.type("#token", f"{OPERATOR}\ue007")
        browser.until(login)
        browser.run("sessionStorage.setItem('nohype-token', 'revoked-token-0123456789')")
        browser.until(f"!{login}")
        browser.until(shown)
