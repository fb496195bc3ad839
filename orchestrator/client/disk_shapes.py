"""Types of the responses about disks."""

from __future__ import annotations

from typing import TypedDict


class Disk(TypedDict):
    """A guest's disk: the NVMe controller with this serial number and PCI address, a file of the host, or a target.

    ``size`` is bytes, 0 for a target, which only the guest reaches.
    ``group`` is the LVM volume group if ``file`` is a logical volume, otherwise empty.
    """

    size: int
    serial: str
    address: str | None
    node: int | None
    file: str
    target: str
    group: str


class DiskProgress(TypedDict):
    """The work on a guest's disk: serial number or file, phase, and how much of the phase is done."""

    disk: str
    phase: str
    percent: int
