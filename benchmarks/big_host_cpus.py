"""Times survey, plan, clearing of cores and audit on a host of 1,024 CPUs, 16 nodes, 5,000 threads and 3,000 interrupts.

    .venv/bin/python benchmarks/big_host_cpus.py [RUNS]

Runs the real code on a fake host (tests/fakes/server.py) in a temporary folder; nothing on this machine is changed.
Prints the median per part in milliseconds. Exits with 1 if survey, plan or audit takes a second or more.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.audit.facts import Source
from orchestrator.audit.report import Auditor
from orchestrator.host.irqs import read_irqs
from orchestrator.host.processes import survey_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology, refresh_topology
from orchestrator.hypervisor.connection import RunningGuest, Vcpu
from orchestrator.model.access import OPERATOR
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.request import parse_guest_request
from orchestrator.resources.cores import clear_cores
from orchestrator.resources.step import UndoContext, undo_steps
from orchestrator.values import CpuSet, Size
from tests.fakes.domains import add_thread
from tests.fakes.server import IMAGE, Server
from tests.harness.crash import World

SERVER = Server(cores=512, threads=2, nodes=16, vfs=7, pages=4096)
THREADS, IRQS = 5_000, 3_000
GUESTS, GUEST_CORES = 60, 4
QEMU_THREADS = 6
"""Threads of a guest's QEMU in addition to its vCPUs."""
LIMIT = 1000.0  # ms
KTHREAD, NO_SETAFFINITY = 0x0020_0000, 0x0400_0000  # include/linux/sched.h
LIMITED = ("survey", "survey again", "plan", "audit")


@dataclass(frozen=True)
class Figure:
    name: str
    median: float  # ms
    runs: int


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), SERVER)
        guests = fill(world)
        figures = [*measure_reading(world, runs), *measure_audit(world, guests, runs), *measure_manager(world, runs)]
    print(f"{len(SERVER.cpus)} CPUs, {SERVER.nodes} nodes, {THREADS} threads, {IRQS} interrupts, {GUESTS} unmanaged guests (ms)")
    for figure in figures:
        print(f"{figure.name:34} {figure.median:9.1f}   (median of {figure.runs})")
    slow = [figure.name for figure in figures if figure.name in LIMITED and figure.median >= LIMIT]
    print(f"slower than {LIMIT:g} ms: {', '.join(slow) or 'none'}")
    sys.exit(bool(slow))


def fill(world: World) -> tuple[RunningGuest, ...]:
    """Adds threads, interrupts and unmanaged guests."""
    host, everywhere, housekeeping = world.host, str(SERVER.cpus), str(SERVER.policy.housekeeping)
    guests = []
    for number in range(GUESTS):
        first = SERVER.threads * (1 + number * GUEST_CORES)
        cpus, pid = range(first, first + SERVER.threads * GUEST_CORES), 20_000 + 100 * number
        for helper in range(QEMU_THREADS):
            add_thread(host, pid, pid + helper, "qemu-system-x86", housekeeping)
        for index, cpu in enumerate(cpus):
            add_thread(host, pid, pid + 50 + index, f"CPU {index}/KVM", str(cpu))
        vcpus = tuple(Vcpu(index, pid + 50 + index, CpuSet.of([cpu])) for index, cpu in enumerate(cpus))
        pins = SERVER.policy.housekeeping
        guests.append(RunningGuest(f"guest{number}", pid, vcpus, pins, 0, Size.parse("256M"), (), (), UUID(int=number + 1)))
    left = THREADS - len(survey_threads(host)[0])
    for number in range(left):
        pid, cpu = 50_000 + number, number % len(SERVER.cpus)
        if number % 5:  # each bound to a CPU by the kernel
            add_thread(host, pid, pid, f"kworker/{cpu}:0", str(cpu), flags=KTHREAD | NO_SETAFFINITY)
        else:  # programs that may run anywhere
            add_thread(host, pid, pid, "program", everywhere)
    for number in range(len(host.names("proc/irq")), IRQS):
        host.add(f"proc/irq/{number}/smp_affinity_list", everywhere)
        host.add(f"proc/irq/{number}/effective_affinity_list", str(number % len(SERVER.cpus)))
        host.add(f"sys/kernel/irq/{number}/actions", f"nic{number % 16}-TxRx-{number}")
    return tuple(guests)


def measure_reading(world: World, runs: int) -> list[Figure]:
    """Reads the kernel's files as the manager does."""
    host = HostRoot(world.host.path, world.host.fake_net)
    known = read_topology(host)
    return [
        measure("survey", lambda: read_topology(host), runs),
        measure("survey again", lambda: refresh_topology(host, known), runs),
        measure("all threads", lambda: survey_threads(host), runs),
        measure("all interrupts", lambda: read_irqs(host), runs),
    ]


@dataclass(frozen=True)
class Hypervisor:
    """libvirt, as the audit uses it."""

    guests: tuple[RunningGuest, ...]

    def read_guests(self) -> tuple[tuple[RunningGuest, ...], dict[str, str]]:
        return self.guests, {}

    def read_exits(self, _uuid: UUID) -> tuple[dict[str, int], ...]:
        return ({"exits": 1},)


def measure_audit(world: World, guests: tuple[RunningGuest, ...], runs: int) -> list[Figure]:
    """The whole audit. The guests have no memory and devices, so those proofs return immediately as not measured."""
    host = HostRoot(world.host.path, world.host.fake_net)
    topology = read_topology(host)

    source = Source(
        host, Hypervisor(guests), lambda: topology, lambda *_: "", SERVER.policy.housekeeping, ExitPolicy(2000, 10),
        os.getpid(), window=0.0,
    )  # fmt: skip
    return [measure("audit", Auditor(source).run, runs)]


class FileRoot(HostRoot):
    """Writes and affinities go to plain files: the checks of the fake host would cost more than the measured code."""

    def write(self, name: str, value: str) -> None:
        (self.path / name).write_text(value)

    def sched_getaffinity(self, tid: int) -> CpuSet:
        status = self.read(f"proc/{tid}/task/{tid}/status")
        return CpuSet.parse(status.partition("Cpus_allowed_list:")[2])

    def sched_setaffinity(self, tid: int, cpus: CpuSet) -> None:
        self.write(f"proc/{tid}/task/{tid}/status", f"Cpus_allowed_list:\t{cpus}\n")


def measure_manager(world: World, runs: int) -> list[Figure]:
    """A plan, and the additional cost of a host's first and last guest, for which all threads and interrupts move."""
    manager, ledger = world.open_manager()
    request = parse_guest_request({"name": "asked", "image": IMAGE, "memory": "64M", "cores": 4})
    plan = measure("plan", lambda: manager.plan(OPERATOR, request), runs)
    host = FileRoot(world.host.path)
    clear = measure("first guest: clearing of cores", lambda: clear_cores(host, ledger, "host", SERVER.policy.housekeeping), 1)
    moved = len(ledger.undo_records("host"))
    undo = measure(f"last guest: {moved} undo records", lambda: undo_steps(UndoContext(host), ledger, "host"), 1)
    return [plan, clear, undo]


def measure(name: str, work: Callable[[], object], runs: int) -> Figure:
    times = []
    for _ in range(runs):
        begin = perf_counter()
        work()
        times.append(1000 * (perf_counter() - begin))
    return Figure(name, statistics.median(times), runs)


if __name__ == "__main__":
    main()
