"""How long `nohype web` waits for the manager, and which names its server answers to."""

from __future__ import annotations

import pytest

from orchestrator.errors import RequestError
from orchestrator.web.relay import CHANGE_SECONDS, READ_SECONDS, find_patience
from orchestrator.web.session import Session


@pytest.mark.parametrize(
    ("method", "target", "body", "seconds"),
    [
        ("GET", "/v1/host", b"", READ_SECONDS),
        ("HEAD", "/v1/host", b"", READ_SECONDS),
        ("GET", "/v1/events/stream", b"", READ_SECONDS),
        ("GET", "/v1/audit?frames=2", b"", CHANGE_SECONDS),
        ("GET", "/v1/guests/web/ready?timeout=90", b"", READ_SECONDS + 90),
        ("POST", "/v1/guests/web/stop", b'{"timeout": 90}', CHANGE_SECONDS + 90),
        ("POST", "/v1/guests/web/kill", b"", CHANGE_SECONDS),
        ("DELETE", "/v1/guests/web", b"", CHANGE_SECONDS),
    ],
)
def test_wait_is_as_long_as_the_request_may_take(method: str, target: str, body: bytes, seconds: float) -> None:
    assert find_patience(method, target, body) == seconds


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", '"x"', "null", "[]", "{}", "9" * 400, "1e9"])
def test_wait_has_a_bound_whatever_the_request_says(value: str) -> None:
    for found in (
        find_patience("POST", "/v1/guests/web/stop", b'{"timeout": %s}' % value.encode()),
        find_patience("POST", f"/v1/guests/web/stop?timeout={value}", b""),
        find_patience("POST", "/v1/guests/web/stop", value.encode() + b"{"),
    ):
        assert 0 < found <= CHANGE_SECONDS + 3600


@pytest.mark.parametrize("port", [80, 8080])
def test_browsers_omit_the_default_port(port: int) -> None:
    session = Session(port)
    for host in ("127.0.0.1", "localhost"):
        session.check_host(f"{host}:{port}")
        if port == 80:
            session.check_host(host)
        else:
            with pytest.raises(RequestError):
                session.check_host(host)
    for host in ("", "evil.example", "evil.example:80", "127.0.0.1:81", "127.0.0.1.", "127.0.0.1:", "[::1]"):
        with pytest.raises(RequestError):
            session.check_host(host)
