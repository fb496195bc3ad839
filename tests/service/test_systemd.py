"""What systemd and the manager say to each other, over real sockets and descriptors; and that an idle server does nothing."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from orchestrator.api.tickless import TicklessServer
from orchestrator.daemon.systemd import notify_systemd, read_watchdog, take_activation_sockets
from orchestrator.daemon.watchdog import Heartbeat
from orchestrator.errors import OrchestratorError
from orchestrator.locks import WatchedLock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The next notification; empty if none arrives within the given seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def receive(seconds: float = 30) -> str:
            receiver.settimeout(seconds)
            try:
                return receiver.recv(4096).decode()
            except TimeoutError:
                return ""

        yield receive


def test_notification_reaches_systemd(systemd: Callable[..., str]) -> None:
    notify_systemd("READY=1")
    assert systemd() == "READY=1"


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0nohype-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@nohype-{os.getpid()}")
        notify_systemd("STOPPING=1")
        assert receiver.recv(64) == b"STOPPING=1"


def test_missing_notify_socket_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    notify_systemd("READY=1")


def test_notification_without_a_free_descriptor_is_ignored(systemd: Callable[..., str]) -> None:
    lack = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); notify_systemd('WATCHDOG=1')"
    text = f"from orchestrator.daemon.systemd import notify_systemd; {lack}; print('went on')"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout, systemd(0.3)) == ("went on\n", "")


CHILD = """
import json, os, sys
os.environ["LISTEN_PID"] = os.environ["LISTEN_PID"] or str(os.getpid())
from orchestrator.daemon.systemd import take_activation_sockets
found = take_activation_sockets()
names = {name: [one.getsockname() for one in sockets] for name, sockets in found.items()}
inherited = [one.get_inheritable() for sockets in found.values() for one in sockets]
print(json.dumps([names, inherited, sorted(key for key in os.environ if key.startswith("LISTEN_"))]))
"""


def activate(tmp_path: Path, *, pid: str = "", count: str = "2", names: str = "nohyped:other") -> list[object]:
    """Starts a program as a socket unit does: its descriptors from 3 on."""
    listeners = []
    for name in ("one", "two"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name))
        listener.listen()
        listeners.append(listener)
    env = {**os.environ, "LISTEN_PID": pid, "LISTEN_FDS": count, "LISTEN_FDNAMES": names, "PYTHONPATH": str(ROOT)}
    three, four = (os.dup(listener.fileno()) for listener in listeners)

    # A shell puts them where systemd puts them.
    line = f'exec {sys.executable} -c "$0" 3<&{three} 4<&{four} {three}<&- {four}<&-'
    done = subprocess.run(
        ["bash", "-c", line, CHILD], pass_fds=(three, four), env=env, capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


def test_sockets_of_a_socket_unit_are_taken(tmp_path: Path) -> None:
    names, inherited, left = activate(tmp_path)
    assert names == {"nohyped": [str(tmp_path / "one")], "other": [str(tmp_path / "two")]}
    assert inherited == [False, False]
    assert left == []


def test_sockets_without_names(tmp_path: Path) -> None:
    names, _, _ = activate(tmp_path, names="")
    assert names == {"unknown": [str(tmp_path / "one"), str(tmp_path / "two")]}


@pytest.mark.parametrize(("pid", "count"), [("1", "2"), ("", ""), ("", "x"), ("", "-1")])
def test_sockets_of_another_process_are_not_taken(tmp_path: Path, pid: str, count: str) -> None:
    names, _, left = activate(tmp_path, pid=pid, count=count)
    assert names == {}
    assert left == []


def test_without_a_socket_unit_there_is_none() -> None:
    assert take_activation_sockets({}) == {}


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "90000000"}, 90.0),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": str(os.getpid())}, 90.0),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdogs_time(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], seconds: float | None) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_watchdog() == seconds


def test_watchdog_is_notified_with_a_status(systemd: Callable[..., str]) -> None:
    assert Heartbeat({"ledger": lambda: None}, 10, lambda: "2 guests\nrun").check_and_notify()
    assert systemd() == "WATCHDOG=1\nSTATUS=2 guests run"


def test_watchdog_not_notified_when_a_check_fails(systemd: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise OrchestratorError("the disk is full")

    assert not Heartbeat({"server": lambda: None, "ledger": broken}, 10).check_and_notify()
    assert systemd(0.3) == ""
    assert "watchdog not notified: ledger: the disk is full" in caplog.text


def test_watchdog_not_notified_while_a_check_hangs(systemd: Callable[..., str]) -> None:
    hangs = threading.Event()
    heartbeat = Heartbeat({"ledger": lambda: hangs.wait(30)}, 0.05)
    heartbeat.start()
    assert systemd(0.3) == ""
    hangs.set()
    assert systemd().startswith("WATCHDOG=1")
    heartbeat.stop()


def test_watchdog_is_notified_when_the_status_fails(systemd: Callable[..., str]) -> None:
    assert Heartbeat({}, 10, lambda: str(1 // 0)).check_and_notify()
    assert "WATCHDOG=1" in systemd()


def test_three_notifications_per_watchdog_timeout(systemd: Callable[..., str]) -> None:
    heartbeat = Heartbeat.for_watchdog({}, 0.6)
    assert heartbeat.interval == pytest.approx(0.2)
    heartbeat.start()
    assert systemd()
    assert systemd()
    heartbeat.stop()


def test_lock_held_too_long_raises() -> None:
    lock = WatchedLock()
    lock.raise_if_held_longer(0.01)
    with lock:
        time.sleep(0.05)
        with pytest.raises(OrchestratorError, match="lock held for"):
            lock.raise_if_held_longer(0.01)
    lock.raise_if_held_longer(0.01)
    assert lock.held_seconds == 0


def test_lock_is_reentrant() -> None:
    lock = WatchedLock()
    with lock:
        time.sleep(0.02)
        with lock:
            pass
        assert lock.held_seconds >= 0.02
    assert lock.held_seconds == 0


GO_ON = threading.Event()


async def hello(scope: dict[str, object], receive: object, send: Callable[..., Awaitable[None]]) -> None:
    if scope["path"] == "/block":
        GO_ON.wait(30)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


class Running:
    """A server in a thread of its own."""

    def __init__(self, *told: Callable[[], object]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(hello, log_config=None, lifespan="off", ws="none")  # type: ignore[arg-type]
        self.server = TicklessServer(config, *told)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)

    def ask(self, path: str = "/") -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        assert response.read() == b"hi"
        connection.close()
        return str(response.getheader("date"))

    def wakeups(self, seconds: float) -> int:
        before = self.count()
        time.sleep(seconds)
        return self.count() - before

    def count(self) -> int:
        status = Path(f"/proc/self/task/{self.thread.native_id}/status").read_text()
        return int(status.split("voluntary_ctxt_switches:")[1].split()[0])

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.end()


def test_an_idle_server_does_not_wake_up(running: Running) -> None:
    """uvicorn's own main loop would ten times a second."""
    running.ask()
    # The end of the connection may be served late. One that ticks has no such second.
    assert any(running.wakeups(1) == 0 for _ in range(30))


def test_each_answer_has_its_own_date(running: Running) -> None:
    first = running.ask()
    time.sleep(1.1)
    assert first.endswith("GMT")
    assert running.ask() != first


def test_an_event_loop_is_seen_to_hang(running: Running) -> None:
    running.server.check(30)
    asking = threading.Thread(target=running.ask, args=("/block",))
    asking.start()
    try:
        with pytest.raises(OrchestratorError, match="event loop has not responded"):  # noqa: PT012
            while asking.is_alive():
                running.server.check(0.1)
    finally:
        GO_ON.set()
        asking.join()
        GO_ON.clear()
    running.server.check(30)


def test_an_event_loop_that_has_ended_does_not_hang() -> None:
    running = Running()
    running.end()
    running.server.check(0.1)


def test_systemd_is_notified_of_start_and_stop(systemd: Callable[..., str]) -> None:
    running = Running(lambda: notify_systemd("READY=1"), lambda: notify_systemd("STOPPING=1"))
    assert systemd() == "READY=1"
    running.end()
    assert systemd() == "STOPPING=1"


MAIN = """
import socket, uvicorn
from orchestrator.api.tickless import TicklessServer
from tests.service.test_systemd import hello
server = TicklessServer(uvicorn.Config(hello, log_config=None, lifespan="off", ws="none"), lambda: print("ready", flush=True))
server.run(sockets=[socket.create_server(("127.0.0.1", 0))])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server(number: signal.Signals) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", MAIN], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(timeout=60) in (-number, 1)
