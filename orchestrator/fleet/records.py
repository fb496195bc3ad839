"""Which guest a job has on this host: one file per job, from the Prolog to the end of the Epilog. Kept over a reboot.

The controller can forget a job and use its number again, so the Epilog must not depend on what the controller knows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import HostError
from orchestrator.fleet.files import replace_file, sync_folder

FOLDER = Path("/var/lib/nohype/fleet")
_ENDED = ".ended"


@dataclass(frozen=True)
class Record:
    """``guest_id`` is the caller's own id, which the manager stores with the guest as its request id."""

    node: str
    job: int
    name: str
    guest_id: str


def write_record(folder: Path, record: Record) -> None:
    """On the disk when it returns. Raises HostError."""
    path = _path(folder, record.node, record.job)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps(asdict(record)))
    except OSError as error:
        raise HostError(f"cannot write the record {path}", errno=error.errno or 0) from None


def read_record(folder: Path, node: str, job: int) -> Record | None:
    """None if the Prolog of the job has not written one. Raises HostError if it cannot be read."""
    path = _path(folder, node, job)
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"cannot read the record {path}", errno=error.errno or 0) from None
    except (ValueError, TypeError):
        raise HostError(f"the record {path} is damaged", "end the guest of this job by hand, then remove the file") from None


def read_records(folder: Path) -> tuple[Record, ...]:
    """Of all nodes and jobs of this host. Raises HostError."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise HostError(f"cannot read the records in {folder}", "run the command as root", error.errno or 0) from None
    found = []
    for path in map(Path, names):
        node, _, job = path.stem.rpartition(".")
        if record := read_record(folder, node, int(job)) if job.isdigit() else None:
            found.append(record)
    return tuple(found)


def remove_record(folder: Path, record: Record) -> None:
    """Makes it one of `read_ended`. No-op if the job number has the record of another guest meanwhile. Raises HostError."""
    path = _path(folder, record.node, record.job)
    if read_record(folder, record.node, record.job) not in (record, None):
        return
    try:
        with suppress(FileNotFoundError):
            os.utime(path)
            path.replace(path.with_suffix(_ENDED))
        sync_folder(folder)
    except OSError as error:
        raise HostError(f"cannot remove the record {path}", errno=error.errno or 0) from None


def read_ended(folder: Path, node: str) -> Iterator[tuple[Record, float]]:
    """Former records of a node, with the seconds since the guest ended or `renew_ended` was called. Ignores damaged ones."""
    for path in folder.glob(f"{node}.*{_ENDED}"):
        with suppress(OSError, ValueError, TypeError):
            yield Record(**json.loads(path.read_text())), time.time() - path.stat().st_mtime


def renew_ended(folder: Path, record: Record) -> None:
    with suppress(OSError):
        os.utime(_path(folder, record.node, record.job).with_suffix(_ENDED))


def forget_ended(folder: Path, record: Record) -> None:
    with suppress(OSError):
        _path(folder, record.node, record.job).with_suffix(_ENDED).unlink()


def _path(folder: Path, node: str, job: int) -> Path:
    return folder / f"{node}.{job:d}.json"
