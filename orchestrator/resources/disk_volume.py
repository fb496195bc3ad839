"""An emulated disk that is a logical volume: created, cleared and verified, filled, activated for its guest, wiped and removed.

A volume is identified by the LVM ids of its group and itself. New volumes get extents of former ones, so each is cleared first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from orchestrator.errors import Conflict, HostError
from orchestrator.host.disk_image import write_image
from orchestrator.host.lvm import (
    Volume,
    activate_volume,
    activated,
    create_volume,
    deactivate_volume,
    find_volume,
    has_name,
    read_group,
    remove_volume,
)
from orchestrator.host.root import HostRoot
from orchestrator.host.scrub import scrub_device
from orchestrator.model.disk import DiskCheck
from orchestrator.model.event import utc_now
from orchestrator.model.plan import DiskPlan
from orchestrator.resources.disk import Contents, Progress, to_report
from orchestrator.resources.step import Arguments, UndoContext, lasting, parse_arguments, register, to_arguments


@dataclass(frozen=True)
class NameBefore:
    """A name in a volume group that no volume had."""

    file: str
    group_uuid: str
    name: str


@dataclass(frozen=True)
class VolumeBefore:
    """A logical volume of the manager."""

    file: str
    group_uuid: str
    name: str
    uuid: str


@register
@lasting
@dataclass(frozen=True)
class MakeVolume:
    """Creates the volume, inactive. Its extents can hold data of former volumes."""

    action: ClassVar[str] = "disk-volume"
    disk: DiskPlan

    def describe(self) -> str:
        return f"create logical volume {self.disk.file} of {self.disk.size}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        group, name = _split(self.disk)
        found = read_group(host, group)
        if found.fault:
            raise HostError(found.fault, f"check it with `vgs {group}`, or change [disks] volume_group")
        if has_name(host, group, name):
            what = f"logical volume {group}/{name} exists already"
            raise Conflict(
                what, f"remove it with `lvremove {group}/{name}` if its contents are not needed, or choose another name"
            )
        return to_arguments(NameBefore(self.disk.file, found.uuid, name))

    def apply(self, host: HostRoot) -> None:
        create_volume(host, *_split(self.disk), self.disk.size)
        volume = _find(host, self.disk)
        if volume.size.bytes < self.disk.size.bytes:
            raise HostError(f"logical volume {self.disk.file} has {volume.size}, requested {self.disk.size}")

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Removes the volume; no-op if there is none, or the volume of this name is not the manager's."""
        before = parse_arguments(NameBefore, arguments)
        if volume := find_volume(context.host, before.group_uuid, before.name):
            remove_volume(context.host, volume)


@register
@lasting
@dataclass(frozen=True)
class FillVolume:
    """Clears the volume, reads it back, and writes the image. ``verified`` gets the check."""

    action: ClassVar[str] = "disk-volume-contents"
    disk: DiskPlan
    contents: Contents
    verified: Callable[[DiskCheck], None] = field(compare=False)
    progress: Progress = field(compare=False)

    def describe(self) -> str:
        what = f"write image {self.contents.image} to" if self.contents.image else "hand over"
        return f"{what} logical volume {self.disk.file}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return to_arguments(_identify(self.disk, _find(host, self.disk)))

    def apply(self, host: HostRoot) -> None:
        report, image = to_report(self.progress, self.disk.file), self.contents.image
        with activated(host, _find(host, self.disk)) as device:
            result = scrub_device(host, device, report)
            if image is not None:
                write_image(host, device, image, report, blank=True, sha256=self.contents.sha256)
        digest = self.contents.sha256 if image else ""
        self.verified(DiskCheck(self.disk.file, None, utc_now(), result.method, result.size, self.disk.size.bytes, digest))

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Wipes the volume, and verifies that by reading all of it. Raises HostError if it is gone, in use, or not clean then."""
        before = parse_arguments(VolumeBefore, arguments)
        with activated(context.host, _find_again(context.host, before)) as device:
            scrub_device(context.host, device, to_report(context.progress, before.file))


@register
@dataclass(frozen=True)
class ActivateVolume:
    """Activates the volume while its guest runs: an inactive volume cannot be mounted or scanned on the host."""

    action: ClassVar[str] = "disk-volume-active"
    disk: DiskPlan

    def describe(self) -> str:
        return f"activate logical volume {self.disk.file}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return to_arguments(_identify(self.disk, _find(host, self.disk)))

    def apply(self, host: HostRoot) -> None:
        activate_volume(host, _find(host, self.disk))

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op if it is inactive, as after a reboot, or gone."""
        before = parse_arguments(VolumeBefore, arguments)
        volume = find_volume(context.host, before.group_uuid, before.name)
        if volume and volume.uuid == before.uuid:
            deactivate_volume(context.host, volume)


def _split(disk: DiskPlan) -> tuple[str, str]:
    """Names of the group and the volume."""
    return disk.group, disk.file.rpartition("/")[2]


def _find(host: HostRoot, disk: DiskPlan) -> Volume:
    group, name = _split(disk)
    found = read_group(host, group)
    volume = None if found.fault else find_volume(host, found.uuid, name)
    if volume is None:
        hint = f"check it with `lvs {group}`; delete the guest and create it again"
        raise HostError(found.fault or f"the manager's logical volume {group}/{name} does not exist", hint)
    return volume


def _identify(disk: DiskPlan, volume: Volume) -> VolumeBefore:
    return VolumeBefore(disk.file, volume.group_uuid, volume.name, volume.uuid)


def _find_again(host: HostRoot, before: VolumeBefore) -> Volume:
    volume = find_volume(host, before.group_uuid, before.name)
    if volume is None or volume.uuid != before.uuid:
        what = f"logical volume {before.file} ({before.uuid}) cannot be wiped: it was removed or replaced by another program"
        raise HostError(
            what, "its contents may be in the free space of the group: `nohype quarantine clear --force` releases the guest"
        )
    return volume
