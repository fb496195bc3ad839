"""The real application on a real Unix socket, with the real ledger and a fake host: what it answers, and how errors look.

libvirt is its own test driver, with no guests in it; nothing here starts one or changes a host. The lab tests do.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner

from orchestrator.api.app import build_app
from orchestrator.api.client import Client
from orchestrator.cli.main import nohype
from orchestrator.daemon import notify_systemd, open_socket
from orchestrator.errors import HostError, OrchestratorError
from orchestrator.hypervisor import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.lifecycle import HOST, SystemManager
from orchestrator.plan import Policy
from orchestrator.proof import Proof, Verdict
from orchestrator.values import CpuSet, Size
from tests.fakeroot import load_host

EMPTY_NODE = "<node><cpu><arch>x86_64</arch></cpu></node>"
PROOF = Proof("core-smt", "guest1", Verdict.FAIL, 1, "CPUs shared on a core", ("CPU 3 is shared",))


FAULT = 13
"""So many frames make the audit meet a fault of ours."""


def build_manager(folder: Path, node: Path, ledger: Ledger) -> SystemManager:
    return SystemManager(
        load_host(folder / "host", "numa"), Hypervisor(f"test://{node}"), ledger,
        Policy(CpuSet.parse("0-1"), ("nic0",), Size.parse("2M")), images=folder / "images", consoles=folder,
    )  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    node = tmp_path / "node.xml"
    node.write_text(EMPTY_NODE)
    image = tmp_path / "images" / "minimal"
    image.mkdir(parents=True)
    for name in ("vmlinuz", "initrd"):
        (image / name).write_text("")
    fields = {"name": "minimal", "cmdline": "quiet", "console": "nohype-1", "kernel_version": "6.12", "hash": "0"}
    (image / "image.json").write_text(json.dumps(fields))
    manager = build_manager(tmp_path, node, Ledger(tmp_path / "ledger.sqlite"))
    path = tmp_path / "manager.sock"

    def audit(frames: int) -> tuple[Proof, ...]:
        return (PROOF,) if frames != FAULT else (PROOF,) * (1 // 0)

    server = uvicorn.Server(uvicorn.Config(build_app(manager, audit), log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [open_socket(path)]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield path
    server.should_exit = True
    thread.join()


def test_survey(served: Path) -> None:
    found = Client(served).survey()
    assert [core["cpus"] for core in found["cores"]] == ["0-1", "2-3", "4-5", "6-7"]
    assert found["pfs"][0]["interface"] == "nic0"


def test_a_plan_claims_nothing(served: Path) -> None:
    request = {"name": "one", "memory": "256M", "image": "minimal", "address": "10.9.0.1/24"}
    first, again = Client(served).plan(request), Client(served).plan(request)
    assert first == again
    assert (first["state"], first["cpus"], first["node"], first["huge_pages"]) == ("planned", [2, 3], 0, 128)
    assert first["cmdline"] == "nohype.address=10.9.0.1/24"
    assert Client(served).guests() == []


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"name": "No_Name"}, "bad-request", "not a guest name"),
        ({"name": "host"}, "bad-request", "the host itself"),
        ({"memory": "3M"}, "bad-request", "multiple of the huge page size"),
        ({"cores": True}, "bad-request", "cores"),
        ({"cores": "1"}, "bad-request", "cores"),
        ({"color": "red"}, "bad-request", "color"),
        ({"cmdline": "a\nb"}, "bad-request", "one line"),
        ({"image": "nix"}, "not-found", "there are minimal"),
        ({"cores": 7}, "no-room", "7 are wanted"),
    ],
)
def test_a_wrong_request_is_one_clear_error(served: Path, change: dict[str, object], code: str, said: str) -> None:
    with pytest.raises(OrchestratorError, match=said) as caught:
        Client(served).plan({"name": "one", "memory": "256M", "image": "minimal", **change})
    assert caught.value.code == code


def test_a_guest_that_is_not_there(served: Path) -> None:
    for ask in (Client(served).guest, Client(served).stop, lambda name: Client(served).tell(name, "mac", 1)):
        with pytest.raises(OrchestratorError, match="no guest named nobody") as caught:
            ask("nobody")
        assert caught.value.code == "not-found"


def test_a_line_for_the_console_is_one_line(served: Path) -> None:
    with pytest.raises(OrchestratorError, match="line") as caught:
        Client(served).tell("nobody", "mac\nhalt", 1)
    assert caught.value.code == "bad-request"


def test_commands_show_what_the_manager_says(served: Path) -> None:
    run = CliRunner().invoke
    assert "no guests" in run(nohype, ["guest", "list", "--socket", str(served)]).output
    assert "0000:" in run(nohype, ["survey", "--socket", str(served)]).output
    audit = run(nohype, ["audit", "--socket", str(served)], standalone_mode=False)
    assert audit.return_value == 1
    assert "CPU 3 is shared" in audit.output
    plan = run(nohype, ["guest", "create", "one", "--memory", "256M", "--image", "minimal", "--plan", "--socket", str(served)])
    assert "planned" in plan.output


def test_a_second_manager_is_refused(served: Path) -> None:
    with pytest.raises(HostError, match="another manager serves"):
        open_socket(served)


def test_the_socket_is_not_for_everybody(served: Path) -> None:
    assert served.stat().st_mode & 0o777 == 0o660


def test_a_socket_left_by_a_killed_manager_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    open_socket(path).close()
    open_socket(path).close()


def test_a_fault_of_the_manager_is_one_clear_error(served: Path) -> None:
    with pytest.raises(OrchestratorError, match="the manager failed: 500") as caught:
        Client(served).audit(FAULT)
    assert "journalctl" in caught.value.hint


def test_an_empty_name_names_no_guest(served: Path) -> None:
    for ask in (Client(served).guest, Client(served).stop):
        with pytest.raises(OrchestratorError):
            ask("")


def test_a_manager_that_still_starts_is_not_replaced(tmp_path: Path) -> None:
    with open_socket(tmp_path / "early.sock"), pytest.raises(HostError, match="another manager serves"):
        open_socket(tmp_path / "early.sock")


def test_what_cannot_be_undone_does_not_keep_the_manager_from_starting(tmp_path: Path) -> None:
    node = tmp_path / "node.xml"
    node.write_text(EMPTY_NODE)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(HOST, "numvfs", {"pf": "0000:7f:00.0"})
        build_manager(tmp_path, node, ledger).recover()
        assert len(ledger.pending(HOST)) == 1


def test_no_manager_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match="does not answer") as caught:
        Client(tmp_path / "none.sock").guests()
    assert "systemctl status nohyped" in caught.value.hint


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify_systemd("READY=1")
        assert receiver.recv(64) == b"READY=1"
