"""Kills the manager of a lab at random moments of operations on a real guest, and checks that nothing is lost or claimed twice.

    .venv/bin/python benchmarks/crash_lab.py [RUNS] [--seed N]
    .venv/bin/python benchmarks/crash_lab.py --seed N --only RUN     # one run again

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which must have no guests. A guest, the bystander, runs
all the time and must not be affected. Prints a line of JSON per run, then a table, then a line of JSON with totals. Exits
with 1 after any fault: a difference that persists, a stopped guest, or a double claim even for a moment. The same seed and run
repeat the operation and the moments; what the manager does at such a moment may differ.
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
"""Programs that run in the lab, next to each other in root's folder; the last one is started."""
LOST = ("stopped", "doubled cores", "doubled VFs", "doubled MACs", "leaked claims", "leaked VFs", "leaked MACs", "leaked pages")
RUN = 600
"""Maximum seconds per run."""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1_000_000))
    parser.add_argument("--only", type=int, default=-1, help="number of the only run to do")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with use_lab() as lab:
        if ask(lab, "guest", "list"):
            sys.exit(f"lab {lab.name} has guests: delete them first")
        began = time.monotonic()
        found = run_inside(lab, arguments.runs, arguments.seed, arguments.only)
        check_emulation(lab)
    summary = summarise(found[1:], found[0], arguments.seed, time.monotonic() - began)
    print_table(found[1:])
    print(json.dumps(summary))
    return bool(summary["faults"])


def run_inside(lab: labs.Lab, runs: int, seed: int, only: int) -> list[dict[str, Any]]:
    """The output of the lab, one JSON value per line; shown immediately."""
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
        sys.exit(f"the runs in the lab exited with status {done.status} after {max(0, len(found) - 1)} of {runs}")
    return found


def summarise(runs: list[dict[str, Any]], first: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """Totals of all runs: faults, and differences at the moment when the manager was ready."""
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
    """Number of findings per kind."""
    return {kind: sum(text.startswith(kind) for text in wrong) for kind in LOST}


def print_table(runs: list[dict[str, Any]]) -> None:
    """Operations by the state that the killed manager left and the actions of the next one."""
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
