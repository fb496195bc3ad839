"""Which disks a guest of the fleet can have, and which of them Slurm counts."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.errors import RequestError
from orchestrator.model.request import DiskKind, DiskRequest


def check_disks(disks: Iterable[DiskRequest]) -> None:
    """Raises RequestError for a disk that a guest of the fleet cannot have."""
    for disk in disks:
        if disk.kind is DiskKind.NETWORK:
            what = "a network disk cannot be requested for a guest of the fleet"
            why = "two hosts could use one target at the same time, because the manager of a host checks only its own guests"
            raise RequestError(f"{what}: {why}", "omit the disk, or create the guest at its host")
        if disk.serial:
            what = "the serial number of a disk cannot be requested for a guest of the fleet"
            raise RequestError(f"{what}: it names a device of one host", "omit serial; give a minimum size if needed")


def count_nvme(disks: Iterable[DiskRequest]) -> int:
    return sum(disk.kind is DiskKind.NVME for disk in disks)


def has_emulated(disks: Iterable[DiskRequest]) -> bool:
    return any(disk.kind is DiskKind.EMULATED for disk in disks)
