"""Kills a manager at a random point of a random operation, many times, and checks for losses (tests/harness/crash.py).

    .venv/bin/python benchmarks/crash_runs.py [--runs 1000] [--jobs 2] [--first 0]
    .venv/bin/python benchmarks/crash_runs.py --seed N      # one run again, with its folder kept

Prints counts and the duration of recoveries, in the runs and on a host with 100 guests. Exits with 1 if anything was lost, or if
a recovery with 100 guests took 2 s or more.
"""

import argparse
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.harness.crash import CHANGES, Outcome, measure_recovery, run_crash

GUESTS, REPEATS, LIMIT = 100, 30, 2.0


def run_seed(seed: int) -> Outcome:
    """One run; a successful one leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix=f"crash-{seed}-") as folder:
        return run_crash(Path(folder) / "world", seed)


def describe(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum in ms."""
    ordered = sorted(seconds)
    p99 = ordered[max(0, -(-len(ordered) * 99 // 100) - 1)]
    return f"median {statistics.median(ordered) * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, max {ordered[-1] * 1e3:.0f} ms"


def find_place(point: str) -> str:
    if point.removeprefix("before ").startswith(CHANGES):
        return "before a statement of the ledger"
    return f"{point.partition(' ')[0]} a change of host or guests"


def show(outcome: Outcome) -> None:
    """A run with a loss."""
    state = "then the host was booted" if outcome.rebooted else f"{outcome.running} guests running"
    print(f"seed {outcome.seed}: killed {outcome.point!r} during {outcome.operation!r}, {state}")
    for fault in outcome.faults:
        print(f"  - {fault[:500]}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--seed", type=int, help="only this run; its folder is kept")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        folder = Path(tempfile.mkdtemp(prefix=f"crash-{arguments.seed}-"))
        outcome = run_crash(folder / "world", arguments.seed)
        show(outcome)
        print(f"host, ledger and guests are in {folder}")
        return bool(outcome.faults)
    began = time.perf_counter()
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("fork")) as pool:
        outcomes = list(pool.map(run_seed, range(arguments.first, arguments.first + arguments.runs), chunksize=4))
    bad = [outcome for outcome in outcomes if outcome.faults]
    for outcome in bad:
        show(outcome)
    operations = Counter(outcome.operation.split()[0] for outcome in outcomes if outcome.operation)
    places = Counter(find_place(outcome.point) for outcome in outcomes)
    print(f"{len(outcomes)} runs in {time.perf_counter() - began:.0f} s; {len(bad)} with faults")
    print("killed during: " + ", ".join(f"{kind} {number}" for kind, number in operations.most_common()))
    print("killed: " + ", ".join(f"{place} {number}" for place, number in places.most_common()))
    print(f"guests running at those moments: {sum(outcome.running for outcome in outcomes)}")
    print(f"recovery in these runs: {describe([outcome.recovery for outcome in outcomes])}")
    folder = Path(tempfile.mkdtemp(prefix="crash-recovery-"))
    times = measure_recovery(folder / "world", GUESTS, REPEATS)
    shutil.rmtree(folder)
    print(f"recovery with {GUESTS} guests, {len(times)} times: {describe(times)}")
    return bool(bad) or max(times) >= LIMIT


if __name__ == "__main__":
    sys.exit(main())
