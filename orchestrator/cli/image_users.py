"""Which guests use which builds of images, read from the ledger of this host's manager, whether it runs or not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from orchestrator.config import DEFAULT_CONFIG, PathConfig, read_config
from orchestrator.daemon.single_instance import HOST_LOCK
from orchestrator.errors import RequestError
from orchestrator.ledger.loading import read_claims
from orchestrator.model.plan import ImageRef


def read_users(config: Path) -> tuple[tuple[str, ImageRef], ...]:
    """Each guest with its build. () on a machine without configuration and manager.

    Raises OrchestratorError if that cannot be known.
    """
    paths = _read_paths(config)
    ledger = Path(paths.ledger)
    if not _exists(ledger):
        if pid := _find_manager():
            message = f"a manager runs (pid {pid}), and its ledger is not {ledger}"
            raise RequestError(message, "give the configuration file of the manager with --config")
        return ()
    return tuple((claim.plan.name, claim.plan.image) for claim in read_claims(ledger))


def _read_paths(config: Path) -> PathConfig:
    if config == DEFAULT_CONFIG and not _exists(config):
        return PathConfig()
    return read_config(config).paths


def _exists(path: Path) -> bool:
    """Raises RequestError if the folder may not be searched: the guests are unknown then."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}", "run as root") from None
    return True


def _find_manager() -> int:
    """The pid of a running manager, 0 if there is none. Its lock is not tried: that would make a starting manager fail."""
    with suppress(OSError, ValueError):
        pid = int(HOST_LOCK.read_text())
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        except PermissionError:
            return pid
        return pid
    return 0
