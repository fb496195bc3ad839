"""Types on guests' consoles.

QEMU reads a pty only while it is open, and detects an opened one within a second (chardev/char-pty.c). So a pty stays open for
some seconds after the last input. One thread empties the open ptys; readers get the output from the log. Without ptys it ends.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from orchestrator.errors import GuestError, NotFound

_KEPT_SECONDS = 10.0
_CHECK_SECONDS = 1.0
_DRAINED = 64 << 10
_PAUSE = 0.005  # seconds after emptying a pty: a flooding guest does not keep the thread busy


@dataclass(eq=False)
class _Pty:
    descriptor: int
    used_at: float = field(default_factory=time.monotonic)


class ConsoleInput:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ptys: dict[UUID, _Pty] = {}
        self._thread: threading.Thread | None = None

    def type(self, uuid: UUID, name: str, data: bytes, find_pty: Callable[[], Path | None]) -> int:
        """Writes to the guest's console; returns how many bytes QEMU's pty took, which holds 4 KB.

        ``find_pty`` asks libvirt. Raises what it raises, and GuestError if the console cannot be opened or written.
        """
        with self._lock:
            if known := self._ptys.get(uuid):
                try:
                    return self._write(known, data)
                except OSError:
                    self._close(uuid)  # this QEMU has ended; the guest may have been started again
        self._keep(uuid, _open(name, find_pty))
        with self._lock:
            if uuid not in self._ptys:
                return 0  # QEMU has ended since
            try:
                return self._write(self._ptys[uuid], data)
            except OSError as error:
                self._close(uuid)
                raise GuestError(f"cannot write to the console of guest {name}: {error.strerror}") from None

    def close(self) -> None:
        with self._lock:
            for uuid in list(self._ptys):
                self._close(uuid)

    def _keep(self, uuid: UUID, descriptor: int) -> None:
        with self._lock:
            if uuid in self._ptys:  # another request was faster
                os.close(descriptor)
                return
            self._ptys[uuid] = _Pty(descriptor)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="console-input", daemon=True)
                self._thread.start()

    def _write(self, pty: _Pty, data: bytes) -> int:
        pty.used_at = time.monotonic()
        try:
            return os.write(pty.descriptor, data)
        except BlockingIOError:
            return 0

    def _run(self) -> None:
        while True:
            with self._lock:
                self._drop_unused()
                if not self._ptys:
                    self._thread = None
                    return
                descriptors = {pty.descriptor: uuid for uuid, pty in self._ptys.items()}
            ready = _wait_readable(descriptors)
            with self._lock:
                for descriptor in ready:
                    uuid = descriptors[descriptor]
                    if uuid in self._ptys and self._ptys[uuid].descriptor == descriptor and not _drain(descriptor):
                        self._close(uuid)
            time.sleep(_PAUSE)

    def _drop_unused(self) -> None:
        for uuid, pty in list(self._ptys.items()):
            if time.monotonic() - pty.used_at > _KEPT_SECONDS:
                self._close(uuid)

    def _close(self, uuid: UUID) -> None:
        os.close(self._ptys.pop(uuid).descriptor)


def _open(name: str, find_pty: Callable[[], Path | None]) -> int:
    pty = find_pty()
    if pty is None:
        raise GuestError(f"guest {name} has no serial console")
    try:
        descriptor = os.open(pty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise GuestError(f"cannot open the console {pty} of guest {name}: {error.strerror}") from None
    try:
        # The number of a pty is used again when its QEMU has ended. While this QEMU runs, the opened pty is its own.
        if find_pty() != pty:
            raise NotFound(f"guest {name} ended or was replaced during the request", "see `nohype guest list`")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait_readable(descriptors: Collection[int]) -> list[int]:
    # poll(2), because a descriptor can be closed meanwhile: epoll(7) would refer to a new file with its number.
    with selectors.PollSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        return [key.fd for key, _ in selector.select(_CHECK_SECONDS)]


def _drain(descriptor: int) -> bool:
    """Returns False if QEMU has ended."""
    try:
        return bool(os.read(descriptor, _DRAINED))
    except BlockingIOError:
        return True
    except OSError:
        return False
