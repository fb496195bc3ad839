"""systemd's interfaces for services: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3), without libsystemd."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

_FIRST_DESCRIPTOR = 3


def notify_systemd(state: str) -> None:
    """Sends lines such as ``READY=1``. No-op outside a unit of Type=notify. Ignores errors: systemd has its own time-out."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        return


def take_activation_sockets(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """The listening sockets that systemd opened, by FileDescriptorName=; empty without a socket unit.

    Child processes inherit neither variables nor descriptors. In a child of a service LISTEN_PID is another process.
    """
    pid, count, names = (environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return {}
    sockets: dict[str, list[socket.socket]] = {}
    given = names.split(":") if names else []
    for index in range(int(count)):
        descriptor = _FIRST_DESCRIPTOR + index
        os.set_inheritable(descriptor, False)  # noqa: FBT003 (the standard library's interface)
        name = given[index] if index < len(given) else "unknown"
        # socket.socket reads family and type from the descriptor.
        sockets.setdefault(name, []).append(socket.socket(fileno=descriptor))
    return sockets


def read_watchdog() -> float | None:
    """Seconds within which systemd expects a notification; None without a watchdog for this process."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isascii() or not usec.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1_000_000 or None
