"""A lab's folder under /run: its files, its lock, its state. A lab lives exactly as long as its lock is held.

The lock is a flock(2), which the kernel drops with its last holder: a lab whose lock is free is dead, whatever its files say.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import HostError
from orchestrator.lab.emulator import EmulatorRecord
from orchestrator.lab.spec import LabSpec, is_lab_name

RUNTIME = Path("/run/nohype-lab")
TAIL = 25


@dataclass(frozen=True)
class LabDir:
    """Where a lab keeps its files; only root can read them.

    Attributes:
        name: the lab's name, checked by ``parse_lab_name``.
        base: folder of all labs. It is one place for the machine: the names of network namespaces are machine-wide too.
    """

    name: str
    base: Path = RUNTIME

    @property
    def path(self) -> Path:
        """The lab's own folder."""
        return self.base / self.name

    @property
    def lock(self) -> Path:
        """The lock; beside the folder, so that the folder can be removed while the lock is held."""
        return self.base / f"{self.name}.lock"

    @property
    def state(self) -> Path:
        """What runs, as JSON."""
        return self.path / "state.json"

    @property
    def console(self) -> Path:
        """All that the lab host printed on its serial console."""
        return self.path / "console.log"

    @property
    def log(self) -> Path:
        """What the keeper and QEMU printed."""
        return self.path / "keeper.log"

    @property
    def qmp(self) -> Path:
        """QEMU's monitor (QMP), a Unix socket; one client at a time."""
        return self.path / "qmp"

    @property
    def key(self) -> Path:
        """The private key with which the lab lets us in, in OpenSSH's format."""
        return self.path / "key"

    @property
    def known_hosts(self) -> Path:
        """The lab's host key, for OpenSSH's ``UserKnownHostsFile``."""
        return self.path / "known_hosts"


class LabState(BaseModel):
    """A lab that runs, or ran.

    Attributes:
        pid, qemu: process ids of the keeper and of QEMU.
        port: TCP port on 127.0.0.1 that leads to the lab's SSH server.
        host_key: the lab's public host key, ``ssh-ed25519 AAAA...``.
        accel: ``tcg`` or ``kvm``; accel_reason says why.
        emulator: which program emulates it, and its patches; None for a tools root that was not built by us.
        started: Unix time.
        ready: whether `up` found the lab ready.
        timings: seconds of each stage of `up`.
        ended: why QEMU ended by itself; empty while it runs.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    spec: LabSpec
    pid: int
    qemu: int
    port: int
    host_key: str
    accel: str
    accel_reason: str
    emulator: EmulatorRecord | None
    started: float
    ready: bool = False
    timings: dict[str, float] = {}
    ended: str = ""


def take_lock(folder: LabDir, *, timeout: float = 1) -> int | None:
    """Takes the lab's lock, making the base folder if there is none.

    Args:
        timeout: seconds to try; somebody who only looks (``is_locked``) holds the lock for a moment.

    Returns:
        A descriptor that holds the lock until it and all its duplicates are closed, or None if the lab lives.

    Raises:
        HostError: the runtime folder cannot be used.
    """
    try:
        folder.base.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make the folder {folder.base}", "run as root", error.errno or 0) from None
    deadline = time.monotonic() + timeout
    while True:
        descriptor = _try_lock(folder.lock, os.O_CREAT)
        if descriptor is not None or time.monotonic() > deadline:
            return descriptor
        time.sleep(0.05)


def is_locked(folder: LabDir) -> bool:
    """Whether the lab lives. Creates nothing."""
    try:
        descriptor = _try_lock(folder.lock, 0)
    except HostError as error:
        if error.errno == ENOENT:
            return False
        raise
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def remove(folder: LabDir) -> None:
    """Removes the lab's files, the lock last. Only for a holder of the lock."""
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.lock.unlink(missing_ok=True)


def write_state(folder: LabDir, state: LabState) -> None:
    """Replaces the state in one step, so that a reader sees the old or the new one."""
    fresh = folder.state.with_suffix(".new")
    fresh.write_text(state.model_dump_json(indent=2) + "\n")
    fresh.replace(folder.state)


def find_state(folder: LabDir) -> LabState | None:
    """The lab's state, or None if there is none (or none that this version can read)."""
    try:
        return LabState.model_validate_json(folder.state.read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {folder.state}", "run as root", error.errno or 0) from None


def read_tail(path: Path, lines: int = TAIL) -> tuple[str, ...]:
    """The last lines of a log, without escape sequences' control characters; empty if there is no such file."""
    try:
        text = path.read_bytes()[-65536:].decode(errors="replace")
    except OSError:
        return ()
    shown = ("".join(sign for sign in line if sign.isprintable()).rstrip() for line in text.splitlines())
    return tuple(line for line in shown if line)[-lines:]


def list_folders(base: Path = RUNTIME) -> tuple[LabDir, ...]:
    """All labs that live or have left files, by name."""
    try:
        names = {path.name.removesuffix(".lock") for path in base.iterdir() if path.is_dir() or path.suffix == ".lock"}
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise HostError(f"cannot list {base}", "run as root", error.errno or 0) from None
    return tuple(LabDir(name, base) for name in sorted(names) if is_lab_name(name))


def _try_lock(path: Path, flags: int) -> int | None:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        except OSError as error:
            raise HostError(f"cannot open the lock {path}", "run as root", error.errno or 0) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # The last holder may have removed the file between our open and our flock: then we hold a lock that nobody else sees.
        try:
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
        if not flags:
            return _try_lock(path, flags)
