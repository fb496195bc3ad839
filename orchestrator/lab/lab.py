"""Labs that are up: find one, look at it, run commands in it. "Lab lost" is told apart from a command that fails."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from orchestrator import shell
from orchestrator.errors import HostError, LabError, LabLost, NotFound, ShellError
from orchestrator.host.processes import read_resident
from orchestrator.host.root import HostRoot
from orchestrator.lab import switch
from orchestrator.lab.folder import Folder, LabState, find_state, is_locked, list_folders, read_tail, take_lock
from orchestrator.lab.qmp import ask
from orchestrator.lab.spec import parse_lab_name

_ANSWER_DEADLINE = 60
_POLL = 0.2


@dataclass(frozen=True)
class Lab:
    """A lab that is up. Made by ``find_lab`` and ``life.up``."""

    folder: Folder
    state: LabState

    @property
    def name(self) -> str:
        """The lab's name."""
        return self.folder.name

    def shell(self, *, timeout: float = 60) -> shell.Shell:
        """A connection to the lab host, as root.

        Raises:
            LabLost: it does not answer.
        """
        with not_lost(self):
            try:
                return connect_lab(self.folder, self.state, timeout=timeout)
            except ShellError:
                # Now and then a handshake with an emulated machine fails (paramiko: "Invalid packet blocking"). One that is lost
                # does not answer the second time either.
                time.sleep(_POLL)
                return connect_lab(self.folder, self.state, timeout=timeout)


@dataclass(frozen=True)
class LabStatus:
    """How a lab is.

    Attributes:
        condition: ``up``, ``starting`` or ``lost`` (its files are there, but nothing runs).
        state: None while it is starting.
        memory: bytes that QEMU holds in memory now, None if it does not run.
        tail: last lines of the console, of a lab that is lost.
    """

    name: str
    condition: str
    state: LabState | None
    memory: int | None
    tail: tuple[str, ...]


def find_lab(name: str) -> Lab:
    """The lab of that name, which is up.

    Raises:
        NotFound: there is none, or it is still being started.
        LabLost: it was up, but is gone without having been taken down.
    """
    folder = Folder(parse_lab_name(name))
    alive, state = is_locked(folder), find_state(folder)
    if alive and state and state.ready and not state.ended:
        return Lab(folder, state)
    if not alive and state:
        raise build_lost(folder, state)
    others = ", ".join(one.name for one in list_folders() if one.name != name and is_locked(one))
    what = f"the lab {name} is still being started" if alive else f"there is no lab {name}"
    raise NotFound(what, f"up are: {others}" if others else f"start it: nohype lab up {name}")


def read_status(name: str) -> LabStatus:
    """How a lab is. What a killed keeper has left in the kernel (the switch) is removed; the files stay for `down`.

    Raises:
        NotFound: there is no lab of that name.
        HostError: not root.
    """
    folder = Folder(parse_lab_name(name))
    if is_locked(folder):
        state = find_state(folder)
        memory = _read_memory(state.qemu) if state else None
        return LabStatus(name, "up" if state and state.ready else "starting", state, memory, ())
    if not folder.path.exists():
        raise NotFound(f"there is no lab {name}", f"start it: nohype lab up {name}")
    lock = take_lock(folder, timeout=0)
    if lock is None:
        return LabStatus(name, "starting", None, None, ())
    try:
        switch.delete_switch(name)
    finally:
        os.close(lock)
    return LabStatus(name, "lost", find_state(folder), None, read_tail(folder.console))


def execute(
    lab: Lab,
    command: str | Sequence[str],
    *,
    timeout: float | None = None,
    input: bytes | IO[bytes] = b"",
    stream: shell.Stream | None = None,
) -> shell.Completed:
    """Runs a command in the lab host; a status other than 0 is a result, not an error.

    Raises:
        LabLost: the lab went away.
        shell.ShellTimeout: the command did not end in time; the lab is sound.
    """
    with not_lost(lab), lab.shell() as connection:
        return connection.run(command, timeout=timeout, input=input, stream=stream)


@contextmanager
def not_lost(lab: Lab) -> Iterator[None]:
    """Turns a connection that fails inside into LabLost. A command's time-out stays what it is if the lab host still answers."""
    try:
        yield
    except shell.ShellTimeout as error:
        try:
            connect_lab(lab.folder, lab.state, timeout=_ANSWER_DEADLINE).close()
        except ShellError:
            raise build_lost(lab.folder, find_state(lab.folder), f"does not answer any more: {error.message}") from None
        raise
    except ShellError as error:
        # QEMU ends a moment before its keeper has said so.
        deadline = time.monotonic() + 2
        while is_locked(lab.folder) and time.monotonic() < deadline:
            time.sleep(_POLL)
        state = find_state(lab.folder)
        raise build_lost(lab.folder, state, error.message) from None


def connect_lab(folder: Folder, state: LabState, **options: Any) -> shell.Shell:
    """A connection to the lab host, as ``shell.connect`` gives it."""
    return shell.connect("127.0.0.1", state.port, key=folder.key, host_key=state.host_key, **options)


def _read_memory(pid: int) -> int | None:
    with suppress(HostError):
        return read_resident(HostRoot(), pid)
    return None


def build_lost(folder: Folder, state: LabState | None, why: str = "") -> LabLost:
    """The error for a lab that cannot be used any more: why, and the tail of its console."""
    if is_locked(folder):
        reason = f"{_describe_machine(folder)}; {why}"
    else:
        reason = (state and state.ended) or "its keeper was killed, or it was taken down"
    text = f"the lab {folder.name} is lost: {reason}" + show_lines(read_tail(folder.console))
    return LabLost(text, f"`nohype lab down {folder.name}` removes what is left")


def _describe_machine(folder: Folder) -> str:
    try:
        status = str(ask(folder.qmp, "query-status", timeout=3)["status"])
    except (LabError, KeyError, TypeError):
        return "QEMU lives, but its monitor does not answer"
    if status == "io-error":  # what QEMU does on ENOSPC, unless told otherwise (werror=enospc)
        return "QEMU has paused it, because what it writes to its disks no longer fits on this machine's disk"
    return f"its machine is {status}"


def show_lines(lines: Sequence[str]) -> str:
    """Lines of a log, indented, to be put after an error's own line."""
    return "".join(f"\n    {line}" for line in lines)
