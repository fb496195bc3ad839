"""Properties that a host can lack. A guest that would lack one is refused, unless its request or the host accepts that."""

from __future__ import annotations

from enum import StrEnum


class Waiver(StrEnum):
    """The names for ``accept``. ``reason`` is one sentence: what is weaker, and why."""

    reason: str

    def __new__(cls, value: str, reason: str = "") -> Waiver:
        member = str.__new__(cls, value)
        member._value_ = value
        member.reason = reason
        return member

    EMULATED_DISK = (
        "emulated-disk",
        "QEMU emulates the disk with a file or volume of the host: each access makes the guest exit and uses housekeeping CPUs",
    )
    SOFTWARE_EDGE = ("software-edge", "the host's kernel forwards and can read every frame, on housekeeping CPUs")
    SHARED_CACHE = (
        "shared-cache",
        "the host cannot limit caches or memory bandwidth: other programs and guests can slow the guest down through them",
    )
    NO_IOMMU = (
        "no-iommu",
        "the host uses no IOMMU: its own devices can access the memory of every guest, and none can be passed through",
    )
