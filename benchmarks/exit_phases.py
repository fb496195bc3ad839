"""Measures a guest's VM exits before and after the end of its boot, in a lab, and how fast floods of them are stopped.

    .venv/bin/python benchmarks/exit_phases.py [--idle SECONDS] [--plot FILE]

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which needs one free core. A guest of the image
`minimal` is started, and its exits are read twice per second until it has been idle for 60 s after its boot. Then a guest per
kind of exits floods, and its policy kills it; the times from the first exits are measured by the lab's clock. Exits with status 1
if there was port I/O or an access to an emulated device after the boot, or a guest was not killed within 2 s. Saves a picture
with --plot.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench_lab import use_lab

from orchestrator.lab import lab as labs
from orchestrator.lab.lab import Lab

INSIDE = Path(__file__).with_name("exit_phases_inside.py")
WANTED = 2.0
"""Seconds from the first exits of a flood to the end of its guest."""


def main() -> int:
    parser = argparse.ArgumentParser(description="VM exits before and after the end of a guest's boot")
    parser.add_argument("--idle", type=float, default=60)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with use_lab() as lab:
        found = measure(lab, options.idle)
    if options.plot:
        draw(found, options.plot)
    return 0 if report(found) else 1


def measure(lab: Lab, idle: float) -> dict[str, Any]:
    done = labs.execute(lab, ["/opt/nohype/bin/python3", "-", str(idle)], input=INSIDE.read_bytes(), timeout=idle + 900)
    if done.status:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


def report(found: dict[str, Any]) -> bool:
    """Prints the result; returns whether it is as wanted."""
    print(f"{'REASON':20} {'BOOT':>8} {'IDLE':>8}  ({found['idle']:.0f} s after the boot)")
    for reason in sorted(found["boot"].keys() | found["run"].keys(), key=lambda name: -found["boot"].get(name, 0)):
        print(f"{reason:20} {found['boot'].get(reason, 0):8} {found['run'].get(reason, 0):8}")
    print(f"{'all':20} {sum(found['boot'].values()):8} {sum(found['run'].values()):8}")
    devices = found["run"].get("io", 0) + found["mmio"]
    print(f"port I/O and accesses to devices after the boot: {devices}, wanted: 0")
    for kind, times in found["floods"].items():
        texts = [f"{name} {'never' if seconds is None else f'after {seconds:.2f} s'}" for name, seconds in times.items()]
        print(f"flood of {kind}: {', '.join(texts)}; wanted: {WANTED:g} s")
    ends = [times["killed"] for times in found["floods"].values()]
    return not devices and all(seconds is not None and seconds <= WANTED for seconds in ends)


def draw(found: dict[str, Any], file: Path) -> None:
    """Exits per second over time, on a logarithmic scale."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    samples = found["samples"]
    reasons = sorted({name for _, counts in samples for name in counts}, key=lambda name: -samples[-1][1].get(name, 0))
    for name in reasons[:7]:
        pairs = list(zip(samples, samples[1:], strict=False))
        times = [(before + after) / 2 for (before, _), (after, _) in pairs]
        rates = [max(0.5, (new.get(name, 0) - old.get(name, 0)) / (after - before)) for (before, old), (after, new) in pairs]
        axes.step(times, rates, where="mid", label=name, linewidth=1)
    axes.axvline(found["boundary"], color="black", linestyle="--", linewidth=1)
    axes.text(found["boundary"], axes.get_ylim()[1], " boot is over", va="top")
    axes.set_yscale("log")
    axes.set_xlabel("seconds after the request")
    axes.set_ylabel("VM exits per second (0 is drawn as 0.5)")
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(file, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
