"""Errors for users. A message has the failed operation, its object and the kernel's reason; a hint has what to do.

Catch only in a step (to undo), in the request handler (to respond) and in the command line (to exit).
"""

from __future__ import annotations

import os


class OrchestratorError(Exception):
    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class RequestError(OrchestratorError):
    code = "bad-request"


class NotFound(OrchestratorError):
    code = "not-found"


class Conflict(OrchestratorError):
    code = "conflict"


class LostRace(Conflict):
    """Claims have changed since they were read. A retry can succeed."""

    code = "lost-race"


class NoRoom(OrchestratorError):
    code = "no-room"

    def __init__(self, message: str, reasons: tuple[str, ...], hint: str = "") -> None:
        super().__init__(message + "".join(f"\n  - {reason}" for reason in reasons), hint)
        self.reasons = reasons  # one per candidate (NUMA node, VF)


class QuotaExceeded(NoRoom):
    code = "quota"


class Stale(Conflict):
    """The guest is not at the version that the caller expects (RFC 9110 13.1.1, If-Match)."""

    code = "stale"


class Unauthorized(OrchestratorError):
    code = "unauthorized"


class Forbidden(OrchestratorError):
    code = "forbidden"


class TooMany(OrchestratorError):
    code = "too-many"

    def __init__(self, message: str, hint: str = "", wait: float = 1.0) -> None:
        super().__init__(message, hint)
        self.wait = wait  # seconds before a retry


class TooLarge(OrchestratorError):
    code = "too-large"


class HostError(OrchestratorError):
    """The kernel refused or clamped an operation; `errno` is 0 for a clamped value."""

    code = "host"

    def __init__(self, message: str, hint: str = "", errno: int = 0) -> None:
        text = f"{message}: {os.strerror(errno)} (errno {errno})" if errno else message
        super().__init__(text, hint)
        self.errno = errno


class CommandError(HostError):
    code = "command"


class HypervisorError(OrchestratorError):
    """libvirt or QEMU refused; `number` is libvirt's error number (VIR_ERR_*) or 0."""

    code = "hypervisor"

    def __init__(self, message: str, hint: str = "", number: int = 0) -> None:
        super().__init__(message, hint)
        self.number = number


class SwitchError(OrchestratorError):
    """An external switch cannot be reached, is not the expected one, or refused a request."""

    code = "switch"


class LedgerError(OrchestratorError):
    code = "ledger"


class GuestError(OrchestratorError):
    code = "guest"


class ReadyBySsh(GuestError):
    """The guest reports that it is ready only by answering SSH, which the manager does not check."""

    code = "ready-by-ssh"


class ShellError(OrchestratorError):
    code = "shell"


class ImageError(OrchestratorError):
    code = "image"


class LabError(OrchestratorError):
    code = "lab"


class LabLost(LabError):
    """The lab host disappeared while it was in use. This is not the result of a proof."""

    code = "lab-lost"
