"""Which tenants have images from boot servers: each has a share of the store, which other tenants cannot use up.

    STORE/.boot-tenants/TENANT/IMAGE    an empty file; its time is that of the tenant's last request for the image

A file is written before the download, so parallel requests of a tenant cannot exceed its share.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import Conflict

_FOLDER = ".boot-tenants"
_OPERATORS = "@operators"
"""Folder of the operators. A tenant's name cannot contain the @."""


class BootShares:
    """The records of one store; ``limit`` is the number of images that each tenant, and the operators together, can have."""

    def __init__(self, store: Path, limit: int) -> None:
        self._folder, self._limit = store / _FOLDER, limit
        self._lock = threading.Lock()
        # Requests in progress, by tenant and image.
        self._requests: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def using(self, tenant: str, image: str, is_installed: Callable[[], bool]) -> Iterator[None]:
        """Notes that the tenant (empty for operators) uses the image from now on. Raises Conflict if its share is used up.

        At the end of the block the record of an image that is not installed is removed, unless another request is installing it.
        """
        self._add(tenant, image)
        try:
            yield
        finally:
            with self._lock:
                self._requests[tenant, image] -= 1
                if not self._requests[tenant, image]:
                    del self._requests[tenant, image]
                    if not is_installed():
                        (self._folder / (tenant or _OPERATORS) / image).unlink(missing_ok=True)

    def _add(self, tenant: str, image: str) -> None:
        folder = self._folder / (tenant or _OPERATORS)
        with self._lock:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = set(os.listdir(folder))
            if image not in names and len(names) >= self._limit:
                owner = f"tenant {tenant} has" if tenant else "operators have"
                raise Conflict(
                    f"{owner} {len(names)} images from boot servers already, limit {self._limit}",
                    "delete guests that boot from servers, or try again in an hour",
                )
            (folder / image).touch(mode=0o600)
            self._requests[tenant, image] += 1

    def remove_older(self, before: float, used: Container[tuple[str, str]]) -> None:
        """Removes the records of requests before this time (time.time()), except of images that guests use.

        ``used``: tenants with the names of images that their guests boot.
        """
        with self._lock:
            for file in self._folder.glob("*/*"):
                tenant = "" if file.parent.name == _OPERATORS else file.parent.name
                with suppress(OSError):  # tried again in some minutes
                    if (tenant, file.name) not in used and file.lstat().st_mtime < before:
                        file.unlink()
