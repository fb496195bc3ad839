"""One manager a host: two would give away the same cores."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EAGAIN
from pathlib import Path
from typing import IO

from orchestrator.errors import HostError
from orchestrator.locks import lock_file

HOST_LOCK = Path("/run/nohype/host.lock")
"""Whose process has it manages this host, whatever its configuration says."""


def stay_alone(path: Path) -> IO[str]:
    """Takes a lock that ends with the process, however it ends, and notes its id for the next who asks (flock(2)).

    Args:
        path: the file of the lock; it and its folder are made if they are not there.

    Returns:
        What holds the lock, for as long as it is kept open.

    Raises:
        HostError: another process has it, with that one's id (EAGAIN); or the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(lock_file(path), "r+")
    except BlockingIOError:
        first = path.read_text().strip()
        message = f"another manager, process {first or 'unknown'}, has {path}"
        raise HostError(message, "one manager a host: `systemctl status nohyped`", EAGAIN) from None
    except OSError as error:
        raise HostError(f"cannot open {path}", "run as root; see `mount` and `df`", error.errno or 0) from None
    # Over what is there, then cut: on a full disk no other program can take the room meanwhile. The lock counts, not the number.
    with suppress(OSError):
        text = f"{os.getpid()}\n".encode()
        os.pwrite(file.fileno(), text, 0)
        os.ftruncate(file.fileno(), len(text))
    return file
