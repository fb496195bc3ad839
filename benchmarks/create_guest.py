"""Measures what the manager adds to libvirt: `create` against `virDomainCreateXML` of the same XML, in pairs in one lab.

    .venv/bin/python benchmarks/create_guest.py [PAIRS]

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB. The first pair warms up and is not counted.
"""

import json
import statistics
import sys
from pathlib import Path

from bench_lab import use_lab

from orchestrator.lab import lab as labs

INSIDE = Path(__file__).with_name("create_guest_inside.py")


def main() -> None:
    """Prints minimum, median and maximum of both and of their ratio."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with use_lab() as lab:
        done = labs.execute(lab, ["/opt/nohype/bin/python", "-", str(pairs)], input=INSIDE.read_bytes(), timeout=3600)
        if done.status:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in done.stdout.splitlines()][1:]
        for what in ("manager", "libvirt"):
            print(_row(f"{what}, s", [line[what] for line in lines]))
        print(_row("ratio", [line["manager"] / line["libvirt"] for line in lines]))


def _row(name: str, values: list[float]) -> str:
    least, middle, most = min(values), statistics.median(values), max(values)
    return f"{name:12} min {least:6.2f}  median {middle:6.2f}  max {most:6.2f}  ({len(values)} pairs)"


if __name__ == "__main__":
    main()
