"""The files with the guests' console output, and their retention."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import HostError
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan

_log = logging.getLogger(__name__)

_KEPT = 7 * 24 * 3600.0
"""Seconds. The log of a deleted guest can show a failure, or be its result."""

KEPT_BYTES, KEPT_BYTES_OF_ALL = 64 << 20, 1 << 30
"""Limits for the logs of deleted guests, per owner and for all. Each guest can print 8 MiB (virtlogd's limit, with backups)."""

_FILE_COSTS = 64 << 10
"""Bytes added to the size of each file, since each start of a guest reads the list of files. So an owner has at
most 1,024 files, and all owners together have 16,384."""

# Logs of earlier versions have no id in their names. The number is virtlogd's, of a backup.
_NAME = re.compile(r"(?P<guest>[a-z0-9-]+)(?:\.(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}))?\.log(?:\.[0-9]+)?")


@dataclass(frozen=True)
class _Kept:
    """A file of a guest without a claim. ``owner`` is the name of its folder."""

    path: Path
    owner: str
    bytes: int
    changed: float


class ConsoleLogs:
    """FOLDER/NAME.ID.log for the host's own guests, FOLDER/TENANT/NAME.ID.log for a tenant's. Names are reused, ids are not."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self._ledger, self._folder = ledger, folder

    def begin(self, plan: Plan, owner: str) -> Path:
        """Returns the file for a launch, and removes the output of earlier runs."""
        log = self.find(plan, owner)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            log.parent.mkdir(mode=0o700, exist_ok=True)  # other users must not see the names of tenants
            for file in (log, *log.parent.glob(f"{log.name}.*")):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise _explain("prepare", log, error) from None
        try:
            self._bound()
        except HostError as error:
            _log.warning("%s", error)
        return log

    def find(self, plan: Plan, owner: str) -> Path:
        return self._folder / owner / f"{plan.name}.{plan.uuid}.log"

    def remove_old(self, is_in_use: Callable[[Path, str], bool]) -> None:
        """Removes logs of deleted guests that are too old or exceed the limits.

        ``is_in_use``: whether a running guest of this name prints into this file; called for files without an id.
        """
        oldest = time.time() - _KEPT
        for kept in self._find_kept(is_in_use):
            if kept.changed < oldest:
                _remove(kept)
        self._bound()

    def _bound(self) -> None:
        """Removes the oldest files of each owner above its limit, then the oldest of all owners."""
        claimed = {claim.plan.name for claim in self._ledger.read().claims}
        files = sorted(self._find_kept(lambda _, name: name in claimed), key=lambda kept: kept.changed)
        for owner in {kept.owner for kept in files}:
            _shrink([kept for kept in files if kept.owner == owner], KEPT_BYTES)
        _shrink([kept for kept in files if kept.path.exists()], KEPT_BYTES_OF_ALL)

    def _find_kept(self, is_in_use: Callable[[Path, str], bool]) -> Iterable[_Kept]:
        files = [file for pattern in ("*.log*", "*/*.log*") for file in self._folder.glob(pattern)]
        # After the files were listed: a guest that is claimed meanwhile is seen.
        claimed = {str(claim.plan.uuid) for claim in self._ledger.read().claims}
        for file in files:
            match = _NAME.fullmatch(file.name)
            if not match or match["id"] in claimed:
                continue
            if not match["id"] and is_in_use(file.with_name(f"{match['guest']}.log"), match["guest"]):
                continue
            with suppress(FileNotFoundError):
                status = file.stat(follow_symlinks=False)
                owner = str(file.parent.relative_to(self._folder))
                yield _Kept(file, owner, status.st_size + _FILE_COSTS, status.st_mtime)


def _shrink(files: list[_Kept], limit: int) -> None:
    total = sum(kept.bytes for kept in files)
    for kept in files:
        if total <= limit:
            break
        _remove(kept)
        total -= kept.bytes


def _remove(kept: _Kept) -> None:
    try:
        kept.path.unlink(missing_ok=True)
    except OSError as error:
        raise _explain("remove", kept.path, error) from None


def _explain(what: str, file: Path, error: OSError) -> HostError:
    return HostError(f"cannot {what} {file}", "check `mount`, `df` and `lsattr`", error.errno or 0)
