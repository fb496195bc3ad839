"""Times plan and claim on half-full hosts of 8 to 1,024 cores, with the real ledger on the real disk.

    .venv/bin/python benchmarks/plan_scale.py [RUNS]

Prints a table, and writes build/benchmarks/plan_scale.png if matplotlib is installed (pip install -e '.[bench]').
Exits with 1 if the cost grows faster than the host, or if the 99th percentile at 128 cores is above 10 ms.
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from orchestrator.errors import NoRoom
from orchestrator.ledger import ClaimSnapshot, Ledger
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.request import GuestRequest, parse_guest_request
from orchestrator.model.topology import Core, IommuGroup, PagePool, PhysicalFunction, Topology, VirtualFunction
from orchestrator.planning.allocation_index import AllocationIndex
from orchestrator.planning.planner import plan_guest
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
CORES_PER_NODE = 64
OTHER_DEVICES = 60  # other PCI functions of a node
LARGEST_GUEST = 8  # cores
LIMIT = 10.0  # ms, at 128 cores
OUT = Path("build/benchmarks")
PAGE = Size.parse("2M")
Result = TypeVar("Result")


@dataclass
class Host:
    """One host with its guests, and the durations in ms of reads, plans, claims and refusals."""

    topology: Topology
    policy: Policy
    ledger: Ledger
    plans: list[Plan]
    times: list[tuple[float, float, float, float]] = field(default_factory=list)
    index: AllocationIndex = AllocationIndex()

    @property
    def cores(self) -> int:
        """Physical cores."""
        return len(self.topology.cores)

    @property
    def totals(self) -> list[float]:
        """Read, plan and claim together."""
        return [read + plan + claim for read, plan, claim, _ in self.times]

    @property
    def median(self) -> float:
        """Of the totals."""
        return statistics.median(self.totals)

    @property
    def p99(self) -> float:
        """Of the totals."""
        return statistics.quantiles(self.totals, n=100)[98]

    @property
    def parts(self) -> list[float]:
        """Medians of read, plan, claim and refusal."""
        return [statistics.median(times) for times in zip(*self.times, strict=True)]


def main() -> None:
    """Measures all sizes in turn, so that load on the machine affects all alike; prints and draws the results."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        hosts = [prepare(cores, Ledger(Path(folder, f"{cores}.sqlite"))) for cores in SIZES]
        for run in range(runs):
            for host in hosts:
                measure(host, run)
    print("cores guests | plan+claim: median      p99 per core, to 8 cores | median of read    plan   claim | refusal   (ms)")
    ratios = [host.median / host.cores / (hosts[0].median / hosts[0].cores) for host in hosts]
    for host, ratio in zip(hosts, ratios, strict=True):
        read, plan, claim, refusal = host.parts
        figures = f"{host.median:18.2f} {host.p99:8.2f} {ratio:21.2f} | {read:14.2f} {plan:7.2f} {claim:7.2f} | {refusal:7.2f}"
        print(f"{host.cores:5} {len(host.plans):6} | {figures}")
    draw(hosts, OUT / "plan_scale.png")
    p99 = next(host.p99 for host in hosts if host.cores == 128)
    plans = [host.parts[1] for host in hosts]
    alone = [plan / host.cores / (plans[0] / hosts[0].cores) for plan, host in zip(plans, hosts, strict=True)]
    steepest = max(later / earlier for earlier, later in pairwise(plans))
    print(f"per core, to that at 8 cores: at the most {max(ratios[1:]):.2f}, planning alone {max(alone[1:]):.2f} (wanted 1)")
    print(f"planning alone, from one size to the next: at the most {steepest:.2f} times (2 is linear)")
    print(f"p99 at 128 cores: {p99:.2f} ms (wanted {LIMIT:g})")
    sys.exit(max(*ratios, *alone) > 1 or p99 > LIMIT)


def prepare(cores: int, ledger: Ledger) -> Host:
    topology, policy = make_host(cores)
    return Host(topology, policy, ledger, fill(topology, policy, ledger, random.Random(cores)))


def measure(host: Host, run: int) -> None:
    """Claims and releases a guest, and refuses one that is too large."""
    started = frozenset(plan.name for plan in host.plans)
    # As large as one of the guests: it fits even on the smallest host.
    request = make_request(f"run{run}", host.plans[run % len(host.plans)])
    reading, read = _timed(host.ledger.read)
    plan, decide = _timed(decide_place, reading, request, host, started)
    _, claim = _timed(host.ledger.claim, plan, reading.generation, request)
    host.ledger.release(request.name)
    host.times.append((read, decide, claim, refuse(host.topology, host.policy, host.index.to_allocated(started, ()))))


def decide_place(reading: ClaimSnapshot, request: GuestRequest, host: Host, started: frozenset[str]) -> Plan:
    """The manager's work between reading the claims and writing one."""
    host.index = host.index.updated(claim.plan for claim in reading.claims)
    return plan_guest(request, host.topology, host.index.to_allocated(started, ()), host.policy)


def refuse(topology: Topology, policy: Policy, taken: Allocated) -> float:
    """Milliseconds of a refusal, which names every CPU."""
    request = parse_guest_request({"name": "huge", "image": "minimal", "memory": "2M", "cores": 1024})
    begin = perf_counter()
    try:
        plan_guest(request, topology, taken, policy)
    except NoRoom:
        return (perf_counter() - begin) * 1000
    raise AssertionError("a guest as large as the host has been given a place")


def fill(topology: Topology, policy: Policy, ledger: Ledger, chance: random.Random) -> list[Plan]:
    """Guests of 1 to 8 cores until the host is full; then every second one is deleted, which fragments the free cores."""
    plans: list[Plan] = []
    largest = min(LARGEST_GUEST, len(topology.cores) // 4)
    while True:
        cores = chance.randint(1, largest)
        name = f"guest{len(plans)}"
        request = parse_guest_request({"name": name, "image": "minimal", "memory": f"{cores}G", "cores": cores})
        try:
            plan = plan_guest(request, topology, AllocationIndex().updated(plans).to_allocated((), ()), policy)
        except NoRoom:
            break
        ledger.claim(plan, ledger.read().generation, request)
        plans.append(plan)
    chance.shuffle(plans)
    while sum(len(plan.cores) for plan in plans) > len(topology.cores) // 2:
        ledger.release(plans.pop().name)
    return plans


def make_request(name: str, like: Plan) -> GuestRequest:
    """A request for the same resources as another guest's."""
    fields: dict[str, object] = {"name": name, "image": "minimal", "memory": str(like.memory), "cores": len(like.cores)}
    return parse_guest_request(fields)


def make_host(cores: int) -> tuple[Topology, Policy]:
    """A server with nodes of 64 cores with two threads each, and per node a PF with one VF per core."""
    nodes = max(1, cores // CORES_PER_NODE)
    of_node = cores // nodes
    made = tuple(Core(CpuSet.of((number, number + cores)), number // of_node, number // of_node) for number in range(cores))
    pfs = tuple(make_pf(node, of_node) for node in range(nodes))
    devices = [vf.address for pf in pfs for vf in pf.vfs]
    devices += [PciAddress(node, 0xF0, number // 8, number % 8) for node in range(nodes) for number in range(OTHER_DEVICES)]
    groups = tuple(IommuGroup(number, "DMA", (address,)) for number, address in enumerate(devices))
    pools = tuple(PagePool(node, PAGE, of_node * 1024, of_node * 1024) for node in range(nodes))
    housekeeping = CpuSet.of((0, cores))
    topology = Topology(made, CpuSet.of(range(2 * cores)) - housekeeping, pools, pfs, groups)
    return topology, Policy(housekeeping, tuple(pf.interface or "" for pf in pfs), PAGE)


def make_pf(node: int, vfs: int) -> PhysicalFunction:
    """A PF with its VFs in its own PCI domain."""
    mac = MacAddress(f"52:54:00:00:{node:02x}:00")
    address = PciAddress(node, 0x41, 0, 0)
    numbers = {"total_vfs": vfs, "first_vf_offset": 8, "vf_stride": 1}
    pf = PhysicalFunction(address, f"nic{node}", "8086:1592", "ice", node, up=True, mac=mac, **numbers, vfs=())
    made = tuple(VirtualFunction(pf.vf_address(index), index, "vfio-pci", index) for index in range(vfs))
    return replace(pf, vfs=made)


def draw(hosts: list[Host], file: Path) -> None:
    """Both axes logarithmic, with a line for linear growth."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    cores = [host.cores for host in hosts]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(cores, [host.p99 for host in hosts], "s-", color="tab:red", label="plan and claim, 99th percentile")
    axes.plot(cores, [host.median for host in hosts], "o-", color="tab:blue", label="plan and claim, median")
    axes.plot(cores, [host.parts[1] for host in hosts], "o-", color="tab:green", label="plan alone, median")
    for first, name in ((hosts[0].median, "linear from 8 cores"), (hosts[0].parts[1], None)):
        axes.plot(cores, [first * size / cores[0] for size in cores], "--", color="gray", label=name)
    axes.plot(128, LIMIT, "v", color="black", label=f"limit of the 99th percentile at 128 cores: {LIMIT:g} ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(cores, list(map(str, cores)))
    axes.set(xlabel="physical cores of the host, half of them claimed", ylabel="ms", title="Plan and claim, ledger on disk")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    print(f"picture: {file}")


def _timed(work: Callable[..., Result], *arguments: object) -> tuple[Result, float]:
    """The result of the work, and its duration in ms."""
    begin = perf_counter()
    result = work(*arguments)
    return result, (perf_counter() - begin) * 1000


if __name__ == "__main__":
    main()
