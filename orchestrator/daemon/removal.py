"""`python -m orchestrator.daemon.removal`: exit status 1 if the manager must not be removed from this host yet."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.config import DEFAULT_CONFIG, PathConfig, read_config
from orchestrator.errors import OrchestratorError
from orchestrator.ledger.unfinished import read_unfinished


def check_removal(config: Path) -> str:
    """The reason why the manager must stay; empty if it can be removed."""
    paths = read_config(config).paths if config.exists() else PathConfig()
    guests = read_unfinished(Path(paths.ledger))
    if not guests:
        return ""
    listed = ", ".join(f"{name} ({state})" for name, state in guests)
    hint = "run `nohype guest stop NAME`, `nohype guest delete NAME` if it has disks, or `nohype quarantine clear NAME`"
    return f"the manager is needed by guests: {listed}\n  hint: {hint}"


def main() -> None:
    try:
        reason = check_removal(DEFAULT_CONFIG)
    except OrchestratorError as error:
        reason = str(error)
    if reason:
        sys.exit(f"nohype: {reason}")


if __name__ == "__main__":
    main()
