"""Measures what counting VM exits costs a guest that computes, in a lab.

    .venv/bin/python benchmarks/counting_cost.py [ROUNDS]

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which needs one free core. A guest of the image
`minimal` computes on one vCPU, with the tick of its kernel, and makes a hypercall after each piece of work; KVM's own counter of
hypercalls tells how many pieces it has done. In each round the same guest works with and without the histograms of exits, in
random order; the manager is stopped meanwhile, since it would restore them. Exits with status 1 if the median cost exceeds 1 %.
"""

import json
import statistics
import sys
from pathlib import Path

from bench_lab import use_lab

from orchestrator.lab import lab as labs

INSIDE = Path(__file__).with_name("counting_cost_inside.py")
WANTED = 0.01
_SECONDS_PER_ROUND = 4.0


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with use_lab() as lab:
        words = ["/opt/nohype/bin/python3", "-", str(rounds)]
        done = labs.execute(lab, words, input=INSIDE.read_bytes(), timeout=300 + _SECONDS_PER_ROUND * rounds)
    if done.status:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    cost = report(found["rounds"], found["exits"])
    return 0 if cost <= WANTED else 1


def report(rounds: list[tuple[float, float]], exits: float) -> float:
    """``rounds``: pieces per second without and with counting. Prints the result; returns the median cost, as a share."""
    costs = sorted(1 - counted / plain for plain, counted in rounds)
    low, median, high = statistics.quantiles(costs, n=4)
    error = 1.25 * statistics.stdev(costs) / len(costs) ** 0.5  # standard error of a median (of a normal distribution)
    print(f"{len(rounds)} rounds, {exits:.0f} exits/s of the working vCPU")
    print(f"pieces of work per second without counting: {statistics.median(plain for plain, _ in rounds):.1f} (median)")
    print(f"cost of counting: median {median:.2%} (standard error {error:.2%}), quartiles {low:.2%} and {high:.2%}")
    print(f"wanted: at most {WANTED:.0%}")
    return median


if __name__ == "__main__":
    sys.exit(main())
