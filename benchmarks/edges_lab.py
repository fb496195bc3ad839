"""What the ways between two guests of one host cost, in the lab: VFs and software edges, and VM exits per frame. Needs root.

    .venv/bin/python benchmarks/edges_lab.py [--rounds 5] [--plot FILE]

Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which must have no guests. Two guests of one core send each other
Ethernet frames, one after the other (round trip) and in batches of 32, each of which the receiver acknowledges:

    bridge               taps with vhost are ports of a bridge of the host, which switches between them
    macvtap bridge       macvtaps with vhost in bridge mode: the driver switches
    macvtap-vepa         the software edges of the product, with their rules: out, and back through the hairpin
    nft-vepa
    VF, internal switch  VFs, with the loopback bit of the NIC set, as the driver has it: the NIC switches
    VF, hairpin          VFs in the edge mode vepa: out, and back through the hairpin

Two ways each use the same guests: inside the host, and out and back. They are measured in turn, and compared with each other. The
manager is stopped meanwhile, as it would restore its edge mode. The three pairs run one after the other, maybe with another load.
Exits are those of both guests by hardware reason, including those of their timers. All of it is emulated, the NIC by threads of
the emulator: compare the ratios, and not with those of real hosts.

Prints medians and ratios; exits with status 1 if a frame was lost, or if the switch did not see each frame exactly once in each
direction, or none.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_lab import use_lab
from edges import LABELS, Measured, compare, read_port, report

from orchestrator.host.netlink import set_hairpin
from orchestrator.lab import switch
from orchestrator.lab.lab import Lab, execute, keeping_connection
from tests.harness.guest_image import FRAMES, make_frames_image, send_image
from tests.harness.lab_command import LabCommand
from tests.harness.netns import within

INSIDE = (Path(__file__).parent / "edges_lab_inside.py").read_text()
GUESTS = ("edge1", "edge2")
UPLINK = "nic0"
TRIPS, BATCHES, BATCH = 100, 20, 32
EXITS = ("exits, round trip", "exits, 60 bytes")
FIGURES = {"round trip": "us", "60 bytes": "frames/s", "1,514 bytes": "frames/s"} | dict.fromkeys(EXITS, "per frame")
Run = Callable[[str], str]
"""Runs a line of shell on the lab host."""

# For each edge mode the two ways that use its guests, and whether the switch sees their frames.
WAYS = {
    "nft-vepa": {"bridge": False, "nft-vepa": True},
    "vepa": {"VF, internal switch": False, "VF, hairpin": True},
    "macvtap-vepa": {"macvtap bridge": False, "macvtap-vepa": True},
}


def change(run: Run, inside: Callable[..., Any], name: str, taps: list[str | None]) -> None:
    """Makes this way of the guests' NICs, which are those of another way of the same guests."""
    match name:
        case "bridge":
            join = "".join(f"ip link set {tap} master inside; " for tap in taps)
            made = f"nft list ruleset > /run/edges.nft; nft flush ruleset; ip link add inside up type bridge; {join}"
            run(f"test -e /sys/class/net/inside || {{ {made} }}")
        case "nft-vepa":
            back = "".join(f"ip link set {tap} master {tap_bridge(tap)}; " for tap in taps)
            run(f"! test -e /sys/class/net/inside || {{ ip link delete inside; {back} nft -f /run/edges.nft; }}")
        case "macvtap bridge" | "macvtap-vepa":
            run("".join(f"ip link set {tap} type macvtap mode {'bridge' if 'bridge' in name else 'vepa'}; " for tap in taps))
        case _:
            inside("mode", UPLINK, "veb" if "internal" in name else "vepa")


def tap_bridge(tap: str | None) -> str:
    """The bridge, always down, whose only port a tap of `nft-vepa` is."""
    assert tap
    return tap.replace("nh-", "nb-", 1)


def silence() -> None:
    """The switch itself sends nothing: no neighbour discovery."""
    Path(f"/proc/sys/net/ipv6/conf/{switch.BRIDGE}/disable_ipv6").write_text("1")


class Failed(Exception):
    """A command on the lab host has failed."""


class Bench:
    """A lab with the image of the guests."""

    def __init__(self, lab: Lab, command: LabCommand) -> None:
        self.lab, self.command, self.port = lab, command, switch.port(lab.name)
        self.exits: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by way and figure
        self.frames: Counter[tuple[str, str]] = Counter()

    def run(self, line: str) -> str:
        done = execute(self.lab, line, timeout=120)
        if done.status:
            raise Failed(f"{line}: {done.stdout}{done.stderr}")
        return done.stdout

    def nohype(self, *words: str) -> str:
        done = self.command.run(list(words), 300)
        if done.status:
            raise Failed(f"nohype {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def inside(self, *words: str) -> Any:
        done = self.command.run(["-c", INSIDE, *words], 300)
        if done.status:
            raise Failed(f"{words}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout)

    def count_exits(self) -> dict[tuple[str, str], dict[str, float]]:
        """Per frame, by way and figure: the frequent reasons first."""
        return {
            key: {reason: count / self.frames[key] for reason, count in counts.most_common()}
            for key, counts in self.exits.items()
        }

    @contextmanager
    def guests(self, mode: str) -> Iterator[list[dict[str, Any]]]:
        """Two guests of this edge mode; the manager is stopped during the block."""
        quiet = f"sysctl -qw net.ipv6.conf.{UPLINK}.disable_ipv6=1"  # frames of the host would be counted
        self.run(f"{quiet}; timeout 60 sh -c 'until grep -qs 1 /sys/class/net/{UPLINK}/carrier; do sleep 0.2; done'")
        self.nohype("uplink", "set", UPLINK, "--edge", mode)
        accept = () if mode == "vepa" else ("--accept", "software-edge")
        made: list[dict[str, Any]] = []
        with ExitStack() as undo:
            undo.callback(self.command.run, ["uplink", "set", UPLINK, "--edge", "configured"], 300)
            for name in GUESTS:
                words = [name, "--memory", "128M", "--image", FRAMES, "--address", f"10.9.0.{len(made) + 1}/24", *accept]
                undo.callback(self.command.run, ["guest", "delete", name], 300)
                made.append(json.loads(self.nohype("guest", "create", *words, "--json")))
            for name in GUESTS:
                self.nohype("guest", "start", name, "--wait", "240")
            undo.callback(self.run, "systemctl start nohyped.socket nohyped")
            self.run("systemctl stop nohyped.socket nohyped")
            yield [guest["nics"][0] for guest in made]

    def measure(self, way: Measured, macs: list[str]) -> bool:
        before = read_port(self.port.netns, self.port.interface)
        sent = way.sent
        for figure, found in self.inside("measure", *GUESTS, *macs, str(TRIPS), str(BATCHES)).items():
            way.sent, way.lost = way.sent + found["sent"], way.lost + found["lost"]
            seconds = found["seconds"]
            way.found[figure].append(seconds * 1e6 / TRIPS if figure == "round trip" else BATCH * BATCHES / seconds)
            if f"exits, {figure}" in EXITS:
                way.found[f"exits, {figure}"].append(sum(found["exits"].values()) / found["sent"])
                self.exits[way.name, figure].update(found["exits"])
                self.frames[way.name, figure] += found["sent"]
        print(f"{way.name}: " + ", ".join(f"{name} {values[-1]:,.1f}" for name, values in way.found.items()), flush=True)
        into, out = (now - then for now, then in zip(read_port(self.port.netns, self.port.interface), before, strict=True))
        return Measured(way.name, way.outside, sent=way.sent - sent, lost=way.lost).is_right(into, out)


def run(bench: Bench, rounds: int) -> tuple[dict[str, Measured], bool]:
    """The ways with their figures, and whether each frame took its way."""
    ways: dict[str, Measured] = {}
    right = True
    for mode, names in WAYS.items():
        started = time.monotonic()
        with bench.guests(mode) as nics:
            taps, macs = [nic.get("tap") for nic in nics], [nic["mac"] for nic in nics]
            bench.inside("echo", GUESTS[1], macs[1])
            print(f"{mode}: guests after {time.monotonic() - started:.0f} s", flush=True)
            ways.update({name: Measured(name, outside) for name, outside in names.items()})
            for number in range(rounds):
                for name in names if number % 2 else reversed(names):
                    change(bench.run, bench.inside, name, taps)
                    bench.inside("warm", *GUESTS, *macs)
                    right &= bench.measure(ways[name], macs)
            change(bench.run, bench.inside, mode if mode != "vepa" else "VF, hairpin", taps)
    return ways, right


def find_base(ways: Mapping[str, Measured], name: str) -> Measured:
    """The way of the same guests inside the host."""
    return next(ways[next(iter(names))] for names in WAYS.values() if name in names)


def report_exits(exits: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
    for (name, figure), reasons in exits.items():
        listed = ", ".join(f"{reason} {count:.2f}" for reason, count in reasons.items() if count >= 0.005)
        print(f"exits per frame, {figure}, {name}: {listed}")


def draw(ways: Mapping[str, Measured], exits: Mapping[tuple[str, str], Mapping[str, float]], file: Path) -> None:
    """Ratios of the ways through the switch to those inside, with their range; and the exits per frame of a round trip."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    outside = [name for name in ways if find_base(ways, name) is not ways[name]]
    for number, name in enumerate(outside):
        ratios = [compare(ways[name], find_base(ways, name), figure) for figure in LABELS]
        medians = [statistics.median(one) for one in ratios]
        at = [place + (number - 1) * 0.27 for place in range(len(LABELS))]
        spread = [[median - one[0] for median, one in zip(medians, ratios, strict=True)],
                  [one[-1] - median for median, one in zip(medians, ratios, strict=True)]]  # fmt: skip
        left.bar(at, medians, 0.25, yerr=spread, capsize=3, label=f"{name} / {find_base(ways, name).name}")
        for place, median in zip(at, medians, strict=True):
            left.text(place, 0.03, f"{median:.2f}", ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(LABELS)), list(LABELS.values()))
    left.set(ylabel="ratio, median and range", title="Out and back through the switch, and inside")
    left.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    left.legend(fontsize=8)
    reasons = list(dict.fromkeys(reason for name in ways for reason in exits[name, "round trip"]))
    bottom = [0.0] * len(ways)
    for reason in reasons:
        counts = [exits[name, "round trip"].get(reason, 0) for name in ways]
        if max(counts) >= 0.05:
            right.bar(range(len(ways)), counts, 0.7, bottom=bottom, label=reason)
            bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
    right.set_xticks(range(len(ways)), [name.replace(" ", "\n").replace(",", "") for name in ways], fontsize=8)
    right.set(ylabel="exits per frame", title="VM exits by reason, frames one after the other")
    right.legend(fontsize=8, ncols=4, loc="upper center")
    right.set_ylim(0, max(bottom) * 1.25)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=110)
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=Path("build/benchmarks/edges-lab.png"))
    options = parser.parse_args()
    with use_lab() as lab, keeping_connection(lab) as kept, tempfile.TemporaryDirectory() as folder:
        command = LabCommand(kept)
        try:
            send_image(kept, make_frames_image(Path(folder)))
            bench = Bench(kept, command)
            set_hairpin(bench.port.interface, bench.port.netns, on=True)
            within(bench.port.netns, silence)
            ways, right = run(bench, max(options.rounds, 2))
            bench.nohype("image", "delete", FRAMES)
        except Failed as error:
            sys.exit(str(error))
        finally:
            command.close()
    report(list(ways.values()), [find_base(ways, name) for name in ways], FIGURES)
    report_exits(bench.count_exits())
    draw(ways, bench.count_exits(), options.plot)
    sys.exit(not right)


if __name__ == "__main__":
    main()
