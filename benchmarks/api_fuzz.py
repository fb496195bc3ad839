"""Ten thousand generated requests over the whole interface, as tenant, stranger and operator: no 5xx, none sees another's.

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
    """Prints what came back as JSON. Status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="in all roles together")
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
