"""Many clients at once, each making and deleting guests over the real interface on a Unix socket, on a fake host of 128 cores.

    .venv/bin/python benchmarks/many_clients.py [--requests 10000] [--clients 64] [--processes 2]

Clients are threads of processes of their own. Prints how requests were answered, and how long planning and claiming took (without
and with waiting for other clients' claims) and whole requests. Exits with 1 if anybody got an answer that is neither what was
asked for nor an honest "no room", if something is left behind, or if the 99th percentile of plan and claim is above 10 ms.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import TracebackType

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.access import OPERATOR
from orchestrator.api.client import Client
from orchestrator.errors import OrchestratorError
from tests.crashes import World
from tests.fakehost import IMAGE, Server
from tests.served import serve

SERVER = Server(cores=128, threads=2, nodes=2, vfs=64, pages=16384)
SETTINGS = {"limits": {"rate": 1e6, "burst": 1_000_000, "concurrent": 1000}}
LIMIT = 10.0
HONEST = "no-room"
Answers = list[tuple[str, str, float]]


class TimedLock:
    """A lock that knows how long it was held each time, in seconds: the manager holds this one while it plans and claims.

    Attributes:
        held: by the clock, for a plan that was claimed.
        computed: time of the processor that whoever held it then got; the rest went to other threads, and to the disk.
        refused: by the clock, for a request that there was no room for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = self._computed_since = 0.0
        self.held: list[float] = []
        self.computed: list[float] = []
        self.refused: list[float] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._since, self._computed_since = time.perf_counter(), time.thread_time()

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        held, computed = time.perf_counter() - self._since, time.thread_time() - self._computed_since
        if kind:
            self.refused.append(held)
        else:
            self.held.append(held)
            self.computed.append(computed)
        self._lock.release()


@dataclass
class Figures:
    """What was measured.

    Attributes:
        answers: (request, answer, seconds) of each.
        lock: times of plan and claim.
        waited: those with waiting for the turn, as the manager itself notes them.
        left: what was left behind in the end.
    """

    answers: Answers
    lock: TimedLock
    waited: list[float]
    left: list[str]

    @property
    def wrong(self) -> set[str]:
        """Answers that nobody should get."""
        return {answer for _, answer, _ in self.answers} - {"done", HONEST}


def play_client(path: Path, number: int, requests: int, answers: Answers) -> None:
    """Makes a guest and deletes it, again and again; adds to the answers."""
    client, rng = Client(path), Random(number)
    name, there = f"client{number}", False
    for _ in range(requests):
        began, kind, answer = time.perf_counter(), "delete" if there else "create", "done"
        try:
            if there:
                client.delete(name)
            else:
                fields = {"name": name, "cores": rng.choice((1, 1, 2, 4, 8)), "memory": rng.choice(("64M", "256M", "1G"))}
                client.create({**fields, "image": IMAGE})
            there = not there
        except OrchestratorError as error:
            answer = error.code if error.code == HONEST else f"{error.code}: {error.message}"
        answers.append((kind, answer, time.perf_counter() - began))
    if there:
        client.delete(name)


def play_clients(path: Path, numbers: range, requests: int, pipe: Connection) -> None:
    """A process of clients; begins when it is told to."""
    pipe.recv()
    answers: Answers = []
    threads = [threading.Thread(target=play_client, args=(path, number, requests, answers)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(answers)


def measure(folder: Path, requests: int, clients: int, processes: int, server: Server = SERVER) -> Figures:
    """Lets the clients loose."""
    world = World(folder / "world", server)
    before = world.host.tree()
    # Forked before there is any thread.
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for number in range(processes):
        ours, theirs = context.Pipe()
        numbers = range(number, clients, processes)
        workers.append(context.Process(target=play_clients, args=(folder / "manager.sock", numbers, requests // clients, theirs)))
        workers[-1].start()
        pipes.append(ours)
    with serve(folder, SETTINGS, world=world) as served:
        lock = TimedLock()
        served.manager._placing._lock = lock  # type: ignore[assignment]
        for pipe in pipes:
            pipe.send("go")
        answers = [answer for pipe in pipes for answer in pipe.recv()]
        for worker in workers:
            worker.join()
        left = [f"guest {view.plan.name}" for view in served.manager.guests(OPERATOR)]
        left += [*(world.host.tree().keys() ^ before.keys()), *world.host.violations()]
        waited: list[float] = []
        after = 0
        while events := served.ledger.events(after, 10_000):
            waited += [event.took for event in events if event.kind == "claimed" and event.took is not None]
            after = events[-1].id
    return Figures(answers, lock, waited, left)


def find_p99(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(seconds)
    return ordered[max(0, -(-len(ordered) * 99 // 100) - 1)]


def describe(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum in ms."""
    median, p99, most = statistics.median(seconds), find_p99(seconds), max(seconds)
    return f"median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, max {most * 1e3:.1f} ms"


def main() -> int:
    """The benchmark; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="that the clients are threads of")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="many-clients-") as folder:
        began = time.perf_counter()
        figures = measure(Path(folder), arguments.requests, arguments.clients, arguments.processes)
    seconds, number = time.perf_counter() - began, len(figures.answers)
    print(f"{number} requests of {arguments.clients} clients in {seconds:.0f} s ({number / seconds:.0f} a second)")
    counts = Counter((kind, re.sub("[0-9]+", "N", answer)) for kind, answer, _ in figures.answers)
    for (kind, answer), count in counts.most_common(20):
        print(f"  {kind}: {answer}: {count}")
    print(f"plan and claim: {describe(figures.lock.held)}")
    print(f"plan and claim, time of the processor: {describe(figures.lock.computed)}")
    print(f"plan and claim, with waiting for others': {describe(figures.waited)}")
    if figures.lock.refused:
        print(f"plan without room: {describe(figures.lock.refused)}")
    for kind in ("create", "delete"):
        taken = [took for asked, answer, took in figures.answers if (asked, answer) == (kind, "done")]
        print(f"{kind}, whole request: {describe(taken)}")
    if figures.left:
        print(f"left behind: {figures.left[:5]}")
    return bool(figures.wrong) or bool(figures.left) or find_p99(figures.lock.held) * 1e3 > LIMIT


if __name__ == "__main__":
    sys.exit(main())
