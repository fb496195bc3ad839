"""`nohype switch`: what it asks of the manager, and how it shows the answer. The manager is a fake here."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import connection
from orchestrator.cli.main import nohype

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB"
SSH = {"host": "192.0.2.90", "port": 22, "user": "root", "host_key": KEY}
VIEW: dict[str, Any] = {
    "switch": {"name": "sw1", "driver": "linux-bridge", "bridge": "br0", "netns": "", "ssh": SSH},
    "can": ["set hairpin"], "uplinks": [{"uplink": "nic0", "switch": "sw1", "port": "swp1"}],
    "problem": "", "observed": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
PORT: dict[str, Any] = {
    "name": "swp1", "up": True, "carrier": True, "hairpin": True, "state": "forwarding", "isolated": False, "mtu": 9000,
    "vlans": [{"id": 1, "pvid": True, "untagged": True}, {"id": 100, "pvid": False, "untagged": False}],
    "counters": {"rx_packets": 41, "tx_packets": 42, "rx_bytes": 0, "tx_bytes": 0, "rx_dropped": 0, "tx_dropped": 0},
    "fdb": [{"mac": "02:4e:48:00:00:01", "vlan": None, "static": False}],
    "pairs": [{"source": "02:4e:48:00:00:01", "target": "02:4e:48:00:00:02", "frames": 7}],
    "neighbour": {"system": "host\x1b[2J", "port": "nic0", "evb": "reflective relay requested"}, "gaps": [],
}  # fmt: skip
STATE: dict[str, Any] = {
    "ports": [PORT], "vlan_filtering": True, "stp": False, "fail_mode": None, "flows": None, "other_flows": None,
}  # fmt: skip
CHECKS: list[dict[str, str]] = [
    {"name": "hairpin", "port": "swp1", "verdict": "fail", "text": "hairpin off", "hint": "run `nohype switch hairpin`"},
    {"name": "mtu", "port": "swp1", "verdict": "not measured", "text": "unknown", "hint": ""},
]  # fmt: skip


class FakeClient:
    asked: list[tuple[Any, ...]] = []
    checks = CHECKS
    views: list[dict[str, Any]] = [VIEW]

    def __init__(self, where: object = None, on_slow: object = None) -> None:
        pass

    def switches(self) -> list[dict[str, Any]]:
        return self.views

    def switch(self, name: str) -> dict[str, Any]:
        announced = [{"uplink": "nic0", "neighbour": None, "gap": "not measured, because lldpd does not run"}]
        return {"view": VIEW, "state": STATE, "announced": announced}

    def add_switch(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(("add", request))
        return VIEW

    def verify_switch(self, name: str, port: str | None) -> list[dict[str, str]]:
        self.asked.append(("verify", name, port))
        return self.checks

    def set_hairpin(self, name: str, port: str, *, on: bool, macs: tuple[str, ...]) -> dict[str, Any]:
        self.asked.append(("hairpin", name, port, on, macs))
        return STATE

    def delete_switch(self, name: str, *, force: bool) -> None:
        self.asked.append(("delete", name, force))


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "asked", [])


def run(*words: str, status: int = 0) -> Result:
    done = CliRunner().invoke(nohype, ["switch", *words])
    assert done.exit_code == status, done.output
    return done


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ((), {}),
        (("--netns", "lab"), {"netns": "lab"}),
        (("--driver", "openvswitch"), {"driver": "openvswitch"}),
        (("--host", "192.0.2.90", "--host-key", KEY), {"ssh": {"host": "192.0.2.90", "host_key": KEY}}),
        (
            ("--host", "sw", "--host-key", KEY, "--ssh-port", "2222", "--user", "admin"),
            {"ssh": {"host": "sw", "host_key": KEY, "port": 2222, "user": "admin"}},
        ),
    ],
)  # fmt: skip
def test_add(words: tuple[str, ...], request_: dict[str, Any]) -> None:
    assert "set hairpin" in run("add", "sw1", "--bridge", "br0", *words).output
    assert FakeClient.asked == [("add", {"name": "sw1", "driver": "linux-bridge", "bridge": "br0", **request_})]


@pytest.mark.parametrize("words", [("--host", "sw"), ("--host-key", KEY), ("--user", "root"), ("--ssh-port", "22")])
def test_half_an_address_is_refused(words: tuple[str, ...]) -> None:
    run("add", "sw1", "--bridge", "br0", *words, status=2)
    assert FakeClient.asked == []


def test_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "root@192.0.2.90:22" in run("list").output
    assert run("list").output.split()[-1] == "ok"
    assert json.loads(run("list", "--json").output) == [VIEW]
    broken, fresh = copy.deepcopy(VIEW), {**VIEW, "observed": None, "uplinks": []}
    broken["problem"] = "port swp1: hairpin off"
    monkeypatch.setattr(FakeClient, "views", [broken, fresh])
    lines = run("list").output.splitlines()
    assert lines[1].endswith("port swp1: hairpin off")
    assert lines[2].endswith("not observed yet")
    monkeypatch.setattr(FakeClient, "views", [])
    assert run("list").output == "no switches\n"


def test_show() -> None:
    output = run("show", "sw1").output
    for text in (
        "nic0=swp1",
        "vlan_filtering yes",
        "1*,100",
        "7 frames from",
        "claims: reflective relay requested",
        "lldpd does not",
    ):
        assert text in output
    assert "fail_mode" not in output
    assert "\x1b" not in output, "a station chooses its name"
    assert json.loads(run("show", "sw1", "--json").output)["state"]["ports"][0]["mtu"] == 9000


def test_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    output = run("verify", "sw1", "swp1", status=1).output
    assert FakeClient.asked == [("verify", "sw1", "swp1")]
    assert "port swp1, hairpin: run `nohype switch hairpin`" in output
    assert json.loads(run("verify", "sw1", "--json", status=1).output) == CHECKS
    monkeypatch.setattr(FakeClient, "checks", CHECKS[1:])
    run("verify", "sw1")


def test_hairpin_and_delete() -> None:
    assert run("hairpin", "sw1", "swp1", "on", "--mac", "a", "--mac", "b").output == "hairpin on at port swp1 of switch sw1\n"
    run("hairpin", "sw1", "swp1", "off")
    run("hairpin", "sw1", "swp1", "maybe", status=2)
    assert run("delete", "sw1").output == "switch sw1 deleted\n"
    run("delete", "sw1", "--force")
    assert FakeClient.asked == [
        ("hairpin", "sw1", "swp1", True, ("a", "b")), ("hairpin", "sw1", "swp1", False, ()),
        ("delete", "sw1", False), ("delete", "sw1", True),
    ]  # fmt: skip
