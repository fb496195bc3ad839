"""The keeper process of a lab: creates the switch, starts QEMU, waits, and removes everything again.

`up` starts it. The keeper stops the lab on SIGTERM, when QEMU exits, and when `up` exits before the lab is ready; an attached lab
also when the process that has started it exits. If the keeper is killed, QEMU is killed with it and the kernel releases the
lab's lock, which marks the leftovers as stale.
Usage: python -m orchestrator.lab.keeper NAME LOCK CHANNEL, where LOCK and CHANNEL are inherited descriptors.
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
from orchestrator.lab.qemu import TPM, build_argv, build_entry, build_tpm_argv
from orchestrator.lab.qmp import read_ssh_port
from orchestrator.lab.spec import LabImage, LabSpec
from orchestrator.values import Size
from orchestrator.waiting import wait_until

_START_TIMEOUT = 60
_STOP_TIMEOUT = 8
_POLL = 0.1


class StartOrder(BaseModel):
    """The first message of `up`. ``tools`` is the root file system with QEMU."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    spec: LabSpec
    image: LabImage
    tools: Path
    kvm: bool
    accel_reason: str
    emulator: EmulatorRecord | None
    switch: str  # the lab whose switch this lab uses, or its own name
    attached: bool  # stops when the sender of this order closes the channel, or exits


class Channel:
    """Lines of JSON between `up` and the keeper. The stream ends when the other side exits."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: object) -> None:
        """Does nothing if the other side has exited."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message, or None at the end of the stream. Raises TimeoutError after ``timeout`` seconds."""
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
        self._socket.close()


class _Stopped(Exception):
    """A signal or `up` requested the stop of the lab."""


class Keeper:
    """Runs one lab until the descriptor ``stop`` is readable. The caller holds the lab's lock and has created its folder."""

    def __init__(self, folder: LabDir, channel: Channel, stop: int) -> None:
        self._folder, self._channel, self._stop = folder, channel, stop
        self._state: LabState | None = None
        self._switch = False
        self._port: dict[str, Any] = {}  # fields of the state

    def keep(self) -> None:
        try:
            with ExitStack() as undo:
                self._run(undo)
        except _Stopped:
            pass
        except OrchestratorError as error:
            self._channel.send(error=error.message, hint=error.hint, tail=read_tail(self._folder.console))
        except Exception as error:
            traceback.print_exc()
            self._channel.send(error=f"the lab's keeper failed: {error!r}", hint="", tail=())
        state = self._state
        if state and state.ready and state.ended:
            pass  # the files have the reason why QEMU exited; `down` and the next `up` remove them
        elif self._switch:
            pass  # the switch could not be removed; the files mark it as this lab's, so `down` and the next `up` remove it
        else:
            remove(self._folder)
        self._channel.close()

    def _run(self, undo: ExitStack) -> None:
        message = self._channel.receive(_START_TIMEOUT)
        if message is None:
            raise _Stopped
        order = StartOrder.model_validate_json(json.dumps(message))
        process = self._start(order, undo)
        state = LabState(
            name=self._folder.name, spec=order.spec, pid=os.getpid(), qemu=process.pid, port=self._wait_for_monitor(process),
            host_key=self._keys.host, accel="kvm" if order.kvm else "tcg", accel_reason=order.accel_reason,
            emulator=order.emulator, started=self._started, **self._port,
        )  # fmt: skip
        self._save(state)
        self._channel.send(running=True)
        self._watch(process, attached=order.attached)

    def _start(self, order: StartOrder, undo: ExitStack) -> Any:
        folder = self._folder
        self._keys, self._started = write_keys(folder), time.time()
        for index, size in enumerate(order.spec.disks):
            with (folder.path / f"disk{index}").open("wb") as file:
                file.truncate(Size.parse(size).bytes)
        tap = None
        if order.spec.vfs:
            tap, port = switch.create_port(folder, order.switch)
            self._switch = True
            undo.callback(self._delete_switch)
            self._port = {"switch": order.switch, "switch_port": port, **self._start_server(order.switch, undo)}
        image = order.image
        binds = {"lab": folder.path, "kernel": image.kernel, "initrd": image.initrd, "root.raw": image.root}
        entry = build_entry(order.tools, binds, os.getpid())
        if order.spec.tpm:
            self._start_tpm([*entry, *build_tpm_argv()], undo)
        argv = entry + build_argv(order.spec, order.image, name=folder.name, kvm=order.kvm, tap=tap)
        try:
            process = spawn(argv, log=folder.log, pass_fds=() if tap is None else (tap,))
        finally:
            if tap is not None:
                os.close(tap)  # QEMU has inherited it, and the tap must end with QEMU
        undo.callback(_stop, process)
        return process

    def _start_tpm(self, argv: list[str], undo: ExitStack) -> None:
        """Before QEMU, which connects to it once."""
        process = spawn(argv, log=self._folder.log)
        undo.callback(_stop, process)
        socket_path = self._folder.path / TPM

        def is_over() -> bool:
            self._check_stopped()
            return socket_path.exists() or process.poll() is not None

        if not wait_until(is_over, timeout=_START_TIMEOUT, interval=_POLL):
            raise LabError(f"the emulator of the TPM has not created {socket_path} after {_START_TIMEOUT} s")
        if process.poll() is not None:
            output = "".join(f"\n    {line}" for line in read_tail(self._folder.log))
            raise LabError(f"the emulator of the TPM exited immediately with status {process.returncode}:{output}")

    def _start_server(self, name: str, undo: ExitStack) -> dict[str, Any]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            words = [sys.executable, "-P", "-m", "orchestrator.lab.switch_server", switch.netns_of(name), str(listener.fileno())]
            # Like QEMU it ends with this process, even if that is killed.
            argv = ["setpriv", "--pdeathsig", "KILL", *words, str(self._folder.switch_key), self._keys.manager]
            undo.callback(_stop, spawn(argv, log=self._folder.log, pass_fds=(listener.fileno(),)))
            return {"switch_ssh": listener.getsockname()[1], "switch_key": self._keys.switch}

    def _delete_switch(self) -> None:
        switch.delete_port(self._folder)
        self._switch = False

    def _wait_for_monitor(self, process: Any) -> int:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            if process.poll() is not None:
                output = "".join(f"\n    {line}" for line in read_tail(self._folder.log))
                raise LabError(f"QEMU exited immediately with status {process.returncode}:{output}")
            self._check_stopped()
            try:
                return read_ssh_port(self._folder.qmp)
            except LabError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)

    def _check_stopped(self) -> None:
        """Raises _Stopped once a stop was requested, or `up` has exited."""
        if select.select([self._channel.fileno(), self._stop], [], [], 0)[0]:
            raise _Stopped

    def _watch(self, process: Any, *, attached: bool) -> None:
        """Returns when QEMU has exited, or when a stop was requested."""
        listening = True
        exited = os.pidfd_open(process.pid)
        try:
            while True:
                readable = select.select([self._stop, exited, *([self._channel.fileno()] if listening else [])], [], [])[0]
                if self._stop in readable:
                    return
                if exited in readable:
                    status = process.wait()
                    why = describe_end(status, read_tail(self._folder.log))
                    self._save(self._state, ended=why)
                    self._channel.send(error=why, hint="", tail=read_tail(self._folder.console), lost=status != 0)
                    return
                message = self._channel.receive()
                if message is not None:
                    self._save(self._state, ready=True, timings=message["timings"])
                    self._channel.send(kept=True)
                elif self._state and self._state.ready and not attached:
                    listening = False
                else:
                    return
        finally:
            os.close(exited)

    def _save(self, state: LabState | None, **changes: object) -> None:
        if state:
            self._state = state.model_copy(update=changes)
            write_state(self._folder, self._state)


def _stop(process: Any) -> None:
    # Not a clean shutdown of the lab host: its disks are snapshots.
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT)
    except Exception:
        process.kill()
        process.wait()


def main() -> None:
    name, lock, connection = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for descriptor in (lock, connection):
        fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)  # QEMU must not keep the lock alive
    stop, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    keeper = os.getpid()

    def wake_keeper(*_: object) -> None:
        # Not in the helpers that pyroute2 forks: they inherit handler and descriptor, and are stopped with SIGTERM.
        if os.getpid() == keeper:
            with suppress(BlockingIOError):
                os.write(wake, b".")

    # Signals make a descriptor readable, so that none can interrupt the removal of the lab.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, wake_keeper)
    os.chdir("/")
    Keeper(LabDir(name), Channel(socket.socket(fileno=connection)), stop).keep()


if __name__ == "__main__":
    main()
