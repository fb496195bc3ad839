"""What systemd and a service say to each other: sockets that it opened for us, readiness, the watchdog.

Sources: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3). Each is a few lines without libsystemd.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

_FIRST = 3


def notify_systemd(state: str) -> None:
    """Tells systemd how we are: lines like ``READY=1``. Nothing happens outside a unit of Type=notify.

    One that cannot be told is no error: systemd itself draws the conclusion.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        return


def take_sockets(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """The listening sockets that systemd opened for us, by FileDescriptorName=; none if we were not started by a socket unit.

    The variables are taken out of the environment, and the descriptors are closed in programs that we run: both are for us only.

    Args:
        environ: the environment; LISTEN_PID says whose the sockets are, which a program that systemd's service runs may inherit.
    """
    pid, count, names = (environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return {}
    found: dict[str, list[socket.socket]] = {}
    given = names.split(":") if names else []
    for index in range(int(count)):
        descriptor = _FIRST + index
        os.set_inheritable(descriptor, False)  # noqa: FBT003 (the standard library's interface)
        name = given[index] if index < len(given) else "unknown"
        # Family and type are asked of the descriptor itself (socket.socket, fileno).
        found.setdefault(name, []).append(socket.socket(fileno=descriptor))
    return found


def read_watchdog() -> float | None:
    """Seconds within which systemd wants a sign of life; None if it wants none, or not from us."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isascii() or not usec.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1_000_000 or None
