"""Kills controller, slurmds, managers and job scripts of a fleet at random, many times, and checks for losses.

    .venv/bin/python benchmarks/fleet_kills.py [--rounds 200] [--seed 1] [--release here|debian13] [--logs DIR]

Requires root. Real munge, slurmctld and slurmd in namespaces, a real manager in front of each of two fake hosts
(tests/harness/fleet_kills.py). Slurm is that of this machine's release, or that of Debian 13 in a root of its own (--release).
One program is killed per round; in addition managers kill themselves in the middle of changes. Prints a line per round, then
counts. Exits with 1 if a guest was lost, doubled or orphaned, or if a place was given twice.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.harness.fleet_kills import Outcome, run_kills
from tests.harness.large_folder import large_folder
from tests.harness.slurm import Cluster, running
from tests.harness.slurm_root import HERE, RELEASES


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--release", choices=RELEASES, default=HERE)
    parser.add_argument("--logs", type=Path, help="folder for the logs of Slurm, of the steps and of the managers")
    arguments = parser.parse_args()
    began = time.monotonic()
    with large_folder("kills") as folder, running(folder, release=arguments.release) as cluster:
        print(cluster.read_version())
        try:
            outcome = run_kills(cluster, arguments.rounds, arguments.seed, partial(print, flush=True))
        finally:
            if arguments.logs:
                save_logs(cluster, arguments.logs)
        report(outcome, time.monotonic() - began)
    return bool(outcome.faults)


def save_logs(cluster: Cluster, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in cluster.run("sh", "-c", "ls /var/log/slurm/*.log").stdout.split():
        (folder / Path(name).name).write_text(cluster.run("cat", name).stdout)
    for host in cluster.hosts:
        events = cluster.manage("events", "--json", host=host.name, check=False)
        (folder / f"{host.name}.events").write_text(events.stdout or events.stderr)


def report(outcome: Outcome, seconds: float) -> None:
    kinds = ", ".join(f"{kind} {count}" for kind, count in outcome.kills.most_common())
    states = ", ".join(f"{state.lower()} {count}" for state, count in outcome.ended.most_common())
    print(f"{sum(outcome.kills.values())} kills in {seconds:.0f} s: {kinds}")
    print(f"guests: {outcome.submitted} submitted, {outcome.started} starts, {outcome.cancelled} cancelled; at the end: {states}")
    print(f"not started, with a message: {len(outcome.not_started)} {' '.join(outcome.not_started)}")
    for title, found in (
        ("lost", outcome.lost), ("doubled", outcome.doubled), ("orphaned", outcome.orphaned),
        ("places given twice", outcome.shared), ("other errors", outcome.errors), ("nodes taken out of use", outcome.drained),
    ):  # fmt: skip
        print(f"{title}: {len(found)}")
        for line in found:
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
