"""Tables and picture of peers.py, from its results. Pure, except for ``draw``."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "nohype"
PEERS = ("virt-install", "nova", "kubevirt", OURS)
HOUSEKEEPING, APPLICATION = "0", "1"
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    label: str
    read: Callable[[Run], float]
    digits: int = 0


def rate(run: Run, phase: str, count: float) -> float:
    return float(count / run[phase]["seconds"])


def exits(phase: str, vcpu: str) -> Callable[[Run], float]:
    return lambda run: rate(run, phase, sum(run[phase]["exits"][vcpu].values()))


def switches(phase: str) -> Callable[[Run], float]:
    return lambda run: rate(run, phase, run[phase]["switches"])


def interrupts(phase: str) -> Callable[[Run], float]:
    return lambda run: rate(run, phase, sum(run[phase]["interrupts"].values()))


def count_boot(run: Run) -> float:
    return float(sum(sum(reasons.values()) for reasons in run["boot"].values()))


FIGURES = (
    Figure("exits from start to ready", count_boot),
    Figure("seconds from request to ready", lambda run: float(run["ready"]), 1),
    Figure("seconds from the start of the guest's kernel to ready", lambda run: float(run["uptime"]), 1),
    Figure("exits/s of the application vCPU, idle", exits("idle", APPLICATION), 2),
    Figure("exits/s of the application vCPU, busy", exits("busy", APPLICATION), 2),
    Figure("exits/s of the housekeeping vCPU, idle", exits("idle", HOUSEKEEPING), 1),
    Figure("exits/s of the housekeeping vCPU, busy", exits("busy", HOUSEKEEPING), 1),
    Figure("context switches/s to other threads on the guest's CPUs, idle", switches("idle"), 2),
    Figure("context switches/s to other threads on the guest's CPUs, busy", switches("busy"), 2),
    Figure("interrupts/s of the host on the guest's CPUs, idle", interrupts("idle"), 1),
    Figure("interrupts/s of the host on the guest's CPUs, busy", interrupts("busy"), 1),
    Figure("MB of QEMU in RAM, without the guest's memory", lambda run: run["memory"] / 1e6, 1),
)


def find_missing(runs: Sequence[Run]) -> list[str]:
    """Figures that a peer has no value of, in any of its rounds, and peers with fewer rounds than others."""
    counts = {peer: sum(run["peer"] == peer for run in runs) for peer in PEERS}
    most = max(1, *counts.values())
    missing = [f"{peer}: {count} of {most} rounds" for peer, count in counts.items() if count < most]
    for run in runs:
        for figure in FIGURES:
            if try_read(figure, run) is None:
                missing.append(f"{run['peer']}: {figure.label}")
        missing += [f"{run['peer']}: exits of vCPU {vcpu} until ready" for vcpu in (HOUSEKEEPING, APPLICATION)
                    if not run.get("boot", {}).get(vcpu)]  # fmt: skip
    return missing


def try_read(figure: Figure, run: Run) -> float | None:
    """None if the run has not this figure."""
    try:
        return figure.read(run)
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def summarize(figure: Figure, runs: Sequence[Run], peer: str) -> str:
    """Median and range of a peer's rounds."""
    values = [value for run in runs if run["peer"] == peer and (value := try_read(figure, run)) is not None]
    if not values:
        return "missing"
    low, middle, high = (f"{value:,.{figure.digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def list_reasons(runs: Sequence[Run], read: Callable[[Run], Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median by reason and peer; the reasons in descending order of their largest value. Runs without the figure are left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        with suppress(KeyError):
            for reason, value in read(run).items():
                found.setdefault(reason, {}).setdefault(run["peer"], []).append(value)
    rounds = {peer: sum(run["peer"] == peer for run in runs) for peer in PEERS}
    medians = {
        reason: {peer: statistics.median(values + [0.0] * (rounds[peer] - len(values))) for peer, values in peers.items()}
        for reason, peers in found.items()
    }
    return dict(sorted(medians.items(), key=lambda item: -max(item[1].values())))


def read_boot(run: Run) -> dict[str, float]:
    sums: dict[str, float] = {}
    for reasons in run["boot"].values():
        for reason, count in reasons.items():
            sums[reason] = sums.get(reason, 0) + count
    return sums


def read_rates(phase: str, vcpu: str) -> Callable[[Run], dict[str, float]]:
    return lambda run: {reason: rate(run, phase, count) for reason, count in run[phase]["exits"][vcpu].items()}


def write_tables(runs: Sequence[Run]) -> str:
    """The Markdown that docs/peers.md contains."""
    if not runs:
        return "no results\n"
    lines = [describe(runs), "", f"| median (range) | {' | '.join(PEERS)} |", "|---" * (len(PEERS) + 1) + "|"]
    lines += [f"| {figure.label} | {' | '.join(summarize(figure, runs, peer) for peer in PEERS)} |" for figure in FIGURES]
    reasons = {
        "exits from start to ready, by reason": (read_boot, 0),
        "exits/s of the busy application vCPU, by reason": (read_rates("busy", APPLICATION), 2),
        "exits/s of the idle housekeeping vCPU, by reason": (read_rates("idle", HOUSEKEEPING), 1),
    }
    for title, (read, digits) in reasons.items():
        lines += ["", f"| {title} | {' | '.join(PEERS)} |", "|---" * (len(PEERS) + 1) + "|"]
        for reason, medians in list(list_reasons(runs, read).items())[:10]:
            lines.append(f"| `{reason}` | {' | '.join(f'{medians.get(peer, 0):,.{digits}f}' for peer in PEERS)} |")
    return "\n".join(lines) + "\n"


def describe(runs: Sequence[Run]) -> str:
    """Where the figures come from."""
    host, last = runs[-1]["host"], runs[-1]
    loads = [run["load"] for run in runs]
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    rounds = sum(run["peer"] == OURS for run in runs)
    head = f"{rounds} {'round' if rounds == 1 else 'rounds'}, {runs[0]['date'][:10]}, commit {commits}"
    windows = ", ".join(f"{phase} {show_range([run[phase]['seconds'] for run in runs])} s" for phase in ("idle", "busy"))
    versions = f"Linux {host['kernel']}, QEMU {host['qemu']}, libvirt {host['libvirt']}"
    machine = f"`{last['accelerator']}` on a machine of {last['machine_cpus']} CPUs with a load of {show_range(loads)}"
    return f"{head}; {windows}; lab host: {versions}; {machine}"


def show_range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def draw(runs: Sequence[Run], file: Path) -> None:
    """Medians as bars, and the range of the rounds as lines."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [FIGURES[number] for number in (0, 3, 4, 8)]
    figure, places = pyplot.subplots(1, len(shown), figsize=(13, 4), layout="constrained")
    for axes, one in zip(places, shown, strict=True):
        for place, peer in enumerate(PEERS):
            values = [value for run in runs if run["peer"] == peer and (value := try_read(one, run)) is not None] or [0.0]
            axes.bar(place, statistics.median(values), color=f"C{place}")
            axes.plot([place, place], [min(values), max(values)], color="black", linewidth=1)
            label = f"{statistics.median(values):,.{one.digits}f}"
            axes.annotate(label, (place, max(values)), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(range(len(PEERS)), PEERS, rotation=30, ha="right")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.set_title(one.label.replace(" of the ", " of the\n").replace(" on the ", "\non the "), fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    raise SystemExit("run peers.py --rounds 0")
