"""The error family. Every error a user can meet says what was tried, on what, what the kernel said, and what to do.

Raise early; catch only in a step (to undo), in the request handler (to answer) and in the command line (to exit).
"""

from __future__ import annotations

import os


class OrchestratorError(Exception):
    """Base of all errors that are meant for a user.

    Args:
        message: what was tried, on what, and what went wrong.
        hint: what the user can do about it; empty when nothing can be said.
    """

    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class RequestError(OrchestratorError):
    """The request itself is wrong: bad name, bad size, unknown image."""

    code = "bad-request"


class NotFound(OrchestratorError):
    """A guest, lab or image that was named does not exist."""

    code = "not-found"


class Conflict(OrchestratorError):
    """The name is taken, or the thing is in a state in which the request makes no sense."""

    code = "conflict"


class LostRace(Conflict):
    """Claims have changed since they were read. Reading and planning again may succeed."""

    code = "lost-race"


class NoRoom(OrchestratorError):
    """The host cannot hold the guest.

    Args:
        message: what was asked for.
        reasons: for each candidate (a NUMA node, a VF) why it was refused.
    """

    code = "no-room"

    def __init__(self, message: str, reasons: tuple[str, ...], hint: str = "") -> None:
        super().__init__(message + "".join(f"\n  - {reason}" for reason in reasons), hint)
        self.reasons = reasons


class QuotaExceeded(NoRoom):
    """Whether the host could hold the guest or not: its tenant may not have so much."""

    code = "quota"


class Stale(Conflict):
    """The guest has changed since the caller has seen it (RFC 9110 13.1.1, If-Match)."""

    code = "stale"


class Unauthorized(OrchestratorError):
    """Nobody is known by these credentials, or there were none."""

    code = "unauthorized"


class Forbidden(OrchestratorError):
    """Whoever asks may not do this."""

    code = "forbidden"


class TooMany(OrchestratorError):
    """More requests at a time than one client may send.

    Args:
        wait: seconds after which it may try again.
    """

    code = "too-many"

    def __init__(self, message: str, hint: str = "", wait: float = 1.0) -> None:
        super().__init__(message, hint)
        self.wait = wait


class TooLarge(OrchestratorError):
    """A request has more bytes, or is nested deeper, than any that makes sense."""

    code = "too-large"


class HostError(OrchestratorError):
    """The kernel refused, or clamped, a read or a change of the host.

    Args:
        message: what was tried and on which file or device.
        hint: what to do.
        errno: the kernel's errno, or 0 where it gave none (a clamped value).
    """

    code = "host"

    def __init__(self, message: str, hint: str = "", errno: int = 0) -> None:
        text = f"{message}: {os.strerror(errno)} (errno {errno})" if errno else message
        super().__init__(text, hint)
        self.errno = errno


class CommandError(HostError):
    """A program that we ran failed, was not found, or took too long."""

    code = "command"


class HypervisorError(OrchestratorError):
    """libvirt or QEMU refused.

    Args:
        message: what was tried and what libvirt said.
        hint: what to do.
        number: libvirt's own error number (VIR_ERR_*), 0 if there is none.
    """

    code = "hypervisor"

    def __init__(self, message: str, hint: str = "", number: int = 0) -> None:
        super().__init__(message, hint)
        self.number = number


class LedgerError(OrchestratorError):
    """The ledger's file is damaged, is of a newer version, or can't be read or written."""

    code = "ledger"


class GuestError(OrchestratorError):
    """The guest did not do what it was asked to: it did not get ready, or did not answer on its console."""

    code = "guest"


class ShellError(OrchestratorError):
    """An SSH connection could not be made, was lost, or ran out of time."""

    code = "shell"


class ImageError(OrchestratorError):
    """A guest image or a root file system could not be built."""

    code = "image"


class LabError(OrchestratorError):
    """The lab could not be built, started or stopped."""

    code = "lab"


class LabLost(LabError):
    """The lab host went away while it was in use. This says nothing about any proof."""

    code = "lab-lost"
