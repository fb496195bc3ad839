"""Kills the manager of a lab at random moments of operations on a real guest, and looks whether anything was lost or doubled.

    .venv/bin/python benchmarks/crash_lab.py [RUNS] [--seed N]
    .venv/bin/python benchmarks/crash_lab.py --seed N --only RUN     # one run again

Needs root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which must have no guests. A bystander runs all the time
and must not notice. Prints a line of JSON a run, then a table, then a line of JSON with the sums. Exits with 1 after any fault:
what is still wrong after a while, and a guest that was stopped, or something that two have, even for a moment. A run draws the
same operation and moments again; what the manager is doing at such a moment may differ.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from random import SystemRandom
from typing import Any

from bench_lab import use_lab

from orchestrator.lab import lab as labs
from orchestrator.lab.demo import ask
from orchestrator.lab.health import check_emulation

PARTS = tuple(Path(__file__).with_name(f"crash_lab_{part}.py") for part in ("reading", "checks", "inside"))
"""What runs in the lab. They lie beside each other there, in root's folder; the last one is begun with."""
LOST = ("stopped", "doubled cores", "doubled VFs", "doubled MACs", "leaked claims", "leaked VFs", "leaked MACs", "leaked pages")
RUN = 600
"""Seconds that a run takes at the most."""


def main() -> int:
    """The benchmark; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1_000_000))
    parser.add_argument("--only", type=int, default=-1, help="number of the one run to do")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with use_lab() as lab:
        if ask(lab, "guest", "list"):
            sys.exit(f"the lab {lab.name} has guests: delete them first")
        began = time.monotonic()
        found = run_inside(lab, arguments.runs, arguments.seed, arguments.only)
        check_emulation(lab)
    summary = summarise(found[1:], found[0], arguments.seed, time.monotonic() - began)
    print_table(found[1:])
    print(json.dumps(summary))
    return bool(summary["faults"])


def run_inside(lab: labs.Lab, runs: int, seed: int, only: int) -> list[dict[str, Any]]:
    """What the lab has printed, a value a line; shown as it comes."""
    output = bytearray()

    def show(name: str, data: bytes) -> None:
        if name == "stdout":
            output.extend(data)
        (sys.stdout if name == "stdout" else sys.stderr).write(data.decode(errors="replace"))
        sys.stdout.flush()

    with lab.shell() as connection:
        for part in PARTS:
            connection.put(part, f"/root/{part.name}")
    words = ["/opt/nohype/bin/python", f"/root/{PARTS[-1].name}", str(runs), str(seed), str(only)]
    done = labs.execute(lab, words, timeout=RUN * (runs + 1), stream=show)
    found = [json.loads(line) for line in output.decode().splitlines()]
    if done.status or not found:
        sys.exit(f"the runs in the lab ended with status {done.status} after {max(0, len(found) - 1)} of {runs}")
    return found


def summarise(runs: list[dict[str, Any]], first: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """The sums over all runs. What was lost is counted twice: what makes the run fail, and what was wrong when it was ready."""
    faults = [fault for run in runs for fault in run["faults"]]
    slips = [slip for run in runs for slip in run["slips"]]
    recoveries = [run["recovery"] for run in runs]
    return {
        "runs": len(runs),
        "seed": seed,
        "seconds": round(seconds),
        "runs with faults": sum(bool(run["faults"]) for run in runs),
        "faults": len(faults),
        **count_lost(faults),
        "wrong when ready": len(slips),
        **{f"{kind} when ready": number for kind, number in count_lost(slips).items()},
        "killed twice": sum(run["twice"] for run in runs),
        "start to ready, s": {
            "median": round(statistics.median(recoveries), 2),
            "max": max(recoveries),
            "nothing to recover": round(first["clean"], 2),
        },
    }


def count_lost(wrong: list[str]) -> dict[str, int]:
    """How many sentences are of each kind of loss."""
    return {kind: sum(text.startswith(kind) for text in wrong) for kind in LOST}


def print_table(runs: list[dict[str, Any]]) -> None:
    """Operations by what the killed manager left, and what the next one did."""
    rows = Counter()  # type: Counter[tuple[str, str, str, bool]]
    for run in runs:
        first = run["left"][0]
        left = f"{first['state']}, {first['records']} changes{', QEMU' if first['life'] else ''}"
        rows[run["operation"], left, " ".join(run["did"]) or "-", bool(run["faults"])] += 1
    print(f"\n{'RUNS':>4} {'FAULTS':6} {'OPERATION':9} {'LEFT BY THE KILL':32} EVENTS OF THE GUEST, THE KILLED MANAGER'S TOO")
    for (operation, left, did, faulty), number in sorted(rows.items()):
        print(f"{number:>4} {'FAULTS' if faulty else '-':6} {operation:9} {left:32} {did}")


if __name__ == "__main__":
    sys.exit(main())
