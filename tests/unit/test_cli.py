"""The operator's command: what it asks of the manager, and how it shows the answer. The manager is a fake here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import connection, output
from orchestrator.cli import main as main_module
from orchestrator.cli.main import nohype
from orchestrator.errors import NotFound, Unauthorized
from orchestrator.model.proof import WEAKER
from orchestrator.model.request import parse_guest_request

GUEST: dict[str, Any] = {
    "name": "web", "state": "running", "owner": "", "version": 3, "restarts": 1, "cores": ["2-3"], "cpus": [2, 3], "node": 0,
    "memory": 256 << 20, "huge_pages": 128, "page_size": 2 << 20, "housekeeping": "0-1", "image": "minimal", "cmdline": "quiet",
    "vf": {"pf": "0000:41:00.0", "interface": "nic0", "index": 0, "address": "0000:41:10.0", "mac": "02:4e:48:00:00:01"},
    "cpu_features": [], "restart": "on-failure", "id": "job-17", "hostname": "web", "ssh_keys": 0,
    "user_data": None, "network_config": None,
    "addresses": ["10.9.0.11/24"], "ssh_host_key": None,
}  # fmt: skip
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB alice@example"
GUEST["nics"] = [GUEST["vf"]]


def build_event(number: int, subject: str = "web", **fields: Any) -> dict[str, Any]:
    event = {"id": number, "time": "2026-01-01T00:00:00.000+00:00", "kind": "started", "subject": subject, "who": "root"}
    return {**event, "detail": "on CPUs 2-3", "tenant": "", "took": None, **fields}


class FakeClient:
    """Remembers what was asked."""

    made: list[tuple[Any, dict[str, Any]]] = []
    asked: list[tuple[Any, ...]] = []
    log: list[dict[str, Any]] = []

    def __init__(self, where: object = None, on_slow: object = None, **credentials: object) -> None:
        self.made[:] = [(where, {name: value for name, value in credentials.items() if value is not None})]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*arguments: Any, **options: Any) -> Any:
            self.asked.append((name, *arguments, *([options] if options else [])))
            if name == "wait_ready":
                return "nohype: ready name=web"
            return {**GUEST, "state": "stopped"} if name in ("stop", "kill") else GUEST

        return ask

    def quarantined(self) -> list[dict[str, Any]]:
        return [{"name": "db", "since": "2026-01-01T00:00:00+00:00", "reasons": ["VF 0000:41:10.2 is still bound to vfio-pci"]}]

    def events(self, after: int | None, limit: int) -> list[dict[str, Any]]:
        self.asked.append(("events", after, limit))
        return self.log[-limit:] if after is None else [event for event in self.log if event["id"] > after][:limit]

    def follow(self, after: int | None) -> Iterator[dict[str, Any]]:
        self.asked.append(("follow", after))
        yield build_event(9001)
        yield build_event(9002, "db")

    def metrics(self) -> str:
        return '# HELP nohype_guests Guests.\n# TYPE nohype_guests gauge\nnohype_guests{state="running"} 1.0\n'


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "Client", FakeClient)
    for name in [name for name in os.environ if name.startswith("NOHYPE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(FakeClient, "made", [])
    monkeypatch.setattr(FakeClient, "asked", [])
    monkeypatch.setattr(FakeClient, "log", [])


def run(*words: str, status: int = 0) -> Result:
    done = CliRunner().invoke(nohype, list(words))
    assert done.exit_code == status, done.output
    return done


def test_a_request_with_everything() -> None:
    place = ("--cpus", "2-3,6-7", "--vf", "0000:41:10.0")
    more = ("--page-size", "1G", "--restart", "on-failure", "--remove", "--id", "job-17", "--address", "10.9.0.1/24")
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--cores", "2", *place, *more)
    ((name, request),) = FakeClient.asked
    assert name == "create"
    assert request["placement"] == {"cpus": "2-3,6-7", "vf": "0000:41:10.0"}
    found = parse_guest_request(request)
    assert (found.page_size, found.restart, found.id, found.cores, found.remove) == ("1G", "on-failure", "job-17", 2, True)


def test_configuration_is_read_from_files(tmp_path: Path) -> None:
    first, second, data, network = (tmp_path / name for name in ("a.pub", "authorized_keys", "data", "network"))
    first.write_text(f"{KEY}\n")
    second.write_text(f"# of the team\n\n{KEY.replace('AAB', 'AAC')} \n  {KEY.replace('AAB', 'AAD')}\n")
    data.write_text("#cloud-config\npassword: pässword\n")
    network.write_text("version: 2\n")
    files = ("--ssh-key", str(first), "--ssh-key", str(second), "--user-data", str(data), "--network-config", str(network))
    run("guest", "create", "web", "--memory", "1G", "--image", "debian", "--hostname", "db.example", *files)
    ((_, request),) = FakeClient.asked
    assert request["user_data"] == data.read_text()
    found = parse_guest_request(request)
    assert (len(found.ssh_keys), found.hostname, sorted(found.secrets)) == (3, "db.example", ["network_config", "user_data"])


@pytest.mark.parametrize(
    ("option", "content", "why"),
    [
        ("--ssh-key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nsecret", "is a private key; give the public key"),
        ("--ssh-key", b"# nothing\n", "contains no key"),
        ("--ssh-key", b"\xff", "is not text in UTF-8"),
        ("--user-data", b"\x1f\x8bsecret\xff", "is not text in UTF-8"),
        ("--user-data", b"secret" * 200_000, "has more than 1 MB"),
        ("--network-config", b"\xff", "is not text in UTF-8"),
        ("--user-data", None, "No such file"),
        ("--ssh-key", None, "No such file"),
    ],
)
def test_wrong_file_is_refused_before_it_is_sent(tmp_path: Path, option: str, content: bytes | None, why: str) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    done = run("guest", "create", "web", "--memory", "1G", "--image", "debian", option, str(file), status=2)
    assert why in " ".join(done.output.split())
    assert "secret" not in done.output
    assert not FakeClient.asked


def test_configuration_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {**GUEST, "hostname": "db.example", "ssh_keys": 2, "user_data": "0a1b2c3d", "network_config": "4e5f6071"}
    monkeypatch.setattr(FakeClient, "guest", lambda _self, _name: shown, raising=False)
    rows = [" ".join(line.split()) for line in run("guest", "show", "web").output.splitlines()]
    expected = [
        "host name db.example",
        "SSH keys 2",
        "user data SHA-256 0a1b2c3d...",
        "network configuration SHA-256 4e5f6071...",
    ]
    assert [row for row in expected if row not in rows] == []


def test_nics_are_sent_in_order() -> None:
    nics = ("--nic", "uplink=nic1,address=10.9.0.1/24", "--nic", "", "--nic", "vf=0000:41:10.0,network=blue,rate=100")
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", *nics, "--plan")
    ((_, request),) = FakeClient.asked
    assert request["nics"] == [
        {"uplink": "nic1", "address": "10.9.0.1/24"},
        {},
        {"vf": "0000:41:10.0", "network": "blue", "rate": 100},
    ]
    assert len(parse_guest_request(request).wanted_nics) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nic", "mac=02:4e:48:00:00:01"), "'mac=02:4e:48:00:00:01' in"),
        (("--nic", "uplink"), "use each of uplink, vf, address, network, rate at most once, as KEY=VALUE"),
        (("--nic", "vf="), "as KEY=VALUE"),
        (("--nic", "rate=fast"), "rate=fast in 'rate=fast': use a whole number of Mbit/s"),
        (("--nic", "rate=-1"), "use a whole number"),
        (("--nic", "rate=1.5"), "use a whole number"),
        (("--nic", "uplink=nic0,uplink=nic1"), "'uplink=nic1' in"),
        (("--nic", "", "--address", "10.9.0.1/24"), "--nic cannot be combined with --address or --vf"),
        (("--nic", "", "--cpus", "2", "--vf", "0000:41:10.0"), "--nic cannot be combined with --address or --vf"),
    ],
)
def test_wrong_nic_options_are_usage_errors(words: tuple[str, ...], message: str) -> None:
    assert message in run("guest", "create", "web", "--memory", "1G", "--image", "minimal", *words, status=2).output
    assert FakeClient.asked == []


def test_disks_are_sent_in_order_with_what_is_accepted() -> None:
    disks = ("--disk", "size=2G,serial=S5 GX", "--disk", "", "--disk", "kind=emulated,size=1G", "--accept", "emulated-disk")
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", *disks, "--plan")
    ((_, request),) = FakeClient.asked
    assert request["disks"] == [{"size": "2G", "serial": "S5 GX"}, {}, {"kind": "emulated", "size": "1G"}]
    assert request["accept"] == ["emulated-disk"]
    assert [disk.kind for disk in parse_guest_request(request).disks] == ["nvme", "nvme", "emulated"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("path=/dev/sda", "'path=/dev/sda' in"),
        ("size", "use each of size, serial, kind, target, initiator, user, secret at most once, as KEY=VALUE"),
        ("serial=", "as KEY=VALUE"),
        ("size=1G,size=2G", "'size=2G' in"),
    ],
)
def test_wrong_disk_options_are_usage_errors(option: str, message: str) -> None:
    assert message in run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--disk", option, status=2).output
    assert FakeClient.asked == []


def test_disks_and_their_progress_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    disks = [
        {"size": 1 << 30, "serial": "S5GX", "address": "0000:44:00.0", "node": 1, "file": ""},
        {"size": 1 << 30, "serial": "", "address": None, "node": None, "file": "/disks/web-2.raw"},
    ]
    shown = {"state": "wiping", "disks": disks, "waived": ["emulated-disk"], "vf": None, "nics": [], "cores": [], "cpus": []}
    for key, value in {**shown, "progress": {"disk": "S5GX", "phase": "verify", "percent": 43}}.items():
        monkeypatch.setitem(GUEST, key, value)
    output = run("guest", "show", "web").output
    assert re.search(r"^state +wiping \(verify S5GX: 43%\)$", output, re.MULTILINE)
    assert re.search(r"^disk +NVMe S5GX, 1G, 0000:44:00.0 on node 1$", output, re.MULTILINE)
    assert re.search(r"^disk +/disks/web-2.raw, 1G, emulated$", output, re.MULTILINE)
    assert re.search(r"^weaker +emulated-disk$", output, re.MULTILINE)


def test_all_nics_of_a_guest_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    second = {**GUEST["vf"], "index": 1, "address": "0000:41:10.2", "mac": "02:4e:48:00:00:02"}
    monkeypatch.setitem(GUEST, "nics", [GUEST["vf"], second])
    output = run("guest", "show", "web").output
    assert re.search(r"^VF +0000:41:10.0, number 0 .*02:4e:48:00:00:01$", output, re.MULTILINE)
    assert re.search(r"^VF +0000:41:10.2, number 1 .*02:4e:48:00:00:02$", output, re.MULTILINE)


def test_network_and_rate_of_a_nic_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUEST, "nics", [{**GUEST["vf"], "network": "blue", "vlan": 100, "rate": 50}])
    output = run("guest", "show", "web").output
    assert re.search(r"^VF .*02:4e:48:00:00:01, network blue .VLAN 100., at most 50 Mbit/s$", output, re.MULTILINE)


def test_nic_of_a_software_edge_is_shown_without_a_vf(monkeypatch: pytest.MonkeyPatch) -> None:
    nic = {**GUEST["vf"], "pf": None, "index": None, "address": None, "edge": "macvtap-vepa", "tap": "nh-a"}
    monkeypatch.setitem(GUEST, "nics", [nic])
    output = run("guest", "show", "web").output
    assert re.search(r"^NIC +nh-a on nic0, edge mode macvtap-vepa, address 02:4e:48:00:00:01$", output, re.MULTILINE)


def test_host_key_that_the_guest_reported_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SSH host key" not in run("guest", "show", "web").output
    monkeypatch.setitem(GUEST, "ssh_host_key", "ssh-ed25519 AAAA")
    assert re.search(r"^SSH host key +ssh-ed25519 AAAA$", run("guest", "show", "web").output, re.MULTILINE)


def test_warnings_of_a_plan_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUEST, "warnings", ["CPUs 2-3 are pinned by unmanaged domain db (shut off), and no others are free"])
    done = run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--plan")
    assert re.search(r"^warning +CPUs 2-3 are pinned by unmanaged domain db", done.output, re.MULTILINE)


def test_a_survey_shows_where_the_configuration_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "cores": [], "isolated": "", "pools": [], "pfs": [], "iommu_groups": [], "kvm": False,
        "promised": [{"page_size": 2 << 20, "count": 400}],
        "findings": [{"severity": "error", "text": "the kernel offers no KVM", "hint": "enable SVM"}],
    }  # fmt: skip
    monkeypatch.setattr(FakeClient, "survey", lambda _self: found, raising=False)
    output = run("survey").output
    assert "400 huge pages of 2M" in output
    assert "KVM: not available\nerror: the kernel offers no KVM\n  hint: enable SVM" in output


def test_limits_of_a_pass_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = ["read", f"{WEAKER}its DMA is not translated while no guest holds it"]
    proof = {"name": "device-isolated", "subject": "web", "verdict": "pass", "figure": 0, "unit": "faults", "evidence": evidence}
    monkeypatch.setattr(FakeClient, "audit", lambda _self, _frames, host_only: [proof], raising=False)
    assert f"device-isolated (web): {evidence[1]}" in run("audit").output


@pytest.mark.parametrize(("verdict", "status"), [("pass", 0), ("not measured", 0), ("fail", 1)])
def test_audit_of_the_host_names_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch, verdict: str, status: int) -> None:
    proof = {"name": "vepa", "subject": "host", "verdict": verdict, "figure": None, "unit": "frames", "evidence": ["no frames"]}
    monkeypatch.setattr(FakeClient, "audit", lambda _self, _frames, host_only: [proof] if host_only else [], raising=False)
    done = CliRunner().invoke(nohype, ["audit", "--host"], standalone_mode=False)
    assert done.return_value == status
    shown = done.output
    assert verdict.upper() in shown
    assert shown.endswith("proofs of guests: not measured (--host)\n")
    assert "(--host)" not in run("audit").output
    assert json.loads(run("audit", "--host", "--json").output) == [proof]
    assert "evidence has all proofs" in run("audit", "--host", "--sign", "x", status=2).output


def test_what_is_not_said_is_not_asked() -> None:
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--plan")
    assert FakeClient.asked == [("plan", {"name": "web", "memory": "1G", "image": "minimal", "cmdline": ""})]


def test_a_vf_alone_is_no_place() -> None:
    assert (
        "--vf requires --cpus"
        in run("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--vf", "0:0", status=2).output
    )
    assert FakeClient.asked == []


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        (("start", "web"), ("start", "web"), "web running"),
        (("stop", "web"), ("stop", "web", 60), "web stopped"),
        (("stop", "web", "--timeout", "5"), ("stop", "web", 5), "web stopped"),
        (("restart", "web", "--timeout", "5"), ("restart", "web", 5), "web running"),
        (("kill", "web"), ("kill", "web"), "web stopped"),
        (("delete", "web"), ("delete", "web"), "web deleted"),
    ],
)
def test_each_verb(words: tuple[str, ...], asked: tuple[Any, ...], said: str) -> None:
    assert run("guest", *words).output == said + "\n"
    assert FakeClient.asked == [asked]
    assert json.loads(run("guest", *words, "--json").output)["name"] == "web"


@pytest.mark.parametrize("verb", ["start", "restart"])
def test_a_guest_that_is_started_may_be_waited_for(verb: str) -> None:
    assert run("guest", verb, "web", "--wait", "5").output == "web running\nnohype: ready name=web\n"
    assert FakeClient.asked[-1] == ("wait_ready", "web", 5)
    assert json.loads(run("guest", verb, "web", "--wait", "5", "--json").output)["ready"] == "nohype: ready name=web"


@pytest.mark.parametrize("seconds", ["0", "-1", "3601", "soon", "nan", "-nan", "inf"])
def test_a_patience_that_makes_no_sense(seconds: str) -> None:
    run("guest", "stop", "web", "--timeout", seconds, status=2)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    "words",
    [("guest", "create", "web", "--memory", "1G", "--image", "minimal", "--wait"), ("guest", "start", "web", "--wait"),
     ("guest", "tell", "web", "mac", "--timeout"), ("lab", "down", "no-such-lab", "--timeout"),
     ("lab", "exec", "--lab", "no-such-lab", "--timeout")],
)  # fmt: skip
def test_a_wait_that_makes_no_sense(words: tuple[str, ...], seconds: str) -> None:
    """Nothing is asked: a guest that has been made already would stay. The lab has a name, so that no real one is ever ended."""
    more = ("true",) if "exec" in words else ()
    assert f"Invalid value for '{words[-1]}'" in run(*words, seconds, *more, status=2).output
    assert FakeClient.asked == []


def test_a_guest_is_shown_with_its_restarts() -> None:
    shown = run("guest", "show", "web").output
    assert "1 (on-failure)" in shown
    assert "tenant" not in shown


def test_quarantine() -> None:
    shown = run("quarantine", "list").output
    assert shown.splitlines() == ["db, since 2026-01-01T00:00:00+00:00", "  VF 0000:41:10.2 is still bound to vfio-pci"]
    assert json.loads(run("quarantine", "list", "--json").output)[0]["name"] == "db"
    assert run("quarantine", "clear", "db").output == "db cleared\n"
    run("quarantine", "clear", "db", "--force")
    assert FakeClient.asked == [("clear_quarantine", "db", {"force": False}), ("clear_quarantine", "db", {"force": True})]


UPLINK = {
    "name": "nic0", "up": True, "configured": "auto", "edge": "macvtap-vepa", "why": "no VFs", "now": "", "guests": ["web", "db"],
    "modes": [{"mode": "vepa", "refused": "no VFs"}, {"mode": "macvtap-vepa", "refused": ""}], "override": "", "managed_by": "",
}  # fmt: skip


def test_uplinks_are_listed_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    none = {**UPLINK, "name": "nic1", "up": False, "edge": None, "guests": []}
    monkeypatch.setattr(FakeClient, "uplinks", lambda _: [UPLINK, none], raising=False)
    counts = {"sent": 7, "received": 6, "sent_bytes": 700, "received_bytes": 600, "sent_dropped": 1, "received_dropped": 2}
    counters = [
        {"place": "guest", "name": "nh-1", "guest": "web", "counts": counts, "gap": ""},
        {"place": "switch", "name": "swp1", "guest": "", "counts": None, "gap": "not measured: no route"},
    ]
    monkeypatch.setattr(FakeClient, "uplink", lambda _self, name: {**UPLINK, "name": name, "counters": counters}, raising=False)
    lines = run("uplink", "list").output.splitlines()
    assert [line.split() for line in lines[1:]] == [["nic0", "macvtap-vepa", "up", "web,db"], ["nic1", "none", "down", "-"]]
    assert json.loads(run("uplink", "list", "--json").output) == [UPLINK, none]
    shown = run("uplink", "show", "nic0").output
    assert re.search(r"^mode macvtap-vepa +possible$", shown, re.MULTILINE)
    assert re.search(r"^why +no VFs$", shown, re.MULTILINE)
    assert re.search(r"^frames guest nh-1 +7 sent, 6 received, 3 dropped \(guest web\)$", shown, re.MULTILINE)
    assert re.search(r"^frames switch swp1 +not measured: no route$", shown, re.MULTILINE)
    earlier = {**UPLINK, "name": "nic0"}  # of a manager that does not count
    monkeypatch.setattr(FakeClient, "uplink", lambda *_: earlier, raising=False)
    assert "frames" not in run("uplink", "show", "nic0").output
    assert "set instead" not in shown


def test_edge_mode_of_an_uplink_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    after = {**UPLINK, "edge": "nft-vepa", "override": "nft-vepa", "managed_by": "NetworkManager"}
    monkeypatch.setattr(FakeClient, "set_uplink", lambda _self, name, edge: {**after, "name": name, "edge": edge}, raising=False)
    monkeypatch.setattr(FakeClient, "uplink", lambda *_: after, raising=False)
    assert run("uplink", "set", "nic0", "--edge", "nft-vepa").output == "nic0: new guests get edge mode nft-vepa (no VFs)\n"
    shown = run("uplink", "show", "nic0").output
    assert re.search(r"^set instead +nft-vepa \(nohype uplink set\)$", shown, re.MULTILINE)
    assert re.search(r"^managed by +NetworkManager, which may change it$", shown, re.MULTILINE)


@pytest.mark.parametrize(("returned", "status"), [(1, 0), (0, 1)])
def test_probe_of_an_uplink_has_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], returned: int, status: int
) -> None:
    result = {"uplink": "nic0", "sent": 5, "returned": returned}
    monkeypatch.setattr(FakeClient, "prove_uplink", lambda *_: result, raising=False)
    output = run("uplink", "prove", "nic0").output
    assert f"nic0: {returned} of 5 probe frames came back" in output
    assert ("enable hairpin" in output) == bool(status)
    assert json.loads(run("uplink", "prove", "nic0", "--json").output) == result
    assert main(monkeypatch, capsys, "uplink", "prove", "nic0")[0] == status


def test_events_are_a_line_each() -> None:
    FakeClient.log = [build_event(1, detail="no room\n  - node 0: full", took=0.0123), build_event(2)]
    lines = run("events").output.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("started      web              by root: no room - node 0: full (0.012 s)")


def test_events_of_one_guest_as_json() -> None:
    FakeClient.log = [build_event(1), build_event(2, "db")]
    assert [event["id"] for event in json.loads(run("events", "--guest", "db", "--json").output)] == [2]


def test_all_events_after_one_are_fetched_page_by_page() -> None:
    FakeClient.log = [build_event(number) for number in range(1, 2501)]
    assert len(json.loads(run("events", "--after", "10", "--json").output)) == 2490
    assert FakeClient.asked == [("events", 10, 1000), ("events", 1010, 1000), ("events", 2010, 1000)]


def test_following_begins_after_the_last_event_whoever_it_was_about() -> None:
    FakeClient.log = [build_event(1), build_event(2, "db")]
    lines = [json.loads(line) for line in run("events", "--follow", "--guest", "web", "--json").output.splitlines()]
    assert [event["id"] for event in lines] == [1, 9001]
    assert FakeClient.asked[-1] == ("follow", 2)


def test_metrics() -> None:
    assert run("metrics").output == FakeClient().metrics()
    assert json.loads(run("metrics", "--json").output) == [{"series": 'nohype_guests{state="running"}', "value": "1.0"}]


LIST = ("guest", "show", "web")
SOCKET, URL = "/run/other.sock", "https://manager.example:8443"


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Runs the program as its user does; returns status and standard error."""
    monkeypatch.setattr(sys, "argv", ["nohype", *words])
    with pytest.raises(SystemExit) as ended:
        main_module.main()
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files as they should be: of a CA, a certificate, its key, a token."""
    for name in ("ca", "cert", "key", "token"):
        (tmp_path / name).write_text("secret-token\n")
        (tmp_path / name).chmod(0o600)
    return {name: str(tmp_path / name) for name in ("ca", "cert", "key", "token")}


@pytest.mark.parametrize(
    ("words", "environment", "where"),
    [
        ((), {}, Path("/run/nohype/nohyped.sock")),
        ((), {"NOHYPE_SOCKET": SOCKET}, Path(SOCKET)),
        (("--socket", SOCKET), {"NOHYPE_SOCKET": "/none"}, Path(SOCKET)),
        (("--url", URL), {}, URL),
        ((), {"NOHYPE_URL": URL}, URL),
        # what is typed wins over what is in the environment
        (("--url", URL), {"NOHYPE_SOCKET": SOCKET}, URL),
        (("--socket", SOCKET), {"NOHYPE_URL": URL, "NOHYPE_TOKEN": "x", "NOHYPE_CA": "/none"}, Path(SOCKET)),
        # an empty variable is none
        ((), {"NOHYPE_URL": "", "NOHYPE_TOKEN": ""}, Path("/run/nohype/nohyped.sock")),
    ],
)
def test_which_manager_is_asked(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], environment: dict[str, str], where: Path | str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run(*words, *LIST)
    assert FakeClient.made == [(where, {})]


def test_the_socket_may_be_named_after_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOHYPE_URL", URL)
    run(*LIST, "--socket", SOCKET)
    assert FakeClient.made == [(Path(SOCKET), {})]


def test_credentials_of_the_options_and_of_the_environment(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    certificate = {"certificate": Path(files["cert"]), "key": Path(files["key"])}
    run("--url", URL, "--ca", files["ca"], "--cert", files["cert"], "--key", files["key"], *LIST)
    assert FakeClient.made == [(URL, {"ca": Path(files["ca"]), **certificate})]
    run("--url", URL, "--token-file", files["token"], *LIST)
    assert FakeClient.made == [(URL, {"token": "secret-token"})]
    for name in ("url", "ca", "cert", "key"):
        monkeypatch.setenv(f"NOHYPE_{name.upper()}", {"url": URL, **files}[name])
    monkeypatch.setenv("NOHYPE_TOKEN", "of-the-environment")
    run(*LIST)
    assert FakeClient.made == [(URL, {"token": "of-the-environment", "ca": Path(files["ca"]), **certificate})]
    run("--token-file", files["token"], *LIST)
    assert FakeClient.made[0][1]["token"] == "secret-token"


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("--url", URL, "--socket", SOCKET), {}, "--url and --socket are mutually exclusive"),
        ((), {"NOHYPE_URL": URL, "NOHYPE_SOCKET": SOCKET}, "NOHYPE_URL and NOHYPE_SOCKET are mutually exclusive"),
        (("--url", URL, "--key", "/none"), {}, "--key requires --cert"),
        (("--url", URL), {"NOHYPE_KEY": "/none"}, "NOHYPE_KEY requires --cert"),
        (("--ca", "/none"), {}, "--ca: requires --url"),
        (("--cert", "/none", "--key", "/none"), {}, "--cert, --key: requires --url"),
        (("--token-file", "/none"), {}, "--token-file: requires --url"),
        # it would be answered as root, not as whose token it is
        ((), {"NOHYPE_TOKEN": "secret"}, "NOHYPE_TOKEN: requires --url"),
        (("--socket", SOCKET, "--ca", "/none"), {"NOHYPE_CERT": "/none"}, "--ca: requires --url"),
        ((), {"NOHYPE_SOCKET": SOCKET, "NOHYPE_TOKEN": "secret"}, "NOHYPE_TOKEN: requires --url"),
    ],
)
def test_options_that_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = run(*words, *LIST, status=2).output
    assert said in output
    assert "secret" not in output
    assert FakeClient.made == []


@pytest.mark.parametrize("words", [("--url", URL), ("--socket", SOCKET), ("--token-file", "/none")])
@pytest.mark.parametrize("command", [("image", "list"), ("lab", "status"), ("token", "new", "ci", "--role", "viewer")])
def test_a_command_that_asks_no_manager_takes_no_manager(words: tuple[str, ...], command: tuple[str, ...]) -> None:
    assert "does not contact a manager" in run(*words, *command, status=2).output


def test_the_environment_is_nothing_to_a_command_that_asks_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOHYPE_URL", URL)
    monkeypatch.setenv("NOHYPE_KEY", "/none")
    run("token", "new", "ci", "--role", "viewer")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o600, ""),
        (0o400, ""),
        (0o640, "readable by its group"),
        (0o440, "readable by its group"),
        (0o610, "gives other users permissions"),
        (0o601, "gives other users permissions"),
        (0o644, "readable by all users"),
        (0o604, "readable by all users"),
        (0o660, "writable by other users"),
        (0o602, "writable by other users"),
    ],
)
@pytest.mark.parametrize("option", ["token", "key"])
def test_a_secret_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: dict[str, str], mode: int, said: str, option: str
) -> None:
    Path(files[option]).chmod(mode)
    words = {"token": ("--token-file", files["token"]), "key": ("--cert", files["cert"], "--key", files["key"])}[option]
    status, output = main(monkeypatch, capsys, "--url", URL, *words, *LIST)
    assert (status, said in output) == (int(bool(said)), True), output
    assert not said or f"chmod 600 {files[option]}" in output


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n", "is empty"), (b"two words", "has several words"), (None, "No such file")]
)
def test_a_token_file_without_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: dict[str, str], content: bytes | None, said: str
) -> None:
    path = Path(files["token"])
    path.unlink() if content is None else path.write_bytes(content)
    status, output = main(monkeypatch, capsys, "--url", URL, "--token-file", str(path), *LIST)
    assert status == 1
    assert said in output
    assert str(path) in output


def test_a_token_may_come_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shell's `--token-file <(pass show nohype)` gives it."""
    reader, writer = os.pipe()
    os.write(writer, b"secret-token\n")
    os.close(writer)
    run("--url", URL, "--token-file", f"/dev/fd/{reader}", *LIST)
    os.close(reader)
    assert FakeClient.made == [(URL, {"token": "secret-token"})]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
@pytest.mark.parametrize(("mode", "said"), [(0o640, ""), (0o440, ""), (0o644, "readable by all users"), (0o660, "writable by")])
def test_a_group_may_share_a_secret_of_another_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: dict[str, str], mode: int, said: str
) -> None:
    """As ssh, which looks at the mode of its user's own keys only."""
    Path(files["token"]).chmod(mode)
    os.chown(files["token"], 1, 1)
    status, output = main(monkeypatch, capsys, "--url", URL, "--token-file", files["token"], *LIST)
    assert (status, said in output) == (int(bool(said)), True), output


def test_a_pipe_that_no_program_writes_to_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    words = ("--url", URL, "--token-file", str(tmp_path / "pipe"), *LIST)
    status, output = main(monkeypatch, capsys, *words)
    assert (status, "no program writes to it" in output) == (1, True), output
    # One has it open, and never writes.
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "pipe", os.O_WRONLY)
    monkeypatch.setattr("orchestrator.cli.secrets.PIPE_TIMEOUT", 0.05)
    status, output = main(monkeypatch, capsys, *words)
    assert (status, "nothing was written within" in output) == (1, True), output
    os.close(writer), os.close(reader)
    status, output = main(monkeypatch, capsys, "--url", URL, "--token-file", "/dev/null", *LIST)
    assert (status, "neither a file nor a pipe" in output) == (1, True), output


def test_a_program_may_write_the_token_in_parts_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    writing = threading.Timer(0.05, lambda: (os.write(writer, b"-token\n"), os.close(writer)))
    os.write(writer, b"secret")
    writing.start()
    run("--url", URL, "--token-file", f"/dev/fd/{reader}", *LIST)
    writing.join()
    os.close(reader)
    assert FakeClient.made == [(URL, {"token": "secret-token"})]


def test_an_error_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_self: FakeClient, _name: str) -> None:
        raise NotFound("there is \x1b[2J\rnothing", "look\x07")

    monkeypatch.setattr(FakeClient, "guest", refuse, raising=False)
    assert main(monkeypatch, capsys, *LIST) == (1, "nohype: there is \\x1b[2J\\rnothing\n  hint: look\\x07\n")


def test_a_token_that_is_refused_is_told_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_self: FakeClient, _name: str) -> None:
        raise Unauthorized("this token is not known", "it may be mistyped, or withdrawn")

    monkeypatch.setattr(FakeClient, "guest", refuse, raising=False)
    status, output = main(monkeypatch, capsys, "--url", URL, *LIST)
    assert status == 1
    assert output.startswith("nohype: this token is not known\n  hint: it may be mistyped, or withdrawn; ")
    assert "--token-file FILE" in output


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        yield (*path, name), found
        if isinstance(found, click.Group):
            yield from commands(found, *path, name)


@pytest.mark.parametrize(("path", "command"), [pytest.param(*one, id=" ".join(one[0])) for one in commands(nohype)])
def test_help(path: tuple[str, ...], command: click.Command) -> None:
    """The list of commands shows the first sentence whole, and each option says what it is, and in what unit."""
    assert not command.get_short_help_str(60).endswith("...")
    text = run(*path, "--help").output
    assert not re.search(r"\b(TEXT|INTEGER|FLOAT)\b", text), text
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, option.name


def test_missing_extra_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "orchestrator.cli.config", raising=False)
    monkeypatch.delitem(sys.modules, "orchestrator.config", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert main(monkeypatch, capsys, "config", "check") == (
        1,
        "nohype: `nohype config` requires the Python package pydantic\n  hint: run `pip install 'nohype-orchestrator[host]'`\n",
    )


def test_list_of_commands_shows_the_help_of_each() -> None:
    listed = run("--help").output
    for (name,), command in ((path, command) for path, command in commands(nohype) if len(path) == 1):
        assert re.search(rf"^  {name} +{re.escape(command.get_short_help_str(100))}$", listed, re.MULTILINE), name


def test_what_a_manager_says_does_not_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Any program may be listening in a manager's place. Half a surrogate pair can't be printed at all."""
    output.print_table([["NAME", "STATE"], ["a\x1b[2J\u202e\ud800", "run\nning"]])
    output.say("one\n\ttwo\x07", nl=False)
    assert capsys.readouterr().out == ("NAME                  STATE\na\\x1b[2J\\u202e\\ud800  run\\nning\none\n\ttwo\\x07")


def test_unknown_option_of_lab_exec_is_no_command() -> None:
    """It was passed to the lab host as the first word of the command."""
    assert "No such option '--name'" in run("lab", "exec", "--name", "numa", "true", status=2).output


def test_exit_policy_of_a_request() -> None:
    budgets = ("--exit-budget", "application:io=0/s,60/min", "--exit-budget", "application:PF excp=any")
    more = ("--housekeeping", "0-1", "--profile", "tickless", "--exit-action", "kill", "--disengage-after", "90")
    run("guest", "create", "web", "--memory", "1G", "--image", "minimal", *budgets, *more)
    ((_, request),) = FakeClient.asked
    found = parse_guest_request(request)
    assert (found.housekeeping_vcpus, found.profile, found.disengage_after) == ({0, 1}, "tickless", 90)
    assert found.exit_policy
    assert found.exit_policy.action == "kill"
    assert {name: (budget.second, budget.minute) for name, budget in found.exit_policy.application.items()} == {
        "io": (0, 60),
        "PF excp": (None, None),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--exit-action", "kill"), "--exit-action requires --exit-budget"),
        (("--exit-budget", "io=0/s"), "is not CLASS:REASON=LIMIT"),
        (("--exit-budget", "device:io=0/s"), "is not CLASS:REASON=LIMIT"),
        (("--exit-budget", "application:=0/s"), "is not CLASS:REASON=LIMIT"),
        (("--exit-budget", "application:io=0/s", "--exit-budget", "application:io=1/min"), "is given twice"),
    ],
)
def test_wrong_exit_budgets_are_refused(words: tuple[str, ...], message: str) -> None:
    assert message in run("guest", "create", "web", "--memory", "1G", "--image", "minimal", *words, status=2).output


def test_end_of_the_boot_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not yet: the guest is in its boot" in run("guest", "show", "web").output
    monkeypatch.setitem(GUEST, "disengaged", {"time": "2026-11-26T20:00:00.000+00:00", "signal": "call"})
    assert "2026-11-26T20:00:00.000+00:00 (signal: call)" in run("guest", "show", "web").output
    assert run("guest", "disengage", "web").output.startswith("web disengaged: 2026-11-26T20:00:00.000+00:00")
    assert FakeClient.asked[-1] == ("disengage", "web")


def test_exit_policy_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"second": 0, "minute": None}
    policy = {"action": "kill", "application": {"io": budget}, "housekeeping": {"all": {"second": None, "minute": None}}}
    monkeypatch.setitem(GUEST, "exit_policy", policy)
    monkeypatch.setitem(GUEST, "housekeeping_vcpus", "0-1")
    shown = run("guest", "show", "web").output
    assert "kill beyond application:io=0/s housekeeping:all=any" in shown
    assert "vCPUs 0-1" in shown


RUN = "from orchestrator.cli.main import main; main()"


@pytest.mark.parametrize("words", [("--version",), ("completion", "bash"), ("doctor", "--json")], ids=" ".join)
def test_full_output_is_one_message(words: tuple[str, ...]) -> None:
    """Also if Python writes only at its end, as for a short text."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", RUN, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
