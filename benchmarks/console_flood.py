"""Measures how a tenant's console traffic delays other clients, within the manager's default limits.

    .venv/bin/python benchmarks/console_flood.py [--seconds 10]

A manager in its own process serves its interface on a Unix socket and over TLS, on a fake host. A tenant's guest has printed
2 MiB of noise, or 300 MB if logs are unlimited. Over TLS the tenant polls `ready` on four connections at its rate limit, keeps
the maximum number of waits open, and sends requests on a hundred more connections without reading the responses. At the same time
root requests a guest and a plan in turn. The tenant pauses and continues every second.

Prints per kind of noise the duration of root's requests with and without the tenant's, and the manager's peak resident memory.
Exits with 1 if the 99th percentile rises by more than 50 ms, if the manager used more than 200 MB, or after an invalid response.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.api.identity import hash_token
from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import Authority, build_unverified_context, serve
from tests.harness.crash import World

SERVER = Server(cores=128, threads=2, nodes=2, vfs=64, pages=16384)
DELAY, MEMORY = 50.0, 200
"""Milliseconds, and MB."""
POLLS, UNREAD, WAITS = 4, 100, 12
PAUSE, PAUSE_UNREAD = 0.2, 0.04
"""Seconds between the polls of a connection, and between requests without reading: about 45 per second, of 50 allowed."""
MIB = 1 << 20
NOISES = {
    "2 MiB that is no UTF-8": (b"\xff", 2 * MIB),
    "2 MiB of controls": (b"\x01", 2 * MIB),
    "2 MiB of lines of the protocol": (b"nohype: x\n", 2 * MIB),
    "300 MB that is no UTF-8": (b"\xff", 300_000_000),
    "300 MB of lines of the protocol": (b"nohype: x\n", 300_000_000),
}


@dataclass
class Times:
    """Durations of requests for a guest and for a plan, in seconds."""

    guests: list[float] = field(default_factory=list)
    plans: list[float] = field(default_factory=list)


@dataclass
class Figures:
    """The result of one kind of noise.

    Attributes:
        quiet, flooded: while the tenant paused, and while it did not.
        peak: peak resident memory of the manager, in MB.
        polls: responses to the tenant.
        wrong: invalid responses to root.
    """

    quiet: Times = field(default_factory=Times)
    flooded: Times = field(default_factory=Times)
    peak: float = 0.0
    polls: int = 0
    wrong: list[str] = field(default_factory=list)


def play_manager(folder: Path, certificate: Path, key: Path, pipe: Connection) -> None:
    """The manager's process: sends its address, then after each "peak" its peak memory since the last one, in MB."""
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "tenants": {"acme": {}},
        "tokens": {"acme": {"hash": f"sha256:{hash_token('acme').hex()}", "role": "tenant", "tenant": "acme"}},
    }
    with serve(folder, settings, world=World(folder / "world", SERVER)) as served:
        pipe.send((served.path, served.url))
        while pipe.recv() == "peak":
            status = Path("/proc/self/status").read_text()
            match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
            assert match
            pipe.send(int(match[1]) / 1024)
            Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)


def go_first(steps: int) -> None:
    """Raises the priority, if allowed, above other programs on this machine, whose load is not measured."""
    with suppress(PermissionError):
        os.nice(-steps)


def connect(url: str) -> socket.socket:
    """A connection of the tenant."""
    raw = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), 30)
    return build_unverified_context().wrap_socket(raw)


def ask(connection: socket.socket, target: str) -> None:
    """Sends a request without reading the response."""
    connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer acme\r\n\r\n".encode())


class Tenant:
    """The tenant's process.

    Args:
        url: of the manager.
        pipe: receives 1 to continue, 0 to pause, and None to exit; replies with the number of completed polls.
    """

    def __init__(self, url: str, pipe: Connection) -> None:
        go_first(5)
        self._url, self._pipe = url, pipe
        self._active, self._ends, self._polls = threading.Event(), threading.Event(), 0
        self._waiting: list[socket.socket] = []

    def play(self) -> None:
        threads = [threading.Thread(target=self._poll) for _ in range(POLLS)] + [threading.Thread(target=self._ask_unread)]
        for thread in threads:
            thread.start()
        while (command := self._pipe.recv()) is not None:
            self._wait() if command else self._hang_up()
            (self._active.set if command else self._active.clear)()
            self._pipe.send(self._polls)
        self._ends.set()
        self._active.set()
        for thread in threads:
            thread.join()

    def _wait(self) -> None:
        self._waiting = [connect(self._url) for _ in range(WAITS)]
        for connection in self._waiting:
            ask(connection, "/v1/guests/noisy/ready?timeout=3600")

    def _hang_up(self) -> None:
        for connection in self._waiting:
            connection.close()

    def _poll(self) -> None:
        """With a time-out so short that each response contains the tail of the console."""
        with connect(self._url) as connection:
            while not self._ends.wait(PAUSE) and self._active.wait():
                ask(connection, "/v1/guests/noisy/ready?timeout=0.001")
                self._polls += connection.recv(1 << 20).startswith(b"HTTP/1.1 409")

    def _ask_unread(self) -> None:
        for connection in itertools.cycle([connect(self._url) for _ in range(UNREAD)]):
            if self._ends.wait(PAUSE_UNREAD) or not self._active.wait():
                break
            with suppress(OSError):
                ask(connection, "/v1/guests/noisy/ready?timeout=0.001")


def play_tenant(url: str, pipe: Connection) -> None:
    Tenant(url, pipe).play()


def measure(path: Path, seconds: float, times: Times) -> list[str]:
    """Root requests a guest and a plan in turn; returns the errors."""
    client, request, wrong = Client(path), {"name": "other", "memory": "256M", "image": IMAGE}, []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for taken, work in ((times.guests, lambda: client.guest("quiet")), (times.plans, lambda: client.plan(request))):
            began = time.perf_counter()
            try:
                work()
            except OrchestratorError as error:
                wrong.append(f"{error.code}: {error.message}")
            taken.append(time.perf_counter() - began)
        time.sleep(0.005)
    return wrong


def find_log(world: Path) -> Path:
    """The console log of the noisy guest."""
    return next((world / "consoles").glob("**/noisy*.log"), world / "consoles" / "noisy.log")


def print_noise(log: Path, noise: bytes, size: int) -> None:
    piece = noise * (MIB // len(noise))
    with log.open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A process with a pipe; None makes it exit."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    one = context.Process(target=target, args=(*arguments, theirs))
    one.start()
    try:
        yield ours
        ours.send(None)
    finally:
        one.join(30)
        if one.is_alive():
            one.kill()


def run(folder: Path, seconds: float) -> dict[str, Figures]:
    """All kinds of noise."""
    go_first(10)
    authority, found = Authority(folder), {}
    with process(play_manager, folder, *authority.issue("manager", addresses=("127.0.0.1",))) as manager:
        path, url = manager.recv()
        Client(path).create({"name": "quiet", "memory": "256M", "image": IMAGE})
        Client(url, token="acme", ca=authority.file).create({"name": "noisy", "memory": "256M", "image": IMAGE})
        with process(play_tenant, url) as tenant:
            measure(path, 3, Times())  # until all its connections are open
            for name, noise in NOISES.items():
                print_noise(find_log(folder / "world"), *noise)
                found[name] = flood(path, seconds, tenant)
                manager.send("peak")
                found[name].peak = manager.recv()
    return found


def flood(path: Path, seconds: float, tenant: Connection) -> Figures:
    """Alternates seconds without and with noise; ``seconds`` of each."""
    figures, polls = Figures(), [0]
    for _ in range(round(seconds)):
        for active, times in ((0, figures.quiet), (1, figures.flooded)):
            tenant.send(active)
            polls.append(tenant.recv())
            figures.wrong += measure(path, 1, times)
    tenant.send(0)
    figures.polls = tenant.recv() - polls[1]
    return figures


def find_p99(seconds: Sequence[float]) -> float:
    """The 99th percentile in ms."""
    ordered = sorted(seconds)
    return ordered[max(0, -(-len(ordered) * 99 // 100) - 1)] * 1e3


def describe(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum in ms."""
    return f"median {statistics.median(seconds) * 1e3:.1f}, p99 {find_p99(seconds):.1f}, max {max(seconds) * 1e3:.1f} ms"


def find_faults(name: str, figures: Figures) -> list[str]:
    """Reasons why the run failed."""
    faults = [f"wrong answer: {wrong}" for wrong in figures.wrong[:3]]
    for what, without, flooded in (
        ("GET", figures.quiet.guests, figures.flooded.guests),
        ("plan", figures.quiet.plans, figures.flooded.plans),
    ):
        if (more := find_p99(flooded) - find_p99(without)) > DELAY:
            faults.append(f"the 99th percentile of {what} rises by {more:.0f} ms, more than {DELAY:g}")
    if figures.peak > MEMORY:
        faults.append(f"the manager had {figures.peak:.0f} MB resident, more than {MEMORY}")
    if not figures.polls:
        faults.append("the tenant got no answer, so nothing was flooded")
    return [f"{name}: {fault}" for fault in faults]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="with and without noise, per kind")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="console-flood-") as folder:
        found = run(Path(folder), arguments.seconds)
    faults = []
    for name, figures in found.items():
        print(f"{name}: {figures.polls} polls completed, peak RSS of the manager {figures.peak:.0f} MB")
        for what, times in (("without the flood", figures.quiet), ("with it", figures.flooded)):
            print(f"  {what}: GET {describe(times.guests)}; plan {describe(times.plans)}; {len(times.plans)} of each")
        faults += find_faults(name, figures)
    for fault in faults:
        print(f"FAULT: {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
