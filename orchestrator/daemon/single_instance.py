"""One manager per host: two would allocate the same cores."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EAGAIN
from pathlib import Path
from typing import IO

from orchestrator.errors import HostError
from orchestrator.locks import lock_file

HOST_LOCK = Path("/run/nohype/host.lock")
"""Independent of the configuration."""


def acquire(path: Path) -> IO[str]:
    """Acquires the lock (flock(2), held while the file is open) and writes the pid into it. Makes missing folders.

    Raises HostError if another process holds it (EAGAIN), or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(lock_file(path), "r+")
    except BlockingIOError:
        pid = path.read_text().strip()
        message = f"another manager (pid {pid or 'unknown'}) holds {path}"
        raise HostError(message, "run one manager per host: see `systemctl status nohyped`", EAGAIN) from None
    except OSError as error:
        raise HostError(f"cannot open {path}", "run as root; check `mount` and `df`", error.errno or 0) from None
    # Overwritten, then truncated: on a full disk no other program can take the space meanwhile. The lock counts, not the pid.
    with suppress(OSError):
        text = f"{os.getpid()}\n".encode()
        os.pwrite(file.fileno(), text, 0)
        os.ftruncate(file.fileno(), len(text))
    return file
