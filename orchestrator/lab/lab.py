"""Finds labs that are up and runs commands in them. Distinguishes a lost lab from a failed command."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

from orchestrator import ssh
from orchestrator.errors import HostError, LabError, LabLost, NotFound, ShellError
from orchestrator.host.processes import read_resident
from orchestrator.host.root import HostRoot
from orchestrator.lab import switch
from orchestrator.lab.paths import LabDir, LabState, find_state, is_locked, list_folders, read_tail, take_lock
from orchestrator.lab.qmp import ask
from orchestrator.lab.spec import parse_lab_name
from orchestrator.waiting import wait_until

RESPONSE_TIMEOUT = 60
_POLL = 0.2


class KeptConnection:
    """The connection that `keeping_connection` keeps open. It is opened by the first command, and again if it was lost."""

    def __init__(self) -> None:
        self._shell: ssh.Shell | None = None

    def find(self, connect: Callable[[], ssh.Shell]) -> ssh.Shell:
        if self._shell is None or not self._shell.is_open:
            self._shell = connect()
        return self._shell

    def close(self) -> None:
        """The next command opens another connection."""
        if self._shell:
            self._shell.close()
        self._shell = None


@dataclass(frozen=True)
class Lab:
    folder: LabDir
    state: LabState
    kept: KeptConnection | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @contextmanager
    def shell(self) -> Iterator[ssh.Shell]:
        """A connection to the lab host as root. Raises LabLost if the host does not respond."""
        with raising_lab_lost(self):
            shell = self.kept.find(self._connect) if self.kept else self._connect()
        try:
            yield shell
        finally:
            if not self.kept:
                shell.close()

    def _connect(self) -> ssh.Shell:
        try:
            return connect_lab(self.folder, self.state, timeout=RESPONSE_TIMEOUT)
        except ShellError:
            # A handshake with an emulated machine rarely fails (paramiko: "Invalid packet blocking"). A lost lab does not
            # respond to the second attempt either.
            time.sleep(_POLL)
            return connect_lab(self.folder, self.state, timeout=RESPONSE_TIMEOUT)


@contextmanager
def keeping_connection(lab: Lab) -> Iterator[Lab]:
    """The lab for many commands, which share one connection: a handshake takes an emulated host up to 2 s."""
    kept = KeptConnection()
    try:
        yield replace(lab, kept=kept)
    finally:
        kept.close()


@dataclass(frozen=True)
class LabStatus:
    name: str
    condition: str  # "up", "starting", or "lost": its files exist, but no process runs
    state: LabState | None  # None while the lab is starting
    memory: int | None  # resident bytes of QEMU; None if it does not run
    tail: tuple[str, ...]  # last lines of the console, only of a lost lab


def find_lab(name: str) -> Lab:
    """Raises NotFound if the lab does not exist or is still being started, and LabLost if it stopped without `down`."""
    folder = LabDir(parse_lab_name(name))
    alive, state = is_locked(folder), find_state(folder)
    if alive and state and state.ready and not state.ended:
        return Lab(folder, state)
    if not alive and state:
        raise build_lost(folder, state)
    others = ", ".join(other.name for other in list_folders() if other.name != name and is_locked(other))
    if alive:
        raise NotFound(f"lab {name} is still being started", f"see `nohype lab status {name}`")
    raise _no_lab(name, f"running labs: {others}" if others else "")


def read_status(name: str) -> LabStatus:
    """Also removes the switch of a killed keeper; the files stay until `down`. Requires root."""
    folder = LabDir(parse_lab_name(name))
    if is_locked(folder):
        state = find_state(folder)
        memory = _read_memory(state.qemu) if state else None
        return LabStatus(name, "up" if state and state.ready else "starting", state, memory, ())
    if not folder.path.exists():
        raise _no_lab(name)
    lock = take_lock(folder, timeout=0)
    if lock is None:
        return LabStatus(name, "starting", None, None, ())
    try:
        switch.delete_port(folder)
    finally:
        os.close(lock)
    return LabStatus(name, "lost", find_state(folder), None, read_tail(folder.console))


def _no_lab(name: str, hint: str = "") -> NotFound:
    return NotFound(f"no lab named {name}", hint or f"start it with `nohype lab up {name}`")


def execute(
    lab: Lab,
    command: str | Sequence[str],
    *,
    timeout: float | None = None,
    input: bytes | IO[bytes] = b"",
    stream: ssh.Stream | None = None,
) -> ssh.Completed:
    """Runs a command on the lab host; a status other than 0 is a result, not an error.

    Raises LabLost, and ssh.ShellTimeout if the command did not finish in time but the lab host responds.
    """
    with raising_lab_lost(lab):
        try:
            with lab.shell() as connection:
                return connection.run(command, timeout=timeout, input=input, stream=stream)
        except ssh.NotStarted:
            # As a handshake, see Lab: sshd has ended the connection, and a lost lab does not respond to a second attempt either.
            if lab.kept:
                lab.kept.close()
        with lab.shell() as connection:
            return connection.run(command, timeout=timeout, input=input, stream=stream)


@contextmanager
def raising_lab_lost(lab: Lab) -> Iterator[None]:
    """Maps connection errors inside the block to LabLost; a ShellTimeout only if the lab host does not respond any more."""
    try:
        yield
    except ssh.ShellTimeout as error:
        try:
            connect_lab(lab.folder, lab.state, timeout=RESPONSE_TIMEOUT).close()
        except ShellError:
            raise build_lost(lab.folder, find_state(lab.folder), f"the lab host does not respond: {error.message}") from None
        raise
    except ShellError as error:
        # QEMU exits a moment before the keeper has written the reason.
        wait_until(lambda: not is_locked(lab.folder), timeout=2, interval=_POLL)
        state = find_state(lab.folder)
        raise build_lost(lab.folder, state, error.message) from None


def connect_lab(folder: LabDir, state: LabState, **options: Any) -> ssh.Shell:
    return ssh.connect("127.0.0.1", state.port, key=folder.key, host_key=state.host_key, **options)


def build_ssh(lab: Lab) -> list[str]:
    """The command line of OpenSSH's client for a lab."""
    options = {
        "IdentityFile": lab.folder.key, "IdentitiesOnly": "yes", "UserKnownHostsFile": lab.folder.known_hosts,
        "HostKeyAlias": f"nohype-lab-{lab.name}", "StrictHostKeyChecking": "yes", "LogLevel": "ERROR",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return ["ssh", *words, "-p", str(lab.state.port), "root@127.0.0.1"]


def _read_memory(pid: int) -> int | None:
    with suppress(HostError):
        return read_resident(HostRoot(), pid)
    return None


def build_lost(folder: LabDir, state: LabState | None, why: str = "") -> LabLost:
    if is_locked(folder):
        reason = f"{_describe_machine(folder)}; {why}"
    else:
        reason = (state and state.ended) or "its keeper was killed or the lab was taken down"
    text = f"lab {folder.name} is lost: {reason}" + format_lines(read_tail(folder.console))
    return LabLost(text, f"remove what is left with `nohype lab down {folder.name}`")


def _describe_machine(folder: LabDir) -> str:
    try:
        status = str(ask(folder.qmp, "query-status", timeout=3)["status"])
    except (LabError, KeyError, TypeError):
        return "QEMU runs, but its monitor does not respond"
    if status == "io-error":  # QEMU's default on ENOSPC (werror=enospc)
        return "QEMU has paused the lab host: this machine's disk is full"
    return f"the state of its QEMU is {status}"


def format_lines(lines: Sequence[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)
