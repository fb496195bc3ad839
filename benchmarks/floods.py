"""Measures how long an operator's `plan` takes during several floods by hostile or careless clients.

    .venv/bin/python benchmarks/floods.py [--seconds 5] [--only NAME]

Manager, ledger, interface and TLS are real, in their own process, with the default limits; host and hypervisor are fake. The
floods are processes with a lower priority, as they would run on other machines. The operator is not root, and opens a connection
per request, as `nohype` does. Prints a table. Exits with 1 if a flood makes the 99th percentile of `plan` more than 50 ms longer,
makes a request of the operator fail, makes the manager use more than 200 MB, or logs more than 1,000 lines in 30 s. Requires
root, to run as several users.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import socket
import ssl
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.api.identity import hash_token
from orchestrator.daemon.journal import set_up_logging
from tests.harness.api_server import Authority, serve

OPERATOR, USERS, TENANT_TOKEN = 60_000, (60_001, 60_002, 60_003, 60_004), "tenant-token"
REQUEST = json.dumps({"name": "one", "memory": "64M", "image": "minimal"})
MOST_ADDED, MOST_RSS, MOST_LINES, LOG_PERIOD = 0.050, 200 << 20, 1000, 30.0
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Target:
    socket: Path
    port: int
    ca: Path
    pid: int
    log: Path


@dataclass
class Figures:
    """The result of one flood.

    Attributes:
        sent: requests or connections that the flood made.
        plans: seconds of each of the operator's requests.
        failed: how many of them had no good answer.
        rss: most bytes that the manager had resident.
        lines: how many lines it wrote into its log.
    """

    name: str
    sent: int
    plans: list[float]
    failed: int
    rss: int
    lines: int
    seconds: float


# The manager.


def run_manager(folder: Path, pipe: Connection) -> None:
    """The flooded process; exits with the pipe."""
    raise_priority()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    set_up_logging()
    authority = Authority(folder)
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "access": {"operators": {"users": [str(OPERATOR)]}},
        "tenants": {"acme": {"users": [str(uid) for uid in USERS[:2]]}, "bolt": {"users": [str(uid) for uid in USERS[2:]]}},
        "tokens": {"acme": {"hash": f"sha256:{hash_token(TENANT_TOKEN).hex()}", "role": "tenant", "tenant": "acme"}},
    }
    with serve(folder, settings, metrics=lambda: (b"x" * 2_000_000, "text/plain; version=0.0.4; charset=utf-8")) as served:
        for number in range(1000):
            served.ledger.append_event("refused", "one", f"{number} " + "x" * 500, who="token acme", tenant="acme")
        served.path.chmod(0o666)
        pipe.send((served.path, int(served.url.rpartition(":")[2]), authority.file))
        with suppress(EOFError):
            pipe.recv()


def raise_priority() -> None:
    """Priority above the floods and other programs of the machine."""
    with suppress(PermissionError):
        os.nice(-10)


def read_peak(pid: int) -> int:
    """Peak resident bytes of a process since ``forget_peak`` (proc(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def forget_peak(pid: int) -> None:
    """See proc(5), clear_refs."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# The floods: each makes requests until it is ended, and counts them.


def dial_unix(target: Target) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(target.socket))
    return connection


def dial_tls(target: Target) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", target.port), 20)
    return ssl.create_default_context(cafile=target.ca).wrap_socket(raw, server_hostname="127.0.0.1")


def repeat(target: Target, request: bytes, connections: int, count: Any) -> None:
    """Sends requests on several TLS connections, on each after the last response."""
    opened: list[ssl.SSLSocket | None] = [None] * connections
    while True:
        for number, connection in enumerate(opened):
            try:
                opened[number] = connection = connection or dial_tls(target)
                connection.sendall(request)
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                answer.read()
                count.value += 1
            except (OSError, http.client.HTTPException):
                opened[number] = None


def send_unknown_fields(target: Target, count: Any) -> None:
    body = b"{" + b",".join(b'"%d":[]' % number for number in range(5500)) + b"}"
    head = b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n"
    repeat(target, head % TENANT_TOKEN.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body, 4, count)


def send_upgrades(target: Target, count: Any) -> None:
    fields = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    repeat(target, b"GET /v1/guests HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n", 4, count)


def send_wrong_tokens(target: Target, count: Any) -> None:
    repeat(target, b"GET /v1/guests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer guessed\r\n\r\n", 16, count)


def send_bad_http(target: Target, count: Any) -> None:
    while True:
        with suppress(OSError), dial_tls(target) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            connection.recv(1000)
        count.value += 1


def break_handshakes(target: Target, count: Any) -> None:
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", target.port), 20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.recv(1000)
        count.value += 1


def hold_handshakes(target: Target, count: Any) -> None:
    hold(lambda: socket.create_connection(("127.0.0.1", target.port), 20), 600, count)


def hold_idle(target: Target, count: Any) -> None:
    hold(lambda: dial_unix(target), 127, count)


def hold_many_idle(target: Target, count: Any) -> None:
    hold(lambda: dial_unix(target), 1000, count)


def hold(dial: Callable[[], socket.socket], number: int, count: Any) -> None:
    """Keeps this many connections open and replaces closed ones."""
    held: list[socket.socket] = []
    while True:
        for connection in held[:]:
            with suppress(BlockingIOError, OSError):
                connection.settimeout(0)
                if connection.recv(1) == b"":
                    held.remove(connection)
                    connection.close()
        while len(held) < number:
            with suppress(OSError):
                held.append(dial())
                count.value += 1
        time.sleep(0.05)


def read_nothing(target: Target, count: Any) -> None:
    """Requests the longest responses without reading them; replaces closed connections."""

    def ask() -> socket.socket:
        connection = dial_unix(target)
        connection.sendall(b"GET /v1/events?after=0&limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection

    hold(ask, 100, count)


FLOODS: dict[str, Sequence[tuple[int, Callable[[Target, Any], None]]]] = {
    "nothing": (),
    "bodies of 5,500 unknown names (a tenant, 4 connections)": ((0, send_unknown_fields),),
    "127 idle connections of each of 4 users": tuple((uid, hold_idle) for uid in USERS),
    "1,000 idle connections of root": ((0, hold_many_idle),),
    "600 TLS handshakes that are not begun": ((0, hold_handshakes),),
    "websocket upgrades on TLS without credentials": ((0, send_upgrades),),
    "bad HTTP on TLS without credentials": ((0, send_bad_http),),
    "no TLS on the TLS port": ((0, break_handshakes),),
    "wrong tokens, 16 connections": ((0, send_wrong_tokens),),
    "100 unread answers of 0.7 MB of each of 2 tenants": ((USERS[0], read_nothing), (USERS[2], read_nothing)),
}
"""By name: the processes of a flood, each as a user."""


def run_as(uid: int, work: Callable[..., None], *arguments: object, first: bool = False) -> None:
    """Runs work as a user; ``first``: with a higher priority."""
    if first:
        raise_priority()
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    with suppress(KeyboardInterrupt):
        work(*arguments)


@contextmanager
def flooding(target: Target, name: str) -> Iterator[list[Any]]:
    """Runs the flood during the block; yields its counters."""
    processes: list[ForkProcess] = []
    counts = []
    try:
        for uid, work in FLOODS[name]:
            counts.append(_FORK.Value("i", 0, lock=False))
            processes.append(_FORK.Process(target=run_as, args=(uid, work, target, counts[-1]), daemon=True))
            processes[-1].start()
        yield counts
    finally:
        for process in processes:
            process.kill()
            process.join()


# The others.


def ask_plans(target: Target, seconds: float, pipe: Connection) -> None:
    """An operator's requests, one after the other, with the pauses of a person or a script."""
    took: list[float] = []
    failed, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        try:
            connection = http.client.HTTPConnection("x")
            connection.sock = dial_unix(target)
            connection.request("POST", "/v1/plans", REQUEST, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            failed += answer.status != 200
            connection.close()
        except (OSError, http.client.HTTPException):
            failed += 1
        took.append(time.perf_counter() - began)
        time.sleep(0.01)
    pipe.send((took, failed))


def measure(target: Target, name: str, seconds: float) -> Figures:
    forget_peak(target.pid)
    before = len(target.log.read_bytes().splitlines())
    ours, theirs = _FORK.Pipe()
    with flooding(target, name) as counts:
        time.sleep(min(1.0, seconds / 4))  # until the flood is running
        asking = _FORK.Process(target=run_as, args=(OPERATOR, ask_plans, target, seconds, theirs), kwargs={"first": True})
        asking.start()
        plans, failed = ours.recv()
        asking.join()
        sent = sum(count.value for count in counts)
    lines = len(target.log.read_bytes().splitlines()) - before
    return Figures(name, sent, plans, failed, read_peak(target.pid), lines, seconds)


def find_p99(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(seconds)
    return ordered[max(0, -(-len(ordered) * 99 // 100) - 1)]


def find_faults(figures: Figures, quiet: Figures) -> list[str]:
    """Reasons why a flood affects others too much."""
    faults = []
    added = find_p99(figures.plans) - find_p99(quiet.plans)
    if added > MOST_ADDED:
        faults.append(f"{figures.name}: p99 of plan is {added * 1e3:.0f} ms longer")
    if figures.failed:
        faults.append(f"{figures.name}: {figures.failed} of the operator's requests failed")
    if figures.rss > MOST_RSS:
        faults.append(f"{figures.name}: {figures.rss >> 20} MB resident")
    if figures.lines * LOG_PERIOD / max(LOG_PERIOD, figures.seconds) > MOST_LINES:
        faults.append(f"{figures.name}: {figures.lines} lines in the log")
    return faults


def show(figures: Figures) -> str:
    median, p99, most = statistics.median(figures.plans), find_p99(figures.plans), max(figures.plans)
    plan = "".join(f"{one * 1e3:>8.1f}" for one in (median, p99, most))
    rest = f"{figures.failed:>7}{figures.rss >> 20:>8}{figures.lines:>8}"
    return f"{figures.name:<56}{figures.sent:>9}{len(figures.plans):>7}{plan}{rest}"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="per flood")
    parser.add_argument("--only", default="", help="floods whose name contains this")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="floods-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        ours, theirs = _FORK.Pipe()
        manager = _FORK.Process(target=run_manager, args=(folder, theirs))
        manager.start()
        theirs.close()
        stack.callback(manager.join)
        stack.callback(ours.close)
        target = Target(*ours.recv(), manager.pid or 0, folder / "log")
        target.ca.chmod(0o644)
        print(f"{'':<56}{'sent':>9}{'plans':>7}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}{'failed':>7}{'RSS MB':>8}{'log':>8}")
        quiet = measure(target, "nothing", arguments.seconds)
        print(show(quiet), flush=True)
        faults: list[str] = []
        for flood in FLOODS:
            if flood != "nothing" and arguments.only in flood:
                figures = measure(target, flood, arguments.seconds)
                print(show(figures), flush=True)
                faults += find_faults(figures, quiet)
    for fault in faults:
        print(f"FAULT: {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
