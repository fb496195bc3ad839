"""The beginning and the end of a lab, from the outside. The keeper does what needs a life time."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from errno import EPERM
from pathlib import Path
from typing import Any

from orchestrator import shell
from orchestrator.errors import Conflict, HostError, LabError, LabLost, ShellError
from orchestrator.host.processes import read_arguments
from orchestrator.host.root import HostRoot
from orchestrator.host.run import spawn
from orchestrator.lab import switch
from orchestrator.lab.accel import Accel
from orchestrator.lab.emulator import read_record
from orchestrator.lab.folder import Folder, LabState, find_state, is_locked, read_tail, remove, take_lock
from orchestrator.lab.keeper import Channel, Order
from orchestrator.lab.lab import Lab, connect_lab, find_lab, show_lines
from orchestrator.lab.progress import Timeline
from orchestrator.lab.spec import LabImage, LabSpec, parse_lab_name

_START_DEADLINE = 90
_END_DEADLINE = 30
_LAST_WORD = 2.0
"""Seconds. QEMU, and with it the connection, ends a moment before its keeper says why."""
_POLL = 0.2


def up(
    name: str,
    spec: LabSpec,
    image: LabImage,
    tools: Path,
    accel: Accel,
    timeline: Timeline,
    *,
    patience: float = 300,
) -> Lab:
    """Starts a lab and waits until it can be used: SSH answers, and the manager runs if the image has one.

    Whatever happens before that, an interruption too, leaves nothing behind.

    Args:
        tools: root file system with QEMU, from ``build.build_tools``.
        patience: seconds for the boot.

    Raises:
        Conflict: a lab of that name is up or being started.
        HostError: not root, no tap, no bridge.
        LabError: it did not start; with the tail of its console.
        LabLost: the emulator failed.
    """
    folder = Folder(parse_lab_name(name))
    _check_root("start")
    emulator = read_record(tools)
    if emulator and not accel.kvm and (warning := emulator.warning()):
        timeline.note(warning)
    lock = take_lock(folder)
    if lock is None:
        raise _taken(folder)
    try:
        _clear(folder)
        order = Order(spec=spec, image=image, tools=tools, kvm=accel.kvm, accel_reason=accel.reason, emulator=emulator)
        channel = _start_keeper(folder, lock)
    finally:
        os.close(lock)  # the keeper has it now
    try:
        with timeline.stage("switch and emulator"):
            channel.send(**order.model_dump(mode="json"))
            _expect(channel, folder, "running", _START_DEADLINE)
        _wait_ready(folder, channel, timeline, patience)
        channel.send(timings=timeline.timings)
        _expect(channel, folder, "kept", _START_DEADLINE)
    except BaseException:
        channel.close()  # the keeper takes this as the end, and removes all
        with suppress(KeyboardInterrupt):
            _wait_unlocked(folder, _END_DEADLINE)
        raise
    channel.close()
    return find_lab(name)


def check_free(name: str) -> None:
    """Finds out early, before anything is built, that a lab cannot be started under this name.

    Raises:
        Conflict: a lab of that name is up or being started.
        HostError: not root.
    """
    _check_root("start")
    folder = Folder(parse_lab_name(name))
    if is_locked(folder):
        raise _taken(folder)


def down(name: str, *, timeout: float = _END_DEADLINE) -> bool:
    """Ends a lab and removes all of it: QEMU, switch, files. Its disks are snapshots, so nothing is shut down in it.

    Args:
        timeout: seconds; after that the keeper is killed, and QEMU with it.

    Returns:
        Whether there was a lab (or what one had left).

    Raises:
        HostError: not root.
        LabError: even then something holds the lab.
    """
    folder = Folder(parse_lab_name(name))
    if not is_locked(folder) and not folder.path.exists():
        return False
    _check_root("end")
    for number, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, 5.0)):
        _signal_keeper(folder, number)
        if _wait_unlocked(folder, patience):
            break
    lock = take_lock(folder)
    if lock is None:
        raise LabError(f"the lab {name} does not end: something holds its lock {folder.lock}", f"see: fuser {folder.lock}")
    try:
        _clear(folder)
        remove(folder)
    finally:
        os.close(lock)
    return True


def _start_keeper(folder: Folder, lock: int) -> Channel:
    ours, theirs = socket.socketpair()
    with theirs:
        folder.path.mkdir(mode=0o700)
        # -P: root must not import what happens to lie in the folder that it was called in.
        argv = [sys.executable, "-P", "-m", "orchestrator.lab.keeper", folder.name, str(lock), str(theirs.fileno())]
        spawn(argv, log=folder.log, pass_fds=(lock, theirs.fileno()))
    return Channel(ours)


def _expect(channel: Channel, folder: Folder, wanted: str, timeout: float) -> None:
    """Waits for the keeper to say a word."""
    try:
        message = _listen(channel, folder, timeout)
    except TimeoutError:
        tail = show_lines(read_tail(folder.log))
        raise LabError(f"the keeper of the lab {folder.name} did not answer within {timeout:g} s{tail}") from None
    if wanted not in message:
        raise LabError(f"the keeper of the lab {folder.name} said {message} in place of {wanted}")


def _listen(channel: Channel, folder: Folder, timeout: float) -> dict[str, Any]:
    """The next word of the keeper; an error that it reports is raised here. TimeoutError if it says nothing."""
    message = channel.receive(timeout)
    if message is None:
        # The folder may be gone by now; then somebody has taken the lab down.
        raise LabError(f"the lab {folder.name} was taken down while it was being started" + show_lines(read_tail(folder.log)))
    if "error" in message:
        kind = LabLost if message.get("lost") else LabError
        raise kind(f"cannot start the lab {folder.name}: {message['error']}" + show_lines(message["tail"]), message["hint"])
    return message


def _wait_ready(folder: Folder, channel: Channel, timeline: Timeline, patience: float) -> None:
    state = find_state(folder)
    if state is None:
        raise LabError(f"the lab {folder.name} has no state in {folder.state}")
    deadline = time.monotonic() + patience
    with timeline.stage("boot until SSH answers"):
        connection = _wait_ssh(folder, state, channel, deadline)
    with connection, timeline.stage("manager"):
        try:
            _wait_manager(folder, connection, deadline)
        except ShellError:
            with suppress(TimeoutError):
                _listen(channel, folder, _LAST_WORD)
            raise


def _wait_ssh(folder: Folder, state: LabState, channel: Channel, deadline: float) -> shell.Shell:
    attempt = 0
    while True:
        attempt += 1
        try:
            # A connection that is made before the network is up can hang in QEMU's for a minute: rather try again.
            return connect_lab(folder, state, timeout=60, banner_timeout=min(2 + attempt, 15))
        except ShellError as error:
            if time.monotonic() > deadline:
                tail = show_lines(read_tail(folder.console))
                raise LabError(f"the lab {folder.name} did not get ready in time: {error.message}{tail}") from None
        with suppress(TimeoutError):
            _listen(channel, folder, _POLL)


def _wait_manager(folder: Folder, connection: shell.Shell, deadline: float) -> None:
    """Waits for the manager's service, not for all of the boot: that goes on for a while and concerns nobody."""
    while True:
        done = connection.run("systemctl show --value --property LoadState --property ActiveState nohyped.service")
        words = done.stdout.split()
        if "loaded" not in words or "active" in words:
            return
        if "failed" in words or time.monotonic() > deadline:
            journal = connection.run("journalctl --no-pager --output cat --lines 15 --unit nohyped.service").stdout
            raise LabError(f"the manager of the lab {folder.name} did not start:" + show_lines(tuple(journal.splitlines())))
        time.sleep(0.5)


def _clear(folder: Folder) -> None:
    """Removes what a killed lab has left. Only for a holder of the lock; without files of ours the switch is not ours either."""
    if folder.path.exists():
        switch.delete_switch(folder.name)
        shutil.rmtree(folder.path, ignore_errors=True)


def _signal_keeper(folder: Folder, number: int) -> None:
    state = find_state(folder)
    deadline = time.monotonic() + 5
    while state is None and is_locked(folder) and time.monotonic() < deadline:
        time.sleep(_POLL)
        state = find_state(folder)
    if state is None:
        return
    try:
        process = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return
    try:
        # The number may have been given to another process since the state was written; the descriptor now holds it fast.
        words = read_arguments(HostRoot(), state.pid)
        if "orchestrator.lab.keeper" in words and folder.name in words:
            signal.pidfd_send_signal(process, number)
    except (ProcessLookupError, HostError):
        return
    finally:
        os.close(process)


def _wait_unlocked(folder: Folder, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while is_locked(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _taken(folder: Folder) -> Conflict:
    state = find_state(folder)
    if state and state.ready:
        since = time.strftime("%H:%M:%S", time.localtime(state.started))
        what = f"the lab {folder.name} is up since {since} (spec {state.spec.name}, keeper process {state.pid})"
    else:
        what = f"the lab {folder.name} is being started by somebody else"
    return Conflict(what, f"use it, end it with `nohype lab down {folder.name}`, or give another name")


def _check_root(verb: str) -> None:
    if os.geteuid():
        raise HostError(f"cannot {verb} a lab: it takes network namespaces and mounts", "run as root (sudo)", EPERM)
