"""VM exits and the end of a guest's boot over the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.client import Client
from orchestrator.errors import GuestError, NotFound, RequestError, Stale
from tests.fakes.server import IMAGE
from tests.harness.api_server import Served, send, serve

POLICY = {"action": "pause", "boot_seconds": 9, "application": {"io": "0/s,60/min"}, "housekeeping": {"all": {"minute": 5}}}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Client:
    request = {"name": "web", "image": IMAGE, "memory": "64M", "exit_policy": POLICY, "housekeeping": "0"}
    served.client.create(request)
    return served.client


def test_boot_ends_by_a_request(client: Client) -> None:
    assert client.guest("web")["disengaged"] is None
    with pytest.raises(GuestError, match="guest web is in its boot"):
        client.exits("web", phase="run")
    guest = client.disengage("web")
    assert guest["disengaged"]
    assert guest["disengaged"]["signal"] == "request"
    assert client.disengage("web") == guest
    assert [vcpu["total"] for vcpu in client.exits("web", phase="boot")["vcpus"]] == [1000, 1000]
    assert [vcpu["total"] for vcpu in client.exits("web", phase="run")["vcpus"]] == [0, 0]


def test_request_for_another_version_is_stale(client: Client) -> None:
    with pytest.raises(Stale):
        client.disengage("web", version=999)
    assert client.guest("web")["disengaged"] is None


def test_guest_that_is_stopped_or_missing_is_refused(client: Client) -> None:
    client.kill("web")
    with pytest.raises(GuestError, match="guest web is stopped, not running"):
        client.disengage("web")
    with pytest.raises(NotFound):
        client.disengage("other")


def test_policy_is_shown_as_it_is_judged(client: Client) -> None:
    guest = client.guest("web")
    assert guest["exit_policy"] == {
        "action": "pause",
        "boot_seconds": 9,
        "application": {"io": {"second": 0, "minute": 60}},
        "housekeeping": {"all": {"second": None, "minute": 5}},
    }
    assert guest["housekeeping_vcpus"] == "0"


@pytest.mark.parametrize("policy", [{"application": {"nonsense": "any"}}, {"application": {"io": "5"}}, {"boot_seconds": 0}, 7])
def test_wrong_policy_is_refused(served: Served, policy: object) -> None:
    with pytest.raises(RequestError, match="exit_policy"):
        served.client.create({"name": "web", "image": IMAGE, "memory": "64M", "exit_policy": policy})


def test_unknown_phase_is_refused(served: Served) -> None:
    answer = send(served.path, b"GET /v1/guests/web/exits?phase=nonsense HTTP/1.1\r\nHost: nohype\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
