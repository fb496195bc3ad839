"""Types of the responses about VM exits."""

from __future__ import annotations

from typing import Literal, TypedDict


class Disengaged(TypedDict):
    """The end of a guest's boot: when the manager noticed it (UTC, ISO 8601), and by which signal."""

    time: str
    signal: Literal["call", "ready", "time", "request"]


class Budget(TypedDict):
    """VM exits of one vCPU that are allowed per second and per minute; null for no limit."""

    second: int | None
    minute: int | None


class ExitPolicy(TypedDict):
    """Budgets by reason for each class of vCPU, what happens to a guest that exceeds one, and how long its boot can last."""

    action: Literal["report", "pause", "kill"]
    boot_seconds: int | None
    application: dict[str, Budget]
    housekeeping: dict[str, Budget]


class VcpuExits(TypedDict):
    """VM exits of one vCPU since its guest started.

    ``total`` is KVM's counter of all exits, null if the kernel or QEMU lacks it. ``reasons`` are exits by KVM's name of their
    hardware reason, null if they were not counted. ``uncounted`` is the part of ``total`` before the reasons were counted.
    """

    total: int | None
    reasons: dict[str, int] | None
    uncounted: int | None


class ExitReport(TypedDict):
    """VM exits per vCPU. ``why`` says why reasons are missing, and is empty if each vCPU has them."""

    vcpus: list[VcpuExits]
    why: str
