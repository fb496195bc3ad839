"""What is known of the disks of a guest while they are prepared, handed over and wiped."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.values import PciAddress


@dataclass(frozen=True)
class DiskProgress:
    """The work on a guest's disk."""

    disk: str  # serial number, or file
    phase: str  # "format", "write-zeroes", "overwrite", "write" or "verify"
    percent: int


@dataclass(frozen=True)
class DiskCheck:
    """How a disk was verified clean before its guest got it."""

    disk: str  # serial number, or file
    address: PciAddress | None  # None for a file
    time: str  # UTC in ISO 8601
    method: str  # "read" (it was clean), or what has cleared it: "format", "write-zeroes", "overwrite", "new file"
    read: int  # bytes that were read, and were all zero
    size: int
    image: str = ""  # SHA-256 of the image that was then written and read back; empty for none
