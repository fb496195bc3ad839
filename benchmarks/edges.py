"""What the way through the external switch costs on software edges, compared with switching in the host. Needs root.

    .venv/bin/python benchmarks/edges.py [--rounds 40] [--plot FILE]

In network namespaces, natively: two taps on one uplink, opened as QEMU opens them, and a Linux bridge as external switch at the
other end of a veth pair. The ways are measured one after the other in each round, in changing order; ratios are those of a round:

    bridge            both taps are ports of a bridge of the host, which switches between them
    macvtap bridge    both are macvtaps in bridge mode: the driver switches
    others            the software edges of the product, with their rules; the frames go out, and back through the hairpin

One thread writes to one tap and reads from the other: the kernel does all its work for a frame within these system calls, on
the CPU of the caller. So the time is the kernel's for this way, with that of the external switch: a Linux bridge on the same CPU,
which costs more than a real switch. A cable and its limits are not in it. There is no guest, no vhost, and no frame of more than
1,514 bytes.

Prints medians and ratios to `bridge`; exits with status 1 if a frame was lost, or the switch did not see each frame of a software
edge exactly once in each direction and none of the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.host.edge import SOFTWARE, Tap
from orchestrator.host.netlink import add_port, create_bridge, set_hairpin
from orchestrator.waiting import wait_until
from tests.harness import netns
from tests.harness.edge_network import MAC1, MAC2, PORT, UPLINK, build_network, open_end, plug

MACS = (MAC1, MAC2)
TRIPS, BATCHES, BATCH = 1000, 60, 32
BASE = "bridge"
FIGURES = {"round trip": "us", "60 bytes": "frames/s", "1,514 bytes": "frames/s"}
LABELS = {
    "round trip": "round trip\n(lower is better)",
    "60 bytes": "frames/s, 60 bytes\n(higher is better)",
    "1,514 bytes": "frames/s, 1,514 bytes\n(higher is better)",
}


@dataclass
class Measured:
    """A way, and what was measured of it: a value per round of each figure."""

    name: str
    outside: bool  # whether the frames pass the external switch
    sent: int = field(default=0, kw_only=True)
    lost: int = field(default=0, kw_only=True)
    found: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list), kw_only=True)

    def is_right(self, into: int, out: int) -> bool:
        """Whether no frame was lost, and the switch saw each frame as often as the way says."""
        print(f"{self.name}: {self.sent} frames sent, {self.lost} lost, {into} into the switch, {out} out of it")
        expected = self.sent if self.outside else 0
        return self.lost == 0 and (into, out) == (expected, expected)


@dataclass
class Way(Measured):
    """Two taps that are connected in one of the ways."""

    host: str  # network namespaces
    switch: str
    ends: tuple[netns.Tap, netns.Tap]

    def measure(self) -> None:
        self.found["round trip"].append(self._measure_trips() * 1e6)
        for name, size in (("60 bytes", 60), ("1,514 bytes", 1514)):
            self.found[name].append(self._measure_rate(size))

    def _measure_trips(self) -> float:
        """Seconds from one end to the other and back."""
        first, second = self.ends
        there, back = build(0, 60), build(1, 60)
        begin = perf_counter()
        for _ in range(TRIPS):
            first.send(there)
            self.lost += 1 - receive(second, 1)
            second.send(back)
            self.lost += 1 - receive(first, 1)
        self.sent += 2 * TRIPS
        return (perf_counter() - begin) / TRIPS

    def _measure_rate(self, size: int) -> float:
        """Frames per second in one direction. A batch is shorter than each of the kernel's queues."""
        first, second = self.ends
        frame = build(0, size)
        begin = perf_counter()
        for _ in range(BATCHES):
            for _ in range(BATCH):
                first.send(frame)
            self.lost += BATCH - receive(second, BATCH)
        self.sent += BATCHES * BATCH
        return BATCHES * BATCH / (perf_counter() - begin)


def build(sender: int, size: int) -> bytes:
    return netns.build_frame(str(MACS[1 - sender]), str(MACS[sender]), 0).ljust(size, b"\0")


def receive(end: netns.Tap, count: int) -> int:
    """How many frames arrived: it waits at most a second for so many."""
    got = len(end.take())
    if got < count:
        deadline = perf_counter() + 1
        while got < count and perf_counter() < deadline:
            got += len(end.take())
    return got


def connect_bridge(host: str, folder: Path) -> list[netns.Tap]:
    create_bridge("inside", host)
    for number in (1, 2):
        netns.ip("-n", host, "tuntap", "add", f"nh-{number}", "mode", "tap")
        add_port("inside", f"nh-{number}", host)
    return [netns.open_tun(host, f"nh-{number}") for number in (1, 2)]


def connect_macvtaps(host: str, folder: Path) -> list[netns.Tap]:
    for number, mac in enumerate(MACS, 1):
        words = ["link", UPLINK, "address", str(mac), "type", "macvtap", "mode", "bridge"]
        netns.ip("-n", host, "link", "add", f"nh-{number}", "up", *words)
    return [open_end("macvtap", f"nh-{number}", folder, host) for number in (1, 2)]


def connect_edge(host: str, folder: Path, name: str) -> list[netns.Tap]:
    """As the manager does for a guest, with the rules."""
    edge = next(edge for mode, edge in SOFTWARE.items() if mode == name)
    return [plug(edge, Tap(f"nh-{number}", mac, UPLINK), folder, host) for number, mac in enumerate(MACS, 1)]


@contextmanager
def build_way(name: str, number: int) -> Iterator[Way]:
    """Its namespaces and everything in them are removed at the end."""
    prefix = f"edges{os.getpid()}{number}"
    host, switch = f"{prefix}h", f"{prefix}s"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        # The kernel itself would send frames, which would be counted.
        stack.enter_context(build_network(host, switch, silent=True))
        netns.ip("-n", host, "link", "set", UPLINK, "promisc", "on")  # an edge may need it
        outside = name in list(SOFTWARE)
        set_hairpin(PORT, switch, on=outside)
        connect = {BASE: connect_bridge, "macvtap bridge": connect_macvtaps}.get(name)
        first, second = connect(host, folder) if connect else connect_edge(host, folder, name)
        stack.callback(first.close)
        stack.callback(second.close)
        way = Way(name, outside, host, switch, (first, second))
        await_frames(way)
        yield way


def await_frames(way: Way) -> None:
    """The carriers of new interfaces come late, and the switch has to learn both addresses."""

    def both_arrive() -> bool:
        for sender in (0, 1):
            way.ends[1 - sender].take()
            way.ends[sender].send(build(sender, 60))
            if not wait_until(lambda sender=sender: way.ends[1 - sender].take(), timeout=0.2, interval=0.005):  # type: ignore[misc]
                return False
        return True

    if not (wait_until(both_arrive, timeout=30, interval=0) and both_arrive()):
        sys.exit(f"{way.name}: frames do not arrive")
    for end in way.ends:
        end.take()


def read_port(switch: str, port: str) -> tuple[int, int]:
    """Frames that the switch received and sent at the port."""

    def read(name: str) -> int:
        argv = ["ip", "-n", switch, "-s", "-j", "link", "show", port]
        return int(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)[0]["stats64"][name]["packets"])

    return read("rx"), read("tx")


def run(rounds: int) -> tuple[list[Way], bool]:
    """The ways with their figures, and whether each frame took its way."""
    with ExitStack() as stack:
        names = [BASE, "macvtap bridge", *map(str, SOFTWARE)]
        ways = [stack.enter_context(build_way(name, number)) for number, name in enumerate(names)]
        before = [read_port(way.switch, PORT) for way in ways]
        for number in range(rounds):
            for way in ways if number % 2 else reversed(ways):
                way.measure()
        right = True
        for way, start in zip(ways, before, strict=True):
            into, out = (now - then for now, then in zip(read_port(way.switch, PORT), start, strict=True))
            right &= way.is_right(into, out)
    return ways, right


def compare(way: Measured, base: Measured, figure: str) -> list[float]:
    """Ratios of the rounds, sorted."""
    return sorted(one / other for one, other in zip(way.found[figure], base.found[figure], strict=True))


def report(ways: Sequence[Measured], bases: Sequence[Measured], figures: Mapping[str, str]) -> None:
    """Medians, and ratios to the base of each way. ``figures``: their units."""
    print(f"\n{'':28}" + "".join(f"{f'{figure}, {unit}':>32}{'ratio':>22}" for figure, unit in figures.items()))
    for way, base in zip(ways, bases, strict=True):
        line = f"{way.name:28}"
        for figure in figures:
            ratios = compare(way, base, figure)
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            line += f"{statistics.median(way.found[figure]):>32,.2f}{spread:>22}"
        print(f"{line}   to {base.name}")
    print(f"load {os.getloadavg()[0]:.1f}, kernel {os.uname().release}")


def draw(ways: Sequence[Measured], figures: Mapping[str, str], title: str, file: Path) -> None:
    """Medians as bars, and quartiles of the rounds as lines. ``figures``: their labels."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "edges"
    figure, axes = pyplot.subplots(figsize=(max(8, len(ways) * len(figures) * 0.55), 4), layout="constrained")
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        ratios = [compare(way, ways[0], name) for name in figures]
        medians = [statistics.median(one) for one in ratios]
        quarters = [statistics.quantiles(one, n=4) for one in ratios]
        spread = [[median - one[0] for median, one in zip(medians, quarters, strict=True)],
                  [one[2] - median for median, one in zip(medians, quarters, strict=True)]]  # fmt: skip
        at = [place + (number - (len(ways) - 1) / 2) * width for place in range(len(figures))]
        axes.bar(at, medians, width * 0.92, yerr=spread, capsize=3, label=way.name)
        for place, median, (_, _, top) in zip(at, medians, quarters, strict=True):
            axes.text(place, max(median, top) + 0.03, f"{median:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(figures)), list(figures.values()))
    axes.set(ylabel=f"ratio to {ways[0].name}, median and quartiles", title=title)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.legend(loc="upper center", ncols=len(ways))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
    axes.grid(visible=True, axis="y", alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--plot", type=Path, default=Path("build/benchmarks/edges.png"))
    options = parser.parse_args()
    ways, right = run(max(options.rounds, 2))
    report(ways, [ways[0]] * len(ways), FIGURES)
    draw(ways, LABELS, "Ways between two taps of one host, in network namespaces", options.plot)
    sys.exit(not right)


if __name__ == "__main__":
    main()
