"""Where the files are that get what guests print, and how long they stay."""

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
"""Seconds for which the log of a deleted guest stays: it may say why it failed, or be what it was run for."""

KEPT_BYTES, KEPT_BYTES_OF_ALL = 64 << 20, 1 << 30
"""Bytes of deleted guests' logs that stay, of one owner and of all. New guests cost a tenant nothing, and each may print 8 MiB
(virtlogd's own limit, with its backups)."""

_FILE_COSTS = 64 << 10
"""Bytes that each file counts in addition to its size: an empty one takes an inode, and each start of a guest looks at all that
are kept. So there are 1,024 of one owner at most, and 16,384 of all."""

# Earlier versions made logs whose names have no id. The number is virtlogd's, of a file that it has put aside.
_NAME = re.compile(r"(?P<guest>[a-z0-9-]+)(?:\.(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}))?\.log(?:\.[0-9]+)?")


@dataclass(frozen=True)
class _Kept:
    """A file of a guest that is not claimed; ``owner`` is the name of its folder."""

    path: Path
    owner: str
    bytes: int
    changed: float


class ConsoleLogs:
    """The logs of all guests: FOLDER/NAME.ID.log of the host's own, FOLDER/TENANT/NAME.ID.log of a tenant's. Another guest may
    get the same name later, but never the same id.

    Args:
        folder: made when it is needed.
    """

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self._ledger, self._folder = ledger, folder

    def begin(self, plan: Plan, owner: str) -> Path:
        """Prepares the file for what a guest prints that is about to be started. What it has printed before is removed.

        Raises:
            HostError: a file can't be removed, or a folder not be made.
        """
        log = self.find(plan, owner)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            log.parent.mkdir(mode=0o700, exist_ok=True)  # who the tenants are is not for everybody
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
        """The file that a guest's log is in, if it was started by a manager that names logs by id."""
        return self._folder / owner / f"{plan.name}.{plan.uuid}.log"

    def tidy(self, is_in_use: Callable[[Path, str], bool]) -> None:
        """Removes what guests have printed that were deleted long ago, and of the rest what is too much.

        Args:
            is_in_use: whether a running guest of this name prints into this file; asked about files that have no id.

        Raises:
            HostError: a file can't be removed.
        """
        oldest = time.time() - _KEPT
        for kept in self._find_kept(is_in_use):
            if kept.changed < oldest:
                _remove(kept)
        self._bound()

    def _bound(self) -> None:
        """Removes the oldest of an owner that has too much, and then the oldest of all."""
        claimed = {claim.plan.name for claim in self._ledger.read().claims}
        files = sorted(self._find_kept(lambda _, name: name in claimed), key=lambda kept: kept.changed)
        for owner in {kept.owner for kept in files}:
            _shrink([kept for kept in files if kept.owner == owner], KEPT_BYTES)
        _shrink([kept for kept in files if kept.path.exists()], KEPT_BYTES_OF_ALL)

    def _find_kept(self, is_in_use: Callable[[Path, str], bool]) -> Iterable[_Kept]:
        files = [file for pattern in ("*.log*", "*/*.log*") for file in self._folder.glob(pattern)]
        # After the files were found: one that is claimed meanwhile is seen.
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
    """Removes the first ones until what is left is small enough."""
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
    return HostError(f"cannot {what} {file}", "see `mount`, `df` and `lsattr`", error.errno or 0)
