"""Measures many concurrent clients, each of which repeatedly creates, stops, starts and deletes its guest, on a fake host of 128
cores.

    .venv/bin/python benchmarks/many_clients.py [--requests 10000] [--clients 64] [--processes 2]

Clients are threads of separate processes and use the real interface on a Unix socket. Prints the responses; the time for which
planning and claiming took, with and without the wait for earlier calls; and the duration of whole requests as seen by clients,
which includes waits for the event loop, a thread, and the guest's start. Exits with 1 after an unexpected response (`create` may
return `no-room`) or none; if anything is left behind; or if the 99th percentile of plan and claim is above 10 ms.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.locks import CallQueue
from orchestrator.model.access import OPERATOR
from orchestrator.values import CpuSet
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import serve
from tests.harness.crash import World

SERVER = Server(cores=128, threads=2, nodes=2, vfs=64, pages=16384)
HOUSEKEEPING = CpuSet.parse("0-1")
SETTINGS = {"limits": {"rate": 1e6, "burst": 1_000_000, "concurrent": 1000}}
LIMIT = 10.0
DONE, HONEST = "done", "no-room"
ABSENT, RUNNING, STOPPED = "absent", "running", "stopped"
NEXT = {ABSENT: ("create",), RUNNING: ("stop", "stop", "stop", "delete"), STOPPED: ("delete", "delete", "delete", "start")}
"""The next request of a client, all equally likely. Of those completed, 32 % create, 32 % delete, 29 % stop and 7 % start."""
AFTER = {"create": RUNNING, "stop": STOPPED, "start": RUNNING, "delete": ABSENT}
Answers = list[tuple[str, str, float]]
T = TypeVar("T")


class TimedQueue(CallQueue):
    """Records how long each call took, in seconds. The manager plans and claims in it.

    Attributes:
        held: by the clock, for a plan that was claimed.
        computed: CPU time of its thread; the rest went to other threads and to the disk.
        refused: elapsed time, for a request that was refused for lack of room.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[float] = []
        self.computed: list[float] = []
        self.refused: list[float] = []

    def run(self, work: Callable[[], T]) -> T:
        """Also measures ``work``, without the wait for earlier calls."""

        def measured() -> T:
            since, computed_since = time.perf_counter(), time.thread_time()
            try:
                result = work()
            except BaseException:
                self.refused.append(time.perf_counter() - since)
                raise
            self.held.append(time.perf_counter() - since)
            self.computed.append(time.thread_time() - computed_since)
            return result

        return super().run(measured)


@dataclass
class Figures:
    """The result.

    Attributes:
        asked: how many requests were to be made.
        answers: (request, answer, seconds) of each.
        lock: times of plan and claim.
        waited: those with waiting for the turn, as the manager itself notes them.
        left: what was left behind in the end.
    """

    asked: int
    answers: Answers
    lock: TimedQueue
    waited: list[float]
    left: list[str]

    @property
    def wrong(self) -> set[str]:
        """Unexpected responses."""
        return {
            f"{kind}: {answer}" for kind, answer, _ in self.answers if answer != DONE and (kind, answer) != ("create", HONEST)
        }

    def find_faults(self) -> list[str]:
        """Reasons why the run failed."""
        faults = [f"wrong answer: {answer}" for answer in sorted(self.wrong)[:5]]
        if len(self.answers) != self.asked:
            faults.append(f"{self.asked} requests were to be made, {len(self.answers)} were answered")
        if self.left:
            faults.append(f"left behind: {self.left[:5]}")
        if not self.lock.held:
            faults.append("no guest was created")
        elif (p99 := find_p99(self.lock.held) * 1e3) > LIMIT:
            faults.append(f"the 99th percentile of plan and claim is {p99:.1f} ms, above {LIMIT:g} ms")
        return faults


def ask(client: Client, kind: str, name: str, rng: Random) -> str:
    """Sends a request; returns one word for the response, or any error: the death of a client would go unnoticed."""
    try:
        if kind == "create":
            fields = {"name": name, "cores": rng.choice((1, 1, 2, 4, 8)), "memory": rng.choice(("64M", "256M", "1G"))}
            client.create({**fields, "image": IMAGE})
        elif kind == "stop":
            client.stop(name)
        elif kind == "start":
            client.start(name)
        else:
            client.delete(name)
    except OrchestratorError as error:
        return error.code if error.code == HONEST else f"{error.code}: {error.message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return DONE


def play_client(path: Path, number: int, requests: int, answers: Answers) -> None:
    """Sends requests for its own guest and counts the responses, then deletes the guest."""
    client, rng = Client(path), Random(number)
    name, state = f"client{number}", ABSENT
    for _ in range(requests):
        kind = rng.choice(NEXT[state])
        began = time.perf_counter()
        answer = ask(client, kind, name, rng)
        answers.append((kind, answer, time.perf_counter() - began))
        if answer == DONE:
            state = AFTER[kind]
    if state != ABSENT:
        ask(client, "delete", name, rng)  # if that fails, the guest is left behind


def play_clients(path: Path, requests: dict[int, int], pipe: Connection) -> None:
    """A process of clients; ``requests`` maps a client's number to its number of requests. Waits for the start signal."""
    pipe.recv()
    answers: Answers = []
    threads = [threading.Thread(target=play_client, args=(path, *one, answers)) for one in requests.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(answers)


def measure(folder: Path, requests: int, clients: int, processes: int, server: Server = SERVER) -> Figures:
    world = World(folder / "world", server)
    before = world.host.tree()
    # Forked before any thread exists.
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for number in range(processes):
        ours, theirs = context.Pipe()
        shares = {client: share(requests, clients, client) for client in range(number, clients, processes)}
        workers.append(context.Process(target=play_clients, args=(folder / "manager.sock", shares, theirs)))
        workers[-1].start()
        theirs.close()  # so that the pipe ends with the process
        pipes.append(ours)
    with serve(folder, SETTINGS, world=world, cpus=HOUSEKEEPING) as served:
        lock = TimedQueue()
        served.manager.allocator.lock = lock
        answers = gather(pipes)
        for worker in workers:
            worker.join()
        left = [f"guest {view.plan.name}" for view in served.manager.guests(OPERATOR)]
        left += [*(world.host.tree().keys() ^ before.keys()), *world.host.violations()]
        waited: list[float] = []
        after = 0
        while events := served.ledger.events(after, 10_000):
            waited += [event.took for event in events if event.kind == "claimed" and event.took is not None]
            after = events[-1].id
    return Figures(requests, answers, lock, waited, left)


def gather(pipes: Sequence[Connection]) -> Answers:
    """Starts the processes and collects their results; those of a dead process are missing."""
    answers: Answers = []
    for pipe in pipes:
        with suppress(BrokenPipeError):
            pipe.send("go")
    for pipe in pipes:
        with suppress(EOFError, ConnectionResetError):
            answers += pipe.recv()
    return answers


def share(requests: int, clients: int, number: int) -> int:
    """The number of requests per client; the first clients get the remainder."""
    return requests // clients + (number < requests % clients)


def find_p99(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(seconds)
    return ordered[max(0, -(-len(ordered) * 99 // 100) - 1)]


def describe(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum in ms."""
    if not seconds:
        return "never"
    median, p99, most = statistics.median(seconds), find_p99(seconds), max(seconds)
    return f"median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, max {most * 1e3:.1f} ms"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="processes of the clients")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="many-clients-") as folder:
        began = time.perf_counter()
        figures = measure(Path(folder), arguments.requests, arguments.clients, arguments.processes)
    seconds, number = time.perf_counter() - began, len(figures.answers)
    print(f"{number} of {figures.asked} requests of {arguments.clients} clients in {seconds:.0f} s: {number / seconds:.0f}/s")
    counts = Counter((kind, re.sub("[0-9]+", "N", answer)) for kind, answer, _ in figures.answers)
    for (kind, answer), count in counts.most_common(20):
        print(f"  {kind}: {answer}: {count}")
    print(f"plan and claim: {describe(figures.lock.held)}")
    print(f"plan and claim, time of the processor: {describe(figures.lock.computed)}")
    print(f"plan and claim, with the wait for earlier ones: {describe(figures.waited)}")
    print(f"plan without room: {describe(figures.lock.refused)}")
    for kind in AFTER:
        taken = [took for asked, answer, took in figures.answers if (asked, answer) == (kind, DONE)]
        print(f"{kind}, as the client sees it, from connecting to the answer: {describe(taken)}")
    for fault in (faults := figures.find_faults()):
        print(f"FAULT: {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
