"""The process that a lab's life hangs on: it makes the switch, starts QEMU, waits, and takes all of it away again.

`up` starts it. It ends the lab when it is told to (SIGTERM), when QEMU ends, and when `up` dies before it has said that the lab
is ready. Should it be killed itself, QEMU dies with it, and its lock is free: then everybody knows that what is left is stale.
Run as: python -m orchestrator.lab.keeper NAME LOCK CHANNEL, the latter two being inherited descriptors.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import LabError, OrchestratorError
from orchestrator.host.run import spawn
from orchestrator.lab import switch
from orchestrator.lab.emulator import EmulatorRecord, describe_end
from orchestrator.lab.keys import write_keys
from orchestrator.lab.paths import LabDir, LabState, read_tail, remove, write_state
from orchestrator.lab.qemu import build_argv, build_entry
from orchestrator.lab.qmp import read_ssh_port
from orchestrator.lab.spec import LabImage, LabSpec
from orchestrator.values import Size

_START_DEADLINE = 60
_END_DEADLINE = 8
_POLL = 0.1


class StartOrder(BaseModel):
    """What `up` wants; the first line on the channel.

    Attributes:
        tools: root file system that QEMU comes from.
        accel_reason: why it is KVM or not, for the state.
        emulator: record of the tools root, for the state.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    spec: LabSpec
    image: LabImage
    tools: Path
    kvm: bool
    accel_reason: str
    emulator: EmulatorRecord | None


class Channel:
    """Lines of JSON to and from `up`; both sides use it. The end of `up` is the end of the stream."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: object) -> None:
        """Sends a message; nothing happens if nobody listens any more."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message, or None at the end of the stream.

        Raises:
            TimeoutError: nothing came within so many seconds.
        """
        self._socket.settimeout(timeout)
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Ends the stream."""
        self._socket.close()


class _Stopped(Exception):
    """Somebody wants the lab to end."""


class Keeper:
    """A lab's life. The caller holds the lab's lock, and the folder is there.

    Args:
        stop: a descriptor that is readable when the lab is to end.
    """

    def __init__(self, folder: LabDir, channel: Channel, stop: int) -> None:
        self._folder, self._channel, self._stop = folder, channel, stop
        self._state: LabState | None = None
        self._switch = False

    def keep(self) -> None:
        """Makes the lab, keeps it, removes it."""
        try:
            with ExitStack() as undo:
                self._live(undo)
        except _Stopped:
            pass
        except OrchestratorError as error:
            self._channel.send(error=error.message, hint=error.hint, tail=read_tail(self._folder.console))
        except Exception as error:
            traceback.print_exc()
            self._channel.send(error=f"the lab's keeper failed: {error!r}", hint="", tail=())
        state = self._state
        if state and state.ready and state.ended:
            pass  # the files say what happened; `down` and the next `up` remove them
        elif self._switch:
            pass  # the switch could not be removed; the files say that it is ours, and the next one will try again
        else:
            remove(self._folder)
        self._channel.close()

    def _live(self, undo: ExitStack) -> None:
        message = self._channel.receive(_START_DEADLINE)
        if message is None:
            raise _Stopped
        order = StartOrder.model_validate_json(json.dumps(message))
        process = self._start(order, undo)
        state = LabState(
            name=self._folder.name, spec=order.spec, pid=os.getpid(), qemu=process.pid, port=self._wait_for_monitor(process),
            host_key=self._host_key, accel="kvm" if order.kvm else "tcg", accel_reason=order.accel_reason,
            emulator=order.emulator, started=self._started,
        )  # fmt: skip
        self._save(state)
        self._channel.send(running=True)
        self._watch(process)

    def _start(self, order: StartOrder, undo: ExitStack) -> Any:
        folder = self._folder
        self._host_key, self._started = write_keys(folder), time.time()
        for index, size in enumerate(order.spec.disks):
            with (folder.path / f"disk{index}").open("wb") as file:
                file.truncate(Size.parse(size).bytes)
        tap = None
        if order.spec.vfs:
            tap = switch.create_switch(folder.name)
            self._switch = True
            undo.callback(self._delete_switch)
        image = order.image
        binds = {"lab": folder.path, "kernel": image.kernel, "initrd": image.initrd, "root.raw": image.root}
        argv = build_entry(order.tools, binds, os.getpid())
        argv += build_argv(order.spec, order.image, name=folder.name, kvm=order.kvm, tap=tap)
        try:
            process = spawn(argv, log=folder.log, pass_fds=() if tap is None else (tap,))
        finally:
            if tap is not None:
                os.close(tap)  # QEMU has it; the tap is to end with QEMU
        undo.callback(_end, process)
        return process

    def _delete_switch(self) -> None:
        switch.delete_switch(self._folder.name)
        self._switch = False

    def _wait_for_monitor(self, process: Any) -> int:
        deadline = time.monotonic() + _START_DEADLINE
        while True:
            if process.poll() is not None:
                said = "".join(f"\n    {line}" for line in read_tail(self._folder.log))
                raise LabError(f"QEMU ended as soon as it was started, with status {process.returncode}:{said}")
            if select.select([self._channel.fileno(), self._stop], [], [], 0)[0]:
                raise _Stopped
            try:
                return read_ssh_port(self._folder.qmp)
            except LabError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)

    def _watch(self, process: Any) -> None:
        """Waits for the end of the lab."""
        listening = True
        ended = os.pidfd_open(process.pid)
        try:
            while True:
                readable = select.select([self._stop, ended, *([self._channel.fileno()] if listening else [])], [], [])[0]
                if self._stop in readable:
                    return
                if ended in readable:
                    status = process.wait()
                    why = describe_end(status, read_tail(self._folder.log))
                    self._save(self._state, ended=why)
                    self._channel.send(error=why, hint="", tail=read_tail(self._folder.console), lost=status != 0)
                    return
                message = self._channel.receive()
                if message is not None:
                    self._save(self._state, ready=True, timings=message["timings"])
                    self._channel.send(kept=True)
                elif self._state and self._state.ready:
                    listening = False
                else:
                    return
        finally:
            os.close(ended)

    def _save(self, state: LabState | None, **changes: object) -> None:
        if state:
            self._state = state.model_copy(update=changes)
            write_state(self._folder, self._state)


def _end(process: Any) -> None:
    """Ends QEMU: politely, then surely. Nothing in the lab is worth a clean shutdown: its disks are snapshots."""
    process.terminate()
    try:
        process.wait(_END_DEADLINE)
    except Exception:
        process.kill()
        process.wait()


def main() -> None:
    name, lock, connection = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for descriptor in (lock, connection):
        fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)  # QEMU must not keep the lock alive
    stop, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    keeper = os.getpid()

    def tell(*_: object) -> None:
        # Only ours count: pyroute2 forks helpers, which inherit handler and descriptor, and ends them with SIGTERM.
        if os.getpid() == keeper:
            with suppress(BlockingIOError):
                os.write(wake, b".")

    # Signals become a readable descriptor, so that none can break into the middle of taking the lab down.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, tell)
    os.chdir("/")
    Keeper(LabDir(name), Channel(socket.socket(fileno=connection)), stop).keep()


if __name__ == "__main__":
    main()
