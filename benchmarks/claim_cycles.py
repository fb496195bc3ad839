"""How many guests a second can be planned, claimed and released again, by one caller and by many at the same time.

    .venv/bin/python benchmarks/claim_cycles.py [--cycles 2000] [--threads 1 64] [--rates 100 200 400] [--cores 128] [--http]
        [--no-fsync] [--profile]

The manager, the ledger (on the disk of the working folder) and the HTTP interface are real; the host is fake and half full. A
cycle is `create` and `delete` of a guest of one core. Nothing is started: a claim is planned, written, logged and released, as a
scheduler's reservation is. With --http the callers are clients in two processes of their own; otherwise they are threads that
call the manager's methods.

Each number of --threads is a closed loop: every caller starts its next cycle when the last one has ended, so a caller waits
longer the more callers there are. Each number of --rates is an open loop: this many cycles per second are due at random times,
whether earlier ones have ended or not; the callers are the largest number of --threads. A caller then waits from the time at
which its cycle was due.

Prints cycles per second, what a caller waits for create and delete, and the processor time per cycle of the manager's process and
of the clients' processes, which depends least on other load.
"""

import argparse
import cProfile
import multiprocessing
import os
import pstats
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.client.client import Client
from orchestrator.guests.service import GuestService
from orchestrator.model.access import OPERATOR
from orchestrator.model.request import GuestRequest
from orchestrator.values import CpuSet
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import serve
from tests.harness.crash import World

HOUSEKEEPING = CpuSet.parse("0-1")
SETTINGS = {"limits": {"rate": 1e6, "burst": 1_000_000, "concurrent": 1000}}
PROCESSES = 2
CORES_PER_NODE = 64


@dataclass
class Figures:
    """Seconds that each call took, and the whole run; and processor time of the manager's and of the clients' processes."""

    create: list[float] = field(default_factory=list)
    delete: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    cpu: float = 0.0
    clients: float = 0.0

    def add(self, other: "Figures") -> None:
        """Adds the calls of other callers in the same time."""
        self.create += other.create
        self.delete += other.delete
        self.clients += other.clients

    def describe(self) -> str:
        """Cycles per second; median, 99th percentile and maximum of each call in ms."""
        parts = [f"{len(self.create) / self.elapsed:6.0f} cycles/s"]
        for name, seconds in (("create", self.create), ("delete", self.delete)):
            p99 = statistics.quantiles(seconds, n=100)[98]
            figures = f"{statistics.median(seconds) * 1e3:6.1f} / {p99 * 1e3:6.1f} / {max(seconds) * 1e3:6.1f}"
            parts.append(f"{name} median/p99/max {figures} ms")
        clients = f" and {self.clients / len(self.create) * 1e3:.2f} (clients)" if self.clients else ""
        parts.append(f"processor {self.cpu / len(self.create) * 1e3:.2f}{clients} ms per cycle")
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
    """Half of the host, with guests of two cores. One less, so that half of the cores are free next to those of the host.

    Then guests of all other cores come and go, so that all uplinks have VFs: their creation, once per uplink, is not measured.
    """
    half, whole = cores // 4 - 1, cores // 2 - 1
    for number in range(whole):
        manager.create(OPERATOR, GuestRequest(name=f"old{number}", cores=2, memory="64M", image=IMAGE))
    for number in range(half, whole):
        manager.delete(OPERATOR, f"old{number}")


@dataclass(frozen=True)
class Load:
    """What callers do.

    Attributes:
        callers: how many, each with a guest of its own.
        cycles: of each caller.
        rate: cycles per second that start, of all callers together; 0 for a closed loop.
    """

    callers: int
    cycles: int
    rate: float = 0.0

    def list_times(self, caller: int) -> list[float]:
        """When each cycle of a caller is due, in seconds from the start: a share of a Poisson process, the same in each run."""
        if not self.rate:
            return [0.0] * self.cycles
        source = random.Random(0)
        times = list(accumulate(source.expovariate(self.rate) for _ in range(self.callers * self.cycles)))
        return times[caller :: self.callers]

    def describe(self) -> str:
        """Its kind and size."""
        return f"{self.rate:4.0f} cycles/s offered" if self.rate else f"{self.callers:4} callers"


Calls = tuple[Callable[[str], object], Callable[[str], object]]


def run_cycles(name: str, times: Sequence[float], create: Callable[[str], object], delete: Callable[[str], object]) -> Figures:
    """One caller; ``times`` as of ``Load.list_times``."""
    figures = Figures()
    start = time.perf_counter()
    for due in times:
        begin = time.perf_counter()
        if due:
            time.sleep(max(0.0, start + due - begin))
            begin = start + due
        create(name)
        created = time.perf_counter()
        delete(name)
        figures.create.append(created - begin)
        figures.delete.append(time.perf_counter() - created)
    return figures


def run_threads(load: Load, numbers: Sequence[int], make_calls: Callable[[], Calls]) -> Figures:
    """Callers with these numbers at the same time; raises what any of them raised."""
    total, errors = Figures(), []

    def work(number: int) -> None:
        try:
            total.add(run_cycles(f"guest{number}", load.list_times(number), *make_calls()))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in numbers]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total.elapsed = time.perf_counter() - begin
    if errors:
        raise errors[0]
    return total


def call_manager(manager: GuestService) -> Calls:
    """The manager's own methods."""

    def create(name: str) -> object:
        return manager.create(OPERATOR, GuestRequest(name=name, cores=1, memory="64M", image=IMAGE))

    return create, lambda name: manager.delete(OPERATOR, name)


def call_client(path: Path) -> Calls:
    """The same over HTTP."""
    client = Client(path)
    return lambda name: client.create({"name": name, "cores": 1, "memory": "64M", "image": IMAGE}), client.delete


def play_clients(path: Path, pipe: Connection) -> None:
    """A process of clients: runs what it is sent until it gets None. Answers with the error if a client has failed."""
    while order := pipe.recv():
        begin = time.process_time()
        try:
            figures = run_threads(*order, lambda: call_client(path))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
        else:
            figures.clients = time.process_time() - begin
            pipe.send(figures)


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


def run_clients(pipes: Sequence[Connection], load: Load) -> Figures:
    """Clients in all processes at the same time; in one if there is one."""
    pipes = pipes[: min(load.callers, len(pipes))]
    total = Figures()
    begin = time.perf_counter()
    for number, pipe in enumerate(pipes):
        pipe.send((load, range(number, load.callers, len(pipes))))
    answers = [pipe.recv() for pipe in pipes]
    total.elapsed = time.perf_counter() - begin
    for answer in answers:
        if isinstance(answer, str):
            raise SystemExit(f"a client failed: {answer}")
        total.add(answer)
    return total


def run(work: Callable[[], Figures]) -> Figures:
    """With the processor time of this process."""
    begin = time.process_time()
    figures = work()
    figures.cpu = time.process_time() - begin
    return figures


def measure(folder: Path, cores: int, loads: Sequence[Load], *, http: bool) -> Iterator[tuple[Load, Figures]]:
    """The figures of each load."""
    world = World(folder / "world", make_server(cores))
    if not http:
        manager, ledger = world.open_manager()
        skip_host_changes(manager)
        fill(manager, cores)
        for load in loads:
            yield load, run(lambda load=load: run_threads(load, range(load.callers), lambda: call_manager(manager)))
        manager.close()
        ledger.close()
        return
    with open_clients(folder / "manager.sock") as pipes, serve(folder, SETTINGS, world=world, cpus=HOUSEKEEPING) as served:
        skip_host_changes(served.manager)
        fill(served.manager, cores)
        for load in loads:
            yield load, run(lambda load=load: run_clients(pipes, load))


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="cycles per second that are offered; open loops")
    parser.add_argument("--cores", type=int, default=128)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--no-fsync", action="store_true", help="what it would be on a disk that takes no time")
    parser.add_argument("--profile", action="store_true", help="of one caller, without --http: where its time goes")
    arguments = parser.parse_args()
    if arguments.no_fsync:
        os.fdatasync = lambda _: None
    counts = [(count, 0.0) for count in arguments.threads] + [(max(arguments.threads), rate) for rate in arguments.rates]
    loads = [Load(count, max(1, arguments.cycles // count), rate) for count, rate in counts]
    profile = cProfile.Profile(time.thread_time)
    with TemporaryDirectory(prefix="claim-cycles-", dir=".") as folder:
        for load, figures in measure(Path(folder), arguments.cores, loads, http=arguments.http):
            print(f"{load.describe()}: {figures.describe()}", flush=True)
        if arguments.profile:
            world = World(Path(folder) / "profiled", make_server(arguments.cores))
            manager, ledger = world.open_manager()
            skip_host_changes(manager)
            fill(manager, arguments.cores)
            profile.runcall(run_cycles, "guest", [0.0] * arguments.cycles, *call_manager(manager))
            ledger.close()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
