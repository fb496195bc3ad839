"""Starts and stops labs. The keeper process owns everything that exists as long as the lab."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EPERM
from pathlib import Path
from typing import Any

from orchestrator import ssh
from orchestrator.errors import Conflict, HostError, LabError, LabLost, OrchestratorError, ShellError
from orchestrator.host.processes import read_arguments
from orchestrator.host.root import HostRoot
from orchestrator.host.run import spawn
from orchestrator.lab import switch
from orchestrator.lab.accel import Accel
from orchestrator.lab.emulator import read_record
from orchestrator.lab.keeper import Channel, StartOrder
from orchestrator.lab.lab import Lab, connect_lab, find_lab, format_lines
from orchestrator.lab.paths import LabDir, LabState, find_state, is_locked, list_folders, read_tail, remove, take_lock
from orchestrator.lab.progress import Timeline
from orchestrator.lab.qemu import THIS_MACHINE
from orchestrator.lab.spec import LabImage, LabSpec, parse_lab_name
from orchestrator.waiting import wait_until

SWITCH, UPLINK = "lab", "nic0"
"""The names that the manager of a lab has for the switch and for the lab's NIC."""
BOOT_TIMEOUT = 600  # of an emulated server on a busy machine; 30 s on an idle one
_REGISTER_TIMEOUT = 90
_START_TIMEOUT = 90
_STOP_TIMEOUT = 30
# QEMU, and the connection with it, ends a moment before the keeper reports why.
_LAST_MESSAGE = 2.0
_POLL = 0.2


@dataclass(frozen=True)
class LabParts:
    """What a lab is started from. ``tools`` is the root file system of `build.build_tools`."""

    spec: LabSpec
    image: LabImage
    tools: Path
    accel: Accel


def up(name: str, parts: LabParts, timeline: Timeline, *, boot_timeout: float = BOOT_TIMEOUT, switch_of: str = "") -> Lab:
    """Starts a lab and waits until SSH works and, if the image has the manager, the manager runs.

    After an error or interrupt nothing is left. ``switch_of`` is the lab whose switch this lab joins, empty for a switch of its
    own.

    Raises:
        Conflict: the lab is up or is being started.
        HostError: not root, or tap, bridge or namespace cannot be created.
        LabError: the lab did not start; with the tail of its console.
        LabLost: the emulator failed.
    """
    _start(name, parts, timeline, boot_timeout, switch_of, attached=False).close()
    return find_lab(name)


@contextmanager
def attached(
    name: str, parts: LabParts, timeline: Timeline, *, boot_timeout: float = BOOT_TIMEOUT, switch_of: str = ""
) -> Iterator[Lab]:
    """A lab that is up during the block, as of `up`. It ends with this process, even if that is killed."""
    channel = _start(name, parts, timeline, boot_timeout, switch_of, attached=True)
    try:
        yield find_lab(name)
    finally:
        channel.close()  # makes the keeper stop the lab
        down(name)


def _start(name: str, parts: LabParts, timeline: Timeline, boot_timeout: float, switch_of: str, *, attached: bool) -> Channel:
    folder, switch_of = LabDir(parse_lab_name(name)), parse_lab_name(switch_of or name)
    _check_root("start")
    accel, emulator = parts.accel, read_record(parts.tools)
    if emulator and not accel.kvm and (warning := emulator.warning()):
        timeline.note(warning)
    lock = take_lock(folder)
    if lock is None:
        raise _name_taken(folder)
    try:
        _remove_leftovers(folder)
        order = StartOrder(
            spec=parts.spec, image=parts.image, tools=parts.tools, kvm=accel.kvm, accel_reason=accel.reason, emulator=emulator,
            switch=switch_of, attached=attached,
        )  # fmt: skip
        channel = _start_keeper(folder, lock)
    finally:
        os.close(lock)  # the keeper has inherited it
    try:
        with timeline.stage("switch and emulator"):
            channel.send(**order.model_dump(mode="json"))
            _expect(channel, folder, "running", _START_TIMEOUT)
        _wait_ready(folder, channel, timeline, boot_timeout)
        channel.send(timings=timeline.timings)
        _expect(channel, folder, "kept", _START_TIMEOUT)
    except BaseException:
        channel.close()  # makes the keeper stop the lab and remove everything
        with suppress(KeyboardInterrupt):
            _wait_unlocked(folder, _STOP_TIMEOUT)
        raise
    return channel


def check_name_available(name: str) -> None:
    """Raises Conflict if the lab is up or is being started, and HostError without root. To be called before a build."""
    _check_root("start")
    folder = LabDir(parse_lab_name(name))
    if is_locked(folder):
        raise _name_taken(folder)


def down(name: str, *, timeout: float = _STOP_TIMEOUT) -> bool:
    """Stops a lab and removes its QEMU, switch and files; returns whether there was a lab, or leftovers of one.

    The lab host is not shut down: its disks are snapshots. After ``timeout`` seconds the keeper is killed, and QEMU with it.
    Raises HostError without root, and LabError if a process still holds the lab's lock.
    """
    folder = LabDir(parse_lab_name(name))
    if not is_locked(folder) and not folder.path.exists():
        return False
    _check_root("stop")
    for number, limit in ((signal.SIGTERM, timeout), (signal.SIGKILL, 5.0)):
        _signal_keeper(folder, number)
        if _wait_unlocked(folder, limit):
            break
    lock = take_lock(folder)
    if lock is None:
        raise LabError(f"lab {name} does not stop: a process holds its lock {folder.lock}", f"see `fuser {folder.lock}`")
    try:
        _remove_leftovers(folder)
        remove(folder)
    finally:
        os.close(lock)
    return True


def remove_dead(pattern: re.Pattern[str], note: Callable[[str], None]) -> None:
    """Removes what killed labs have left, of those whose whole name matches. Requires root. Errors are noted."""
    for folder in list_folders():
        try:
            if pattern.fullmatch(folder.name) and not is_locked(folder):
                down(folder.name)
        except OrchestratorError as error:
            note(f"cannot remove lab {folder.name}: {error.message}")
        except OSError as error:
            note(f"cannot remove lab {folder.name}: {error.filename or folder.path}: {error.strerror}")


def _start_keeper(folder: LabDir, lock: int) -> Channel:
    near, far = socket.socketpair()
    with far:
        folder.path.mkdir(mode=0o700)
        # -P: root must not import modules from the current folder.
        argv = [sys.executable, "-P", "-m", "orchestrator.lab.keeper", folder.name, str(lock), str(far.fileno())]
        spawn(argv, log=folder.log, pass_fds=(lock, far.fileno()))
    return Channel(near)


def _expect(channel: Channel, folder: LabDir, expected: str, timeout: float) -> None:
    try:
        message = _receive(channel, folder, timeout)
    except TimeoutError:
        tail = format_lines(read_tail(folder.log))
        raise LabError(f"the keeper of lab {folder.name} did not respond within {timeout:g} s{tail}") from None
    if expected not in message:
        raise LabError(f"the keeper of lab {folder.name} sent {message}, expected {expected}")


def _receive(channel: Channel, folder: LabDir, timeout: float) -> dict[str, Any]:
    """The keeper's next message. Raises an error that the keeper reports, and TimeoutError without a message."""
    message = channel.receive(timeout)
    if message is None:
        # The lab was taken down; its folder with the log may not exist any more.
        raise LabError(f"lab {folder.name} was taken down while it was being started" + format_lines(read_tail(folder.log)))
    if "error" in message:
        kind = LabLost if message.get("lost") else LabError
        raise kind(f"cannot start lab {folder.name}: {message['error']}" + format_lines(message["tail"]), message["hint"])
    return message


def _wait_ready(folder: LabDir, channel: Channel, timeline: Timeline, boot_timeout: float) -> None:
    state = find_state(folder)
    if state is None:
        raise LabError(f"lab {folder.name} has no valid state in {folder.state}")
    deadline = time.monotonic() + boot_timeout
    with timeline.stage("boot until SSH answers"):
        connection = _wait_ssh(folder, state, channel, deadline)
    with connection:
        try:
            with timeline.stage("manager"):
                has_manager = _wait_manager(folder, connection, deadline)
            if has_manager and state.switch_port:
                with timeline.stage("switch"):
                    _register_switch(state, connection, timeline)
        except ShellError:
            with suppress(TimeoutError):
                _receive(channel, folder, _LAST_MESSAGE)
            raise


def _wait_ssh(folder: LabDir, state: LabState, channel: Channel, deadline: float) -> ssh.Shell:
    attempt = 0
    while True:
        attempt += 1
        try:
            # A connection made before the lab's network is up can hang in QEMU for a minute: short time-outs, many attempts.
            return connect_lab(folder, state, timeout=60, banner_timeout=min(2 + attempt, 15))
        except ShellError as error:
            if time.monotonic() > deadline:
                tail = format_lines(read_tail(folder.console))
                raise LabError(f"lab {folder.name} did not become ready in time: {error.message}{tail}") from None
        with suppress(TimeoutError):
            _receive(channel, folder, _POLL)


def _register_switch(state: LabState, connection: ssh.Shell, timeline: Timeline) -> None:
    """At the manager of the lab, as an operator does. A lab without it is of use too."""
    words = [
        "nohype", "switch", "add", SWITCH, "--bridge", switch.BRIDGE, "--host", THIS_MACHINE, "--ssh-port", str(state.switch_ssh),
        "--host-key", state.switch_key, "--uplink", f"{UPLINK}={state.switch_port}",
    ]  # fmt: skip
    done = connection.run(words, timeout=_REGISTER_TIMEOUT)
    if done.status:
        timeline.note(f"the switch is not registered at the manager: {(done.stderr or done.stdout).strip()}")


def _wait_manager(folder: LabDir, connection: ssh.Shell, deadline: float) -> bool:
    """Returns whether the lab has a manager."""
    # Waits only for the manager's unit: other units may still be starting, and are not needed.
    while True:
        done = connection.run("systemctl show --value --property LoadState --property ActiveState nohyped.service")
        words = done.stdout.split()
        if "loaded" not in words or "active" in words:
            return "loaded" in words
        if "failed" in words or time.monotonic() > deadline:
            journal = connection.run("journalctl --no-pager --output cat --lines 15 --unit nohyped.service").stdout
            raise LabError(f"the manager of lab {folder.name} did not start:" + format_lines(journal.splitlines()))
        time.sleep(0.5)


def _remove_leftovers(folder: LabDir) -> None:
    """Removes what a killed lab has left. The caller holds the lock. Without the folder the switch is another lab's."""
    if folder.path.exists():
        switch.delete_port(folder)
        shutil.rmtree(folder.path, ignore_errors=True)


def _signal_keeper(folder: LabDir, number: int) -> None:
    wait_until(lambda: find_state(folder) or not is_locked(folder), timeout=5, interval=_POLL)
    state = find_state(folder)
    if state is None:
        return
    try:
        process = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return
    try:
        # The pid may belong to another process since the state was written. The pidfd fixes the process that is checked here.
        words = read_arguments(HostRoot(), state.pid)
        if "orchestrator.lab.keeper" in words and folder.name in words:
            signal.pidfd_send_signal(process, number)
    except (ProcessLookupError, HostError):
        return
    finally:
        os.close(process)


def _wait_unlocked(folder: LabDir, timeout: float) -> bool:
    return wait_until(lambda: not is_locked(folder), timeout=timeout, interval=0.1)


def _name_taken(folder: LabDir) -> Conflict:
    state = find_state(folder)
    if state and state.ready:
        since = time.strftime("%H:%M:%S", time.localtime(state.started))
        what = f"lab {folder.name} is up since {since} (spec {state.spec.name}, keeper process {state.pid})"
    else:
        what = f"lab {folder.name} is already being started"
    return Conflict(what, f"use it, stop it with `nohype lab down {folder.name}`, or choose another name")


def _check_root(verb: str) -> None:
    if os.geteuid():
        raise HostError(f"cannot {verb} a lab: root is required (network namespaces, mounts)", "run as root (sudo)", EPERM)
