"""The TLS port: tokens and client certificates, from a throw-away CA."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.client import Client
from orchestrator.api.identity import hash_token
from orchestrator.api.server import open_port
from orchestrator.api.tls import build_context
from orchestrator.config import ApiConfig
from orchestrator.errors import Forbidden, HostError, NotFound, OrchestratorError, RequestError, TooMany, Unauthorized
from tests.served import Authority, Served, serve

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


def test_without_certificate_and_token_nobody_is_known(port: Port) -> None:
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
def test_a_wrong_token_is_refused(port: Port, token: str) -> None:
    with pytest.raises(Unauthorized, match="not known"):
        port.client(token).version()


def test_tokens_have_roles(port: Port) -> None:
    assert port.client(OPERATOR).survey()["cores"]
    with pytest.raises(Forbidden):
        port.client(ACME).survey()
    made = port.client(ACME).create(REQUEST)
    assert made["owner"] == "acme"
    assert port.client(OPERATOR).events()[-1]["who"] == "token acme"
    port.client(ACME).delete("one")


def test_certificates_have_roles(port: Port) -> None:
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


def test_a_genuine_certificate_without_a_role_is_refused(port: Port) -> None:
    with pytest.raises(Forbidden, match="CN:mallory"):
        port.client(certificate=port.authority.issue("mallory")).guests()


def test_a_certificate_of_another_ca_is_worth_nothing(port: Port) -> None:
    with pytest.raises(OrchestratorError, match="does not answer"):
        port.client(certificate=port.stranger.issue("alice")).guests()


def test_the_client_does_not_believe_everybody(port: Port) -> None:
    with pytest.raises(OrchestratorError, match=r"(?i)certificate verify failed"):
        Client(port.served.url, token=OPERATOR, ca=port.stranger.file).guests()


def test_plain_text_and_old_tls_get_nothing(port: Port) -> None:
    host, _, number = port.served.url.removeprefix("https://").partition(":")
    with socket.create_connection((host, int(number)), timeout=10) as connection:
        connection.sendall(b"GET /v1/guests HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in connection.recv(100)
    old = ssl.create_default_context(cafile=port.authority.file)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(number)), timeout=10) as connection, pytest.raises(ssl.SSLError):
        old.wrap_socket(connection, server_hostname=host)


def test_a_tenant_is_slowed_down_and_operators_are_not(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, operator = port.client(ACME), port.client(OPERATOR)
    guard = port.served.server.config.app
    monkeypatch.setattr(guard._turns, "_rate", 0.5)
    with pytest.raises(TooMany) as caught:
        [acme.version() for _ in range(40)]
    assert 0 < caught.value.wait <= 2
    for _ in range(40):
        operator.version()


def test_a_renewed_certificate_is_used_without_a_restart(port: Port) -> None:
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


def test_wrong_files_are_one_clear_error(port: Port, tmp_path: Path) -> None:
    certificate, key = port.authority.issue("other")
    with pytest.raises(RequestError, match="can't use"):
        build_context(ApiConfig(listen="127.0.0.1:0", certificate=str(key), key=str(key)))
    with pytest.raises(HostError, match=r"none\.pem"):
        open_port(ApiConfig(listen="127.0.0.1:0", certificate=str(tmp_path / "none.pem"), key=str(key)))
    key.chmod(0o640)
    with pytest.raises(RequestError, match="others can read"):
        build_context(ApiConfig(listen="127.0.0.1:0", certificate=str(certificate), key=str(key)))
    for url in ("http://127.0.0.1", "127.0.0.1:80", "https://", "https://host/path"):
        with pytest.raises(RequestError, match="no address"):
            Client(url)
