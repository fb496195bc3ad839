"""The TLS port: tokens and client certificates, from a throw-away CA."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509.oid import NameOID

from orchestrator.api.identity import hash_token
from orchestrator.api.limits import RateLimiter
from orchestrator.api.server import open_port
from orchestrator.api.tls import build_context
from orchestrator.cli.main import main
from orchestrator.client import client as client_module
from orchestrator.client import transport
from orchestrator.client.client import Client
from orchestrator.config import ApiConfig
from orchestrator.errors import Forbidden, HostError, NotFound, OrchestratorError, RequestError, TooMany, Unauthorized
from tests.harness.api_server import Authority, Served, serve

OPERATOR, ACME = "operator-token-0123456789", "acme-token-0123456789"
REQUEST = {"name": "one", "memory": "64M", "image": "minimal"}


@dataclass
class Port:
    """A served TLS port, with the CA that everybody believes and one that nobody does."""

    served: Served
    authority: Authority
    stranger: Authority
    folder: Path

    def client(self, token: str | None = None, certificate: tuple[Path, Path] | None = None) -> Client:
        files = {"certificate": certificate[0], "key": certificate[1]} if certificate else {}
        return Client(self.served.url, token=token, ca=self.authority.file, **files)


def settings(folder: Path, authority: Authority) -> dict[str, Any]:
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    api = {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key), "client_ca": str(authority.file)}
    return {
        "api": api,
        "access": {"viewers": {"certificates": ["URI:spiffe://example/viewer"]}},
        "tenants": {"acme": {"certificates": ["alice"]}, "bolt": {}},
        "tokens": {
            "root": {"hash": f"sha256:{hash_token(OPERATOR).hex()}", "role": "operator"},
            "acme": {"hash": f"sha256:{hash_token(ACME).hex()}", "role": "tenant", "tenant": "acme"},
        },
        "limits": {"rate": 1000.0, "burst": 30},
    }


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(folder), Authority(folder, "stranger")
    with serve(folder, settings(folder, authority)) as served:
        yield Port(served, authority, stranger, folder)


def test_request_without_credentials_is_unauthorized(port: Port) -> None:
    with pytest.raises(Unauthorized):
        port.client().guests()
    context = ssl.create_default_context(cafile=port.authority.file)
    connection = http.client.HTTPSConnection(port.served.url.removeprefix("https://"), context=context, timeout=10)
    connection.request("GET", "/v1/guests")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="nohype"')
    assert json.loads(answer.read())["code"] == "unauthorized"
    connection.close()


@pytest.mark.parametrize("token", ["wrong", ACME + "x", ACME[:-1], "sha256:" + hash_token(ACME).hex()])
def test_wrong_token_is_refused(port: Port, token: str) -> None:
    with pytest.raises(Unauthorized, match="unknown token"):
        port.client(token).version()


def test_token_gives_its_role(port: Port) -> None:
    assert port.client(OPERATOR).survey()["cores"]
    with pytest.raises(Forbidden):
        port.client(ACME).survey()
    made = port.client(ACME).create(REQUEST)
    assert made["owner"] == "acme"
    assert port.client(OPERATOR).events()[-1]["who"] == "token acme"
    port.client(ACME).delete("one")


def test_certificate_gives_its_role(port: Port) -> None:
    alice = port.client(certificate=port.authority.issue("alice"))
    alice.create(REQUEST)
    assert alice.guests()[0]["owner"] == "acme"
    viewer = port.client(certificate=port.authority.issue("someone", uri="spiffe://example/viewer"))
    assert viewer.survey()["cores"]
    with pytest.raises(Forbidden):
        viewer.kill("one")
    alice.delete("one")
    with pytest.raises(NotFound):
        viewer.guest("one")


def test_certificate_without_a_role_is_refused(port: Port) -> None:
    with pytest.raises(Forbidden, match="CN:mallory"):
        port.client(certificate=port.authority.issue("mallory")).guests()


def test_certificate_without_a_name_is_refused(port: Port) -> None:
    with pytest.raises(Forbidden, match="has no name of a supported kind"):
        port.client(certificate=port.authority.issue("alice", title=NameOID.ORGANIZATION_NAME)).guests()


def test_certificate_of_another_ca_is_refused(port: Port) -> None:
    with pytest.raises(OrchestratorError, match="cannot reach the manager"):
        port.client(certificate=port.stranger.issue("alice")).guests()


def test_client_refuses_a_manager_of_another_ca(port: Port) -> None:
    with pytest.raises(OrchestratorError, match=r"(?i)certificate verify failed"):
        Client(port.served.url, token=OPERATOR, ca=port.stranger.file).guests()


def test_plain_text_and_old_tls_get_no_response(port: Port) -> None:
    host, _, number = port.served.url.removeprefix("https://").partition(":")
    with socket.create_connection((host, int(number)), timeout=10) as connection:
        connection.sendall(b"GET /v1/guests HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in connection.recv(100)
    old = ssl.create_default_context(cafile=port.authority.file)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(number)), timeout=10) as connection, pytest.raises(ssl.SSLError):
        old.wrap_socket(connection, server_hostname=host)


def test_rate_limit_holds_for_tenants_and_not_for_operators(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, operator = port.client(ACME), port.client(OPERATOR)
    monkeypatch.setattr(port.served.server.config.app, "limiter", RateLimiter(rate=0.5, burst=30, concurrent=8))
    with pytest.raises(TooMany) as caught:
        [acme.version() for _ in range(40)]
    assert 0 < caught.value.wait <= 2
    for _ in range(40):
        operator.version()


def test_renewed_certificate_is_used_without_a_restart(port: Port) -> None:
    def serial() -> str:
        context = ssl.create_default_context(cafile=port.authority.file)
        host, _, number = port.served.url.removeprefix("https://").partition(":")
        with socket.create_connection((host, int(number)), timeout=10) as raw:
            with context.wrap_socket(raw, server_hostname=host) as connection:
                return str((connection.getpeercert() or {})["serialNumber"])

    before = serial()
    assert serial() == before
    time.sleep(0.02)
    port.authority.issue("manager", addresses=("127.0.0.1",))
    assert serial() != before
    assert port.client(certificate=port.authority.issue("alice")).guests() == []
    (port.folder / "ca-manager.pem").write_text("broken")
    kept = serial()
    port.authority.issue("manager", addresses=("127.0.0.1",))
    assert serial() != kept


def test_unusable_tls_file_is_refused_by_name(port: Port, tmp_path: Path) -> None:
    certificate, key = port.authority.issue("other")
    with pytest.raises(RequestError, match="TLS cannot use"):
        build_context(ApiConfig(listen="127.0.0.1:0", certificate=str(key), key=str(key)))
    with pytest.raises(HostError, match=r"none\.pem"):
        open_port(ApiConfig(listen="127.0.0.1:0", certificate=str(tmp_path / "none.pem"), key=str(key)))
    key.chmod(0o640)
    with pytest.raises(RequestError, match="other users can read"):
        build_context(ApiConfig(listen="127.0.0.1:0", certificate=str(certificate), key=str(key)))


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1", "127.0.0.1:80", "https://", "https://host/path", "https://host?query", "https://host#part",
     "https://user:secret@host", "https://host:port", "https://host:0", "https://host:65536", "https://[::1", "https://a..b", ""],
)  # fmt: skip
def test_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="invalid manager URL") as caught:
        Client(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://host", ("host", 443)),
        ("https://host:8443/", ("host", 8443)),
        ("https://[::1]:8443", ("::1", 8443)),
        ("HTTPS://192.0.2.1:1", ("192.0.2.1", 1)),
    ],
)
def test_valid_url_is_parsed(url: str, address: tuple[str, int]) -> None:
    assert transport.parse_url(url) == address


class Program:
    """`nohype` as its user runs it, against a TLS port."""

    def __init__(self, port: Port, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.port, self.url, self.ca = port, port.served.url, str(port.authority.file)
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        """Status, standard output and standard error."""
        self._monkeypatch.setattr(sys, "argv", ["nohype", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *self._capsys.readouterr()

    def good(self, *words: object) -> str:
        status, output, error = self(*words)
        assert (status, error) == (0, "")
        return output

    def bad(self, *words: object) -> str:
        """What one error says, when the command is refused."""
        status, output, error = self(*words, "guest", "list")
        assert (status, output) == (1, ""), error
        assert error.startswith("nohype: ")
        assert error.count("\n") == 2, error
        assert "\n  hint: " in error
        return error


@pytest.fixture
def nohype(port: Port, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(port, monkeypatch, capsys)


def token_file(folder: Path, token: str) -> Path:
    path = folder / "token"
    path.touch(0o600)
    path.write_text(token + "\n")
    return path


@contextmanager
def answering(answer: bytes | None, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Some other server; yields its port. It sends the answer to whoever connects; None: it never says anything."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve_all() -> None:
        while not over.is_set():
            with suppress(OSError):
                raw, _ = listener.accept()
                raw.settimeout(30)
                with raw, context.wrap_socket(raw, server_side=True) if context else raw as connection:
                    connection.recv(65536)
                    if answer is None:
                        over.wait(10)
                    else:
                        connection.sendall(answer)

    thread = threading.Thread(target=serve_all)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        with suppress(OSError):
            socket.create_connection(listener.getsockname(), 1).close()
        thread.join(10)
        listener.close()


def context_of(files: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return context


def test_nohype_works_over_the_network(nohype: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tenant by a token, another person of it by a certificate, the operator by the environment alone."""
    by_token = ("--url", nohype.url, "--ca", nohype.ca, "--token-file", token_file(tmp_path, ACME))
    nohype.good(*by_token, "guest", "create", "one", "--memory", "64M", "--image", "minimal")
    certificate, key = nohype.port.authority.issue("alice")
    by_certificate = ("--url", nohype.url, "--ca", nohype.ca, "--cert", certificate, "--key", key)
    assert json.loads(nohype.good(*by_certificate, "guest", "show", "one", "--json"))["owner"] == "acme"
    both = tmp_path / "both.pem"
    both.touch(0o600)
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    assert "one" in nohype.good("--url", nohype.url, "--ca", nohype.ca, "--cert", both, "guest", "list")
    for name, value in {"URL": nohype.url, "CA": nohype.ca, "TOKEN": OPERATOR}.items():
        monkeypatch.setenv(f"NOHYPE_{name}", value)
    assert "isolated CPUs" in nohype.good("survey")
    assert "by token acme" in nohype.good("events")
    assert nohype.good("guest", "delete", "one") == "one deleted\n"


def test_nohype_with_refused_credentials_explains_what_to_use(nohype: Program, tmp_path: Path) -> None:
    there = ("--url", nohype.url, "--ca", nohype.ca)
    said = nohype.bad(*there, "--token-file", token_file(tmp_path, "wrong"))
    assert "unknown token" in said
    assert "--token-file FILE or NOHYPE_TOKEN, or --cert FILE" in said
    assert "wrong" not in said
    assert "--cert FILE" in nohype.bad(*there)
    certificate, key = nohype.port.authority.issue("mallory")
    assert "CN:mallory" in nohype.bad(*there, "--cert", certificate, "--key", key)
    certificate, key = nohype.port.stranger.issue("alice")
    assert "client_ca" in nohype.bad(*there, "--cert", certificate, "--key", key)
    assert "invalid characters" in nohype.bad(*there, "--token-file", token_file(tmp_path, "wröng"))


def test_nohype_refuses_a_manager_with_an_untrusted_certificate(nohype: Program, tmp_path: Path) -> None:
    token = ("--token-file", token_file(tmp_path, OPERATOR))
    for words in ((), ("--ca", nohype.port.stranger.file)):
        said = nohype.bad("--url", nohype.url, *words, *token)
        assert "is not trusted" in said
        assert "--ca FILE" in said
    said = nohype.bad("--url", nohype.url.replace("127.0.0.1", "localhost"), "--ca", nohype.ca, *token)
    assert "is for another name" in said
    assert "'localhost'" in said
    old = nohype.port.authority.issue("old", addresses=("127.0.0.1",), hours=-1)
    with answering(b"", context_of(old)) as number:
        assert "has expired or is not yet valid: certificate has expired" in nohype.bad(
            "--url", f"https://127.0.0.1:{number}", "--ca", nohype.ca
        )


def test_nohype_reports_that_the_server_is_no_manager(nohype: Program, tmp_path: Path) -> None:
    context = context_of(nohype.port.authority.issue("web", addresses=("127.0.0.1",)))
    for answer in (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{",
        b"HTTP/1.1 301 Moved\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    ):
        with answering(answer, context) as number:
            said = nohype.bad("--url", f"https://127.0.0.1:{number}", "--ca", nohype.ca)
            assert f"unexpected response (HTTP {answer.split()[1].decode()}): not a NoHype manager" in said
    for answer, context_ in ((b"SSH-2.0-x\r\n", None), (b"HTTP/1.1 \x1b[2J\r\n\r\n", context), (b"", context)):
        with answering(answer, context_) as number:
            assert "cannot reach the manager at https://127" in nohype.bad(
                "--url", f"https://127.0.0.1:{number}", "--ca", nohype.ca
            )


def test_nohype_reports_an_unreachable_address(nohype: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
    assert "Connection refused" in nohype.bad("--url", f"https://127.0.0.1:{number}")
    assert "check the host name" in nohype.bad("--url", "https://nobody.invalid:8443")
    assert "No such file" in nohype.bad("--socket", tmp_path / "none.sock")
    (tmp_path / "plain").touch()
    assert "Connection refused" in nohype.bad("--socket", tmp_path / "plain")
    # A queue of connections that is full: what comes more is dropped, as a firewall does.
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        assert "timed out" in nohype.bad("--url", f"https://127.0.0.1:{listener.getsockname()[1]}")
        for one in waiting:
            one.close()


def test_nohype_reports_a_manager_that_does_not_respond(nohype: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MARGIN_SECONDS", 0.2)
    context = context_of(nohype.port.authority.issue("mute", addresses=("127.0.0.1",)))
    with answering(None, context) as number:
        words = ("--url", f"https://127.0.0.1:{number}", "--ca", nohype.ca, "guest", "tell", "one", "mac", "--timeout", "0.1")
        status, _, said = nohype(*words)
    assert status == 1
    assert "timed out" in said
    assert "check `nohype guest list` and `nohype events`, then retry" in said


def test_nohype_reports_unusable_tls_files(nohype: Program, tmp_path: Path) -> None:
    certificate, key = nohype.port.authority.issue("alice")
    _, other = nohype.port.authority.issue("bob")
    _, locked = nohype.port.authority.issue("locked", pass_phrase=b"secret")
    text = tmp_path / "text"
    text.touch(0o600)
    text.write_text("no PEM")
    none = tmp_path / "none"
    for words, said in (
        (("--ca", none), f"{none}: No such file"),
        (("--ca", tmp_path), f"{tmp_path}: Is a directory"),
        (("--ca", text), f"TLS cannot use {text}"),
        (("--cert", none, "--key", key), f"{none}: No such file"),
        (("--cert", certificate, "--key", none), f"{none}: No such file"),
        (("--cert", certificate), f"TLS cannot use {certificate}"),
        (("--cert", certificate, "--key", other), f"TLS cannot use {certificate} and {other}"),
        (("--cert", text, "--key", key), f"TLS cannot use {text} and {key}"),
        (("--cert", certificate, "--key", locked), f"key {locked} has a passphrase"),
    ):
        assert said in nohype.bad("--url", nohype.url, *words)
    assert "invalid manager URL" in nohype.bad("--url", nohype.url.replace("https", "http"))
