"""Sends ten thousand generated requests to all endpoints as tenants and operator: no 5xx, no data of another tenant.

    python -m benchmarks.api_fuzz [--cases 10000] [--seed 1]

Real sockets, TLS, manager and ledger; fake host and hypervisor.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.harness.api_fuzz import ROLES, fuzz, serve_target


def main() -> int:
    """Prints a summary of the responses as JSON. Status 1 after any failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="total of all roles")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serve_target(Path(folder)) as target:
        outcome = fuzz(target, -(-arguments.cases // len(ROLES)), arguments.seed)
    answers = {
        role: {str(status): count for (of, status), count in sorted(outcome.answers.items()) if of == role} for role in ROLES
    }
    report = {
        "cases": sum(outcome.answers.values()), "seed": arguments.seed, "seconds": round(time.monotonic() - begin),
        "answers": answers, "operations": dict(sorted(outcome.operations.items())), "faults": outcome.faults,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    return int(bool(outcome.faults))


if __name__ == "__main__":
    sys.exit(main())
