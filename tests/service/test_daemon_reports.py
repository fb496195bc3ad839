"""How the manager is watched, with the real ledger, a fake host and libvirt's test driver."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from orchestrator.api.tickless import TicklessServer
from orchestrator.daemon import main as daemon
from orchestrator.daemon.main import open_listener
from orchestrator.daemon.monitoring import build_metrics, record_audits, start_heartbeat, status_line
from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.locks import WatchedLock
from orchestrator.metrics.counters import Counters
from orchestrator.model.plan import Policy
from orchestrator.model.proof import Proof, Verdict
from orchestrator.values import CpuSet, Size
from tests.fakes.root import load_host
from tests.harness.crash import World

POLICY = Policy(CpuSet.parse("0-1"), ("nic0",), Size.parse("2M"))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as found:
        yield found


def test_socket_is_created_without_a_socket_unit(tmp_path: Path) -> None:
    path = tmp_path / "manager.sock"
    with open_listener(path) as listener:
        assert listener.getsockname() == str(path)
        with pytest.raises(HostError, match="another manager listens on"):
            open_listener(path)


def test_the_socket_units_socket_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as given:
        monkeypatch.setattr(daemon, "take_activation_sockets", lambda: {"nohyped": [given]})
        assert open_listener(tmp_path / "unused") is given
    assert not (tmp_path / "unused").exists()


def test_metrics_of_a_real_ledger_and_a_host(tmp_path: Path, ledger: Ledger) -> None:
    node = tmp_path / "node.xml"
    node.write_text("<node><cpu><arch>x86_64</arch></cpu></node>")
    host = load_host(tmp_path / "host", "numa")
    seen = Counters()
    page, kind = build_metrics(lambda: read_topology(host), ledger, Hypervisor(f"test://{node}"), POLICY, seen).render()
    assert kind.startswith("text/plain; version=0.0.4")
    assert b"nohype_claims_total 0.0" in page
    assert b'nohype_cores{node="1",state="free"} 2.0' in page
    assert b'nohype_scrape_failures_total{source="survey"} 0.0' in page


def test_an_audit_is_remembered() -> None:
    proof = Proof("vepa", "host", Verdict.FAIL, 1, "frames", ())
    seen = Counters()
    recorded = record_audits(lambda frames, host_only: (proof,) * frames, seen)
    assert recorded(2, host_only=False) == (proof, proof)
    age = next(value for name, _, value in seen.samples() if name == "nohype_audit_age_seconds")
    assert recorded(1, host_only=True) == (proof,), "is not recorded: the verdicts of guests would look new"
    assert age < next(value for name, _, value in seen.samples() if name == "nohype_audit_age_seconds")
    assert ("nohype_proofs", ("vepa", "fail"), 2) in list(seen.samples())


def test_the_line_for_systemctl_status(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert status_line(ledger) == "0 guests, 0 of them running"
    path.rename(away := path.with_name("away"))
    try:
        gone = f"{path} was deleted or replaced"
        assert status_line(ledger) == f"0 guests, 0 of them running; guests cannot be created or started: {gone}"
    finally:
        away.rename(path)


def test_no_heartbeat_without_a_watchdog(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert start_heartbeat(TicklessServer(uvicorn.Config("none:none", log_config=None)), ledger, lambda _limit: None) is None


def test_watchdog_not_notified_when_ledger_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        ledger = Ledger(tmp_path / "other.sqlite")
        lock = WatchedLock()
        heartbeat = start_heartbeat(
            TicklessServer(uvicorn.Config("none:none", log_config=None)), ledger, lock.raise_if_held_longer
        )
        assert heartbeat is not None
        assert systemd.recv(256).startswith(b"WATCHDOG=1\nSTATUS=0 guests")
        ledger.close()
        # What was on its way when the ledger closed.
        systemd.settimeout(0.4)
        told = 0
        with contextlib.suppress(TimeoutError):
            while systemd.recv(256) and told < 10:
                told += 1
        assert told <= 1
        heartbeat.stop()


def test_a_write_or_a_claim_that_hangs_is_noticed(tmp_path: Path) -> None:
    """Who only reads the ledger still gets an answer then."""
    world = World(tmp_path)
    manager, ledger = world.open_manager()
    go_on = threading.Event()
    world.trace = lambda _statement: go_on.wait(30)
    writer = threading.Thread(target=ledger.append_event, args=("cleared", "host", ""))
    writer.start()
    with pytest.raises(OrchestratorError, match="lock held for"):  # noqa: PT012
        while writer.is_alive():
            ledger.raise_if_stalled(0.01)
    go_on.set()
    writer.join()
    ledger.raise_if_stalled(0.01)

    def check_held() -> None:
        time.sleep(0.05)
        with pytest.raises(OrchestratorError, match="lock held for"):
            manager.raise_if_stalled(0.01)

    manager.raise_if_stalled(0.01)
    manager.allocator.lock.run(check_held)
    manager.raise_if_stalled(0.01)
    with manager.host_setup.lock:
        check_held()
    manager.raise_if_stalled(0.01)
