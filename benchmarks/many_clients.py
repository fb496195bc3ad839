"""Many clients at once, each making, stopping, starting and deleting a guest of its own, again and again, over the real interface
on a Unix socket, on a fake host of 128 cores.

    .venv/bin/python benchmarks/many_clients.py [--requests 10000] [--clients 64] [--processes 2]

Clients are threads of processes of their own. Prints how requests were answered; how long planning and claiming held their lock,
how long they took with waiting for it, and how long whole requests took as the clients see them: the times under the lock say
nothing of the time that a request waits for the event loop, a thread, or the start of the guest. Exits with 1 if a client got an
answer that is neither what was asked for nor, to `create`, an honest "no room"; if a request got none; if something is left
behind; or if the 99th percentile of plan and claim, under the lock, is above 10 ms.
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
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import TracebackType

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.model.access import OPERATOR
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import serve
from tests.harness.crash import World

SERVER = Server(cores=128, threads=2, nodes=2, vfs=64, pages=16384)
SETTINGS = {"limits": {"rate": 1e6, "burst": 1_000_000, "concurrent": 1000}}
LIMIT = 10.0
DONE, HONEST = "done", "no-room"
ABSENT, RUNNING, STOPPED = "absent", "running", "stopped"
NEXT = {ABSENT: ("create",), RUNNING: ("stop", "stop", "stop", "delete"), STOPPED: ("delete", "delete", "delete", "start")}
"""What a client asks for next, one as likely as another. Of those done 32 % create, 32 % delete, 29 % stop and 7 % start."""
AFTER = {"create": RUNNING, "stop": STOPPED, "start": RUNNING, "delete": ABSENT}
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
        asked: how many requests were to be made.
        answers: (request, answer, seconds) of each.
        lock: times of plan and claim.
        waited: those with waiting for the turn, as the manager itself notes them.
        left: what was left behind in the end.
    """

    asked: int
    answers: Answers
    lock: TimedLock
    waited: list[float]
    left: list[str]

    @property
    def wrong(self) -> set[str]:
        """Answers that nobody should get."""
        return {
            f"{kind}: {answer}" for kind, answer, _ in self.answers if answer != DONE and (kind, answer) != ("create", HONEST)
        }

    def find_faults(self) -> list[str]:
        """Why the run is no good; nothing if it is."""
        faults = [f"wrong answer: {answer}" for answer in sorted(self.wrong)[:5]]
        if len(self.answers) != self.asked:
            faults.append(f"{self.asked} requests were to be made, {len(self.answers)} were answered")
        if self.left:
            faults.append(f"left behind: {self.left[:5]}")
        if not self.lock.held:
            faults.append("nobody got a guest")
        elif (p99 := find_p99(self.lock.held) * 1e3) > LIMIT:
            faults.append(f"the 99th percentile of plan and claim is {p99:.1f} ms, above {LIMIT:g} ms")
        return faults


def ask(client: Client, kind: str, name: str, rng: Random) -> str:
    """A request; its answer in a word, or what went wrong, whatever it was: a client that dies would not be missed."""
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
    """Asks for one thing after another for a guest of its own; adds to the answers. Then deletes it."""
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
    """A process of clients, which begins when it is told to; ``requests`` are how many each of them makes, by its number."""
    pipe.recv()
    answers: Answers = []
    threads = [threading.Thread(target=play_client, args=(path, *one, answers)) for one in requests.items()]
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
        shares = {client: share(requests, clients, client) for client in range(number, clients, processes)}
        workers.append(context.Process(target=play_clients, args=(folder / "manager.sock", shares, theirs)))
        workers[-1].start()
        theirs.close()  # so that the pipe ends with the process
        pipes.append(ours)
    with serve(folder, SETTINGS, world=world) as served:
        lock = TimedLock()
        served.manager.allocator._lock = lock  # type: ignore[assignment]
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
    """Lets the processes begin, and waits for their answers; those of one that has died are missing."""
    answers: Answers = []
    for pipe in pipes:
        with suppress(BrokenPipeError):
            pipe.send("go")
    for pipe in pipes:
        with suppress(EOFError, ConnectionResetError):
            answers += pipe.recv()
    return answers


def share(requests: int, clients: int, number: int) -> int:
    """How many of the requests one client makes; the first ones make those that are over."""
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
    print(f"{number} of {figures.asked} requests of {arguments.clients} clients in {seconds:.0f} s: {number / seconds:.0f}/s")
    counts = Counter((kind, re.sub("[0-9]+", "N", answer)) for kind, answer, _ in figures.answers)
    for (kind, answer), count in counts.most_common(20):
        print(f"  {kind}: {answer}: {count}")
    print(f"plan and claim, under the lock: {describe(figures.lock.held)}")
    print(f"plan and claim, under the lock, time of the processor: {describe(figures.lock.computed)}")
    print(f"plan and claim, with waiting for the lock: {describe(figures.waited)}")
    print(f"plan without room: {describe(figures.lock.refused)}")
    for kind in AFTER:
        taken = [took for asked, answer, took in figures.answers if (asked, answer) == (kind, DONE)]
        print(f"{kind}, as the client sees it, from connecting to the answer: {describe(taken)}")
    for fault in (faults := figures.find_faults()):
        print(f"FAULT: {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
