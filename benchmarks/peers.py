"""Compares a guest with guests of other stacks on the same host, in a lab: VM exits, disturbances of its cores, time until ready.

    .venv/bin/python benchmarks/peers.py [--rounds 3] [--idle SECONDS] [--busy SECONDS] [--results FILE] [--add]
                                         [--table FILE] [--plot FILE]

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB, which must be without guests. Each round starts one
guest of two vCPUs after the other, in changing order, with the same image, kernel command line and workload:

    virt-install, nova, kubevirt   by libvirt, from the domain XML that these programs write (`benchmarks/peers/`, with sources)
    nohype                         by the manager

In the guest vCPU 0 does the housekeeping, and vCPU 1 is isolated for an application. Exits are counted by a trace instance of the
benchmark's own. Each guest is appended to the results (JSON lines); --add keeps those of an earlier run, and --rounds 0 only
reports. A run that is cut leaves nothing on the lab host. Prints the table; exits with status 1 if a guest did not become ready,
or a figure is missing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_lab import use_lab
from peers_report import OURS, PEERS, draw, find_missing, write_tables

from orchestrator.errors import OrchestratorError
from orchestrator.lab import lab as labs
from orchestrator.lab.lab import Lab
from orchestrator.ssh import Stream

FOLDER = Path(__file__).with_name("peers")
INSIDE = Path(__file__).with_name("peers_inside.py")
TICKLESS = "isolcpus=managed_irq,domain,1 nohz_full=1 rcu_nocbs=1 irqaffinity=0"
PER_GUEST = 700
"""Seconds that a guest takes at most, without the measurements."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=30)
    parser.add_argument("--busy", type=float, default=20)
    parser.add_argument("--results", type=Path, default=Path("build/benchmarks/peers.jsonl"))
    parser.add_argument("--add", action="store_true", help="keep the rounds in the results")
    parser.add_argument("--table", type=Path, help="file for the table in Markdown")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if not options.add and options.rounds:
        options.results.unlink(missing_ok=True)
    if options.rounds:
        with use_lab() as lab:
            for order in list_orders(read_results(options.results), options.rounds):
                measure(lab, order, options)
    runs = read_results(options.results)
    text = write_tables(runs)
    print(text)
    if options.table:
        options.table.write_text(text)
    if options.plot:
        draw(runs, options.plot)
    missing = find_missing(runs)
    for line in missing:
        print(f"missing: {line}", file=sys.stderr)
    return 1 if missing else 0


def list_orders(runs: Sequence[Mapping[str, Any]], rounds: int) -> list[list[str]]:
    """The peers to measure, by round. A round that was cut is completed first."""
    counts = {peer: sum(run["peer"] == peer for run in runs) for peer in PEERS}
    done = max(counts.values())
    rest = [peer for peer in PEERS if counts[peer] < done]
    return [*([rest] if rest else []), *(rotate(PEERS, number) for number in range(done, done + rounds))]


def measure(lab: Lab, order: list[str], options: argparse.Namespace) -> None:
    """Appends each guest of a round to the results as soon as it is measured. Raises SystemExit if one failed."""
    print(f"round: {', '.join(order)}", flush=True)
    common = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": read_commit(), "machine_cpus": os.cpu_count(),
              "accelerator": lab.state.accel}  # fmt: skip
    output, errors = bytearray(), bytearray()

    def save(stream: str, piece: bytes) -> None:
        if stream == "stderr":
            errors.extend(piece)
            return
        output.extend(piece)
        while b"\n" in output:
            line, _, rest = bytes(output).partition(b"\n")
            output[:] = rest
            if line:
                append_result(options.results, {**json.loads(line), **common, "load": os.getloadavg()[1]})

    limit = len(order) * (PER_GUEST + options.idle + options.busy)
    try:
        status = run_inside(lab, order, options, limit, save)
    except BaseException:
        # The process inside has been stopped, maybe before it has cleaned up.
        with suppress(OrchestratorError):
            run_inside(lab, [], options, 60, lambda *_: None)
        raise
    if status:
        sys.exit(f"the measurement ended with status {status}: {errors.decode(errors='replace').strip()}")


def run_inside(lab: Lab, order: list[str], options: argparse.Namespace, limit: float, stream: Stream) -> int:
    """Without peers it only cleans up."""
    job = {"order": order, "idle": options.idle, "busy": options.busy, "cmdline": TICKLESS,
           "peers": {name: (FOLDER / f"{name}.xml").read_text() for name in PEERS if name != OURS}}  # fmt: skip
    command = ["/opt/nohype/bin/python", "-", json.dumps(job)]
    return labs.execute(lab, command, input=INSIDE.read_bytes(), timeout=limit, stream=stream).status


def append_result(file: Path, result: dict[str, Any]) -> None:
    with file.open("a") as results:
        results.write(json.dumps(result) + "\n")


def rotate(names: tuple[str, ...], number: int) -> list[str]:
    """Each name is first once in as many rounds as there are names."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def read_commit() -> str:
    """Of this repository, with "-dirty" if what is measured differs from it."""
    git = ["git", "-C", str(FOLDER.parents[1])]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    measured = ["benchmarks", "orchestrator", "guest-images"]
    changes = subprocess.run([*git, "status", "--porcelain", *measured], capture_output=True, text=True, check=False).stdout
    return (commit or "unknown") + ("-dirty" if changes else "")


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrchestratorError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the lab host has been cleaned up")
