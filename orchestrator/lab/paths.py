"""A lab's files below /run/nohype-lab: paths, lock and state.

A lab is alive exactly as long as its lock is held (flock(2)). The kernel releases the lock when its last holder exits, so the
files of a lab with a free lock are leftovers.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import HostError
from orchestrator.lab.emulator import EmulatorRecord
from orchestrator.lab.spec import LabSpec, is_lab_name
from orchestrator.locks import lock_file
from orchestrator.waiting import wait_until

RUNTIME = Path("/run/nohype-lab")
TAIL = 25


@dataclass(frozen=True)
class LabDir:
    """The paths of a lab's files; only root can read the files."""

    name: str  # accepted by parse_lab_name
    base: Path = RUNTIME  # one per machine: names of network namespaces are machine-wide too

    @property
    def path(self) -> Path:
        return self.base / self.name

    @property
    def lock(self) -> Path:
        # Outside the folder, so that the folder can be removed while the lock is held.
        return self.base / f"{self.name}.lock"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def log(self) -> Path:
        return self.path / "keeper.log"  # the output of QEMU too

    @property
    def qmp(self) -> Path:
        return self.path / "qmp"  # a Unix socket

    @property
    def key(self) -> Path:
        return self.path / "key"

    @property
    def switch_key(self) -> Path:
        return self.path / "switch_key"  # private, of the switch's SSH server

    @property
    def known_hosts(self) -> Path:
        return self.path / "known_hosts"  # for OpenSSH; the connections of `ssh` use LabState.host_key


class LabState(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    spec: LabSpec
    pid: int  # of the keeper
    qemu: int  # pid
    port: int  # on 127.0.0.1, forwarded to the lab's SSH server
    host_key: str  # public, "ssh-ed25519 AAAA..."
    accel: str  # "tcg" or "kvm"
    accel_reason: str
    emulator: EmulatorRecord | None  # None if build_tools() did not build the tools root
    started: float  # Unix time
    ready: bool = False
    timings: dict[str, float] = {}  # seconds per stage of `up`
    ended: str = ""  # why QEMU exited unexpectedly
    switch: str = ""  # the lab that has created the switch: its own name, or that of the lab it has joined; empty without NIC
    switch_port: str = ""
    switch_ssh: int = 0  # port of the switch's SSH server on 127.0.0.1
    switch_key: str = ""  # public host key of that server


def take_lock(folder: LabDir, *, timeout: float = 1) -> int | None:
    """A descriptor that holds the lock until it and all its duplicates are closed; None if the lab is alive."""
    # With a time-out, as is_locked() in another process holds the lock for a moment.
    try:
        folder.base.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot create the folder {folder.base}", "run as root", error.errno or 0) from None
    return wait_until(
        lambda: _try_lock(folder, create=True), lambda descriptor: descriptor is not None, timeout=timeout, interval=0.05
    )


def is_locked(folder: LabDir) -> bool:
    """Whether the lab is alive. Creates nothing."""
    try:
        descriptor = _try_lock(folder, create=False)
    except HostError as error:
        if error.errno == ENOENT:
            return False
        raise
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def remove(folder: LabDir) -> None:
    """The caller holds the lock, which is removed last."""
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.lock.unlink(missing_ok=True)


def write_state(folder: LabDir, state: LabState) -> None:
    fresh = folder.state.with_suffix(".new")  # replaces the state atomically
    fresh.write_text(state.model_dump_json(indent=2) + "\n")
    fresh.replace(folder.state)


def find_state(folder: LabDir) -> LabState | None:
    """None if there is no state, or one that this version cannot read."""
    try:
        return LabState.model_validate_json(folder.state.read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {folder.state}", "run as root", error.errno or 0) from None


def read_tail(path: Path, lines: int = TAIL) -> tuple[str, ...]:
    """The last lines of a log without control characters and empty lines; () if the file cannot be read."""
    try:
        text = path.read_bytes()[-65536:].decode(errors="replace")
    except OSError:
        return ()
    shown = ("".join(char for char in line if char.isprintable()).rstrip() for line in text.splitlines())
    return tuple(line for line in shown if line)[-lines:]


def list_folders(base: Path = RUNTIME) -> tuple[LabDir, ...]:
    """All labs that are alive or have left files, by name."""
    try:
        names = {path.name.removesuffix(".lock") for path in base.iterdir() if path.is_dir() or path.suffix == ".lock"}
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise HostError(f"cannot list {base}", "run as root", error.errno or 0) from None
    return tuple(LabDir(name, base) for name in sorted(names) if is_lab_name(name))


def _try_lock(folder: LabDir, *, create: bool) -> int | None:
    try:
        return lock_file(folder.lock, create=create)
    except BlockingIOError:
        return None
    except OSError as error:
        raise HostError(f"cannot open the lock {folder.lock}", "run as root", error.errno or 0) from None
