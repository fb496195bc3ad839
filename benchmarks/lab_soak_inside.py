"""Runs in the lab host (see lab_soak.py): creates guests three at a time, keeps them busy, deletes them.

Prints a line of JSON per round. Exits at the first failure and keeps the guests for inspection.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.values import DEFAULT_SOCKET

TOGETHER = 3
READY = 180.0


def main() -> int:
    """Runs rounds until the number of guests is reached; returns 1 after a failure."""
    wanted, client = int(sys.argv[1]), Client(Path(DEFAULT_SOCKET))
    made = 0
    with ThreadPoolExecutor(TOGETHER) as pool:
        while made < wanted:
            names = [f"soak{made + index}" for index in range(TOGETHER)]
            errors = _each(pool, make, client, names)
            if not any(errors):
                errors = _each(pool, use, client, names)
            made += len(names)
            print(json.dumps({"made": made, "errors": [error for error in errors if error]}), flush=True)
            if any(errors):
                return 1
            list(pool.map(client.delete, names))
    return 0


def make(client: Client, name: str, index: int) -> None:
    """Creates a guest and waits until it reports ready."""
    client.create({"name": name, "memory": "128M", "image": "minimal", "address": f"10.9.0.{11 + index}/24"})
    client.wait_ready(name, READY)


def use(client: Client, name: str, index: int) -> None:
    """The first guest pings the last; the others are busy and so receive timer interrupts."""
    client.send_command(name, f"ping 10.9.0.{10 + TOGETHER} 10 0.2" if not index else "burn 5", 60.0)


def _each(pool: ThreadPoolExecutor, action: Callable[[Client, str, int], None], client: Client, names: list[str]) -> list[str]:
    return [*pool.map(lambda index: _error(action, client, names[index], index), range(len(names)))]


def _error(action: Callable[[Client, str, int], None], client: Client, name: str, index: int) -> str:
    try:
        action(client, name, index)
    except OrchestratorError as error:
        return f"{action.__name__} {name}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
