"""How many guests a second can be planned, claimed and released again, by one caller and by many at the same time.

    .venv/bin/python benchmarks/claim_cycles.py [--cycles 2000] [--threads 1 64] [--cores 128] [--http] [--no-fsync] [--profile]

The manager, the ledger (on the disk of the working folder) and the HTTP interface are real; the host is fake and half full. A
cycle is `create` and `delete` of a guest of one core. Nothing is started: a claim is planned, written, logged and released, as a
scheduler's reservation is. With --http the callers are clients in two processes of their own, with a new connection per request;
otherwise they are threads that call the manager's methods. Prints cycles per second, what a caller waits for create and delete,
and the processor time of this process per cycle, which depends least on other load.
"""

import argparse
import cProfile
import multiprocessing
import os
import pstats
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.client.client import Client
from orchestrator.guests.service import GuestService
from orchestrator.model.access import OPERATOR
from orchestrator.model.request import GuestRequest
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import serve
from tests.harness.crash import World

SETTINGS = {"limits": {"rate": 1e6, "burst": 1_000_000, "concurrent": 1000}}
PROCESSES = 2
CORES_PER_NODE = 64


@dataclass
class Figures:
    """Seconds that each call took, and the whole run; and processor time of the manager's process."""

    create: list[float] = field(default_factory=list)
    delete: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    cpu: float = 0.0

    def describe(self) -> str:
        """Cycles per second; median, 99th percentile and maximum of each call in ms."""
        parts = [f"{len(self.create) / self.elapsed:6.0f} cycles/s"]
        for name, seconds in (("create", self.create), ("delete", self.delete)):
            p99 = statistics.quantiles(seconds, n=100)[98]
            figures = f"{statistics.median(seconds) * 1e3:6.1f} / {p99 * 1e3:6.1f} / {max(seconds) * 1e3:6.1f}"
            parts.append(f"{name} median/p99/max {figures} ms")
        parts.append(f"processor {self.cpu / len(self.create) * 1e3:.2f} ms per cycle")
        return ", ".join(parts)


def make_server(cores: int) -> Server:
    """With a VF for each core."""
    nodes = max(1, cores // CORES_PER_NODE)
    return Server(cores=cores, threads=2, nodes=nodes, vfs=min(CORES_PER_NODE, cores), pages=64 * cores)


class NoChanges:
    """A core manager of a guest for which nothing was changed on the host."""

    def clean_up(self) -> tuple[str, ...]:
        """Finds nothing left."""
        return ()


def skip_host_changes(manager: GuestService) -> None:
    """From now on a guest is claimed and released, and nothing is changed on the host for it."""
    transitions: Any = manager.transitions
    transitions.core_manager = lambda _claim: NoChanges()
    transitions.launch = lambda claim, _caller, _changed=(): claim


def fill(manager: GuestService, cores: int) -> None:
    """Half of the host, with guests of two cores."""
    for number in range(cores // 4):
        manager.create(OPERATOR, GuestRequest(name=f"old{number}", cores=2, memory="64M", image=IMAGE))


def run_cycles(name: str, cycles: int, create: Callable[[str], object], delete: Callable[[str], object]) -> Figures:
    """One caller."""
    figures = Figures()
    for _ in range(cycles):
        begin = time.perf_counter()
        create(name)
        created = time.perf_counter()
        delete(name)
        figures.create.append(created - begin)
        figures.delete.append(time.perf_counter() - created)
    return figures


def run_threads(first: int, threads: int, cycles: int, make_calls: Callable[[], Sequence[Callable[[str], object]]]) -> Figures:
    """Callers at the same time, each with a guest of its own; raises what any of them raised."""
    total, errors = Figures(), []

    def work(number: int) -> None:
        create, delete = make_calls()
        try:
            found = run_cycles(f"guest{number}", cycles, create, delete)
        except Exception as error:
            errors.append(error)
            return
        total.create += found.create
        total.delete += found.delete

    workers = [threading.Thread(target=work, args=(first + number,)) for number in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total.elapsed = time.perf_counter() - begin
    if errors:
        raise errors[0]
    return total


def call_manager(manager: GuestService) -> tuple[Callable[[str], object], Callable[[str], object]]:
    """The manager's own methods."""

    def create(name: str) -> object:
        return manager.create(OPERATOR, GuestRequest(name=name, cores=1, memory="64M", image=IMAGE))

    return create, lambda name: manager.delete(OPERATOR, name)


def call_client(path: Path) -> tuple[Callable[[str], object], Callable[[str], object]]:
    """The same over HTTP."""
    client = Client(path)
    return lambda name: client.create({"name": name, "cores": 1, "memory": "64M", "image": IMAGE}), client.delete


def play_clients(path: Path, pipe: Connection) -> None:
    """A process of clients: runs what it is sent until it gets None."""
    while order := pipe.recv():
        first, threads, cycles = order
        pipe.send(run_threads(first, threads, cycles, lambda: call_client(path)))


@contextmanager
def open_clients(path: Path) -> Iterator[list[Connection]]:
    """Processes of clients, forked before the manager has threads."""
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for _ in range(PROCESSES):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=play_clients, args=(path, theirs)))
        workers[-1].start()
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for pipe, worker in zip(pipes, workers, strict=True):
            pipe.send(None)
            worker.join()


def run_clients(pipes: Sequence[Connection], threads: int, cycles: int) -> Figures:
    """Clients in all processes at the same time; in one if there is one."""
    pipes = pipes[: min(threads, len(pipes))]
    total = Figures()
    begin = time.perf_counter()
    for number, pipe in enumerate(pipes):
        pipe.send((number * threads, threads // len(pipes), cycles))
    for pipe in pipes:
        found = pipe.recv()
        total.create += found.create
        total.delete += found.delete
    total.elapsed = time.perf_counter() - begin
    return total


def run(work: Callable[[], Figures]) -> Figures:
    """With the processor time of this process."""
    begin = time.process_time()
    figures = work()
    figures.cpu = time.process_time() - begin
    return figures


def measure(folder: Path, cores: int, threads: Sequence[int], cycles: int, *, http: bool) -> Iterator[tuple[int, Figures]]:
    """The figures of each number of callers."""
    world = World(folder / "world", make_server(cores))
    if not http:
        manager, ledger = world.open_manager()
        skip_host_changes(manager)
        fill(manager, cores)
        for count in threads:
            yield count, run(lambda count=count: run_threads(0, count, max(1, cycles // count), lambda: call_manager(manager)))
        manager.close()
        ledger.close()
        return
    with open_clients(folder / "manager.sock") as pipes, serve(folder, SETTINGS, world=world) as served:
        skip_host_changes(served.manager)
        fill(served.manager, cores)
        for count in threads:
            yield count, run(lambda count=count: run_clients(pipes, count, max(1, cycles // count)))


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--cores", type=int, default=128)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--no-fsync", action="store_true", help="what it would be on a disk that takes no time")
    parser.add_argument("--profile", action="store_true", help="of one caller, without --http: where its time goes")
    arguments = parser.parse_args()
    if arguments.no_fsync:
        os.fdatasync = lambda _: None
    profile = cProfile.Profile(time.thread_time)
    with TemporaryDirectory(prefix="claim-cycles-", dir=".") as folder:
        for count, figures in measure(Path(folder), arguments.cores, arguments.threads, arguments.cycles, http=arguments.http):
            print(f"{count:3} callers: {figures.describe()}", flush=True)
        if arguments.profile:
            world = World(Path(folder) / "profiled", make_server(arguments.cores))
            manager, ledger = world.open_manager()
            skip_host_changes(manager)
            fill(manager, arguments.cores)
            profile.runcall(run_cycles, "guest", arguments.cycles, *call_manager(manager))
            ledger.close()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
