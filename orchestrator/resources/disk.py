"""A guest's disks: verified clean, filled, passed through, watched and wiped.

An NVMe controller is identified by its serial number and its PCI address. Each step and undo reads both again: an address that
was stored may belong to another controller by now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from xml.etree.ElementTree import Element

from orchestrator.errors import Conflict, HostError
from orchestrator.host.block import BlockProgress, Report
from orchestrator.host.disk_files import check_absent, copy_image, create_file, remove_file
from orchestrator.host.disk_image import write_image
from orchestrator.host.nvme import read_controllers
from orchestrator.host.nvme_binding import (
    detach_controller,
    release_controller,
    remove_mark,
    reserve_controller,
    return_controller,
)
from orchestrator.host.pci import VFIO, has_function, read_driver
from orchestrator.host.root import HostRoot
from orchestrator.host.scrub import find_data, scrub_controller
from orchestrator.host.signatures import find_signatures
from orchestrator.model.disk import DiskCheck, DiskProgress
from orchestrator.model.event import utc_now
from orchestrator.model.plan import DiskPlan, Plan
from orchestrator.model.topology import NvmeController, NvmeNamespace
from orchestrator.resources.step import Arguments, UndoContext, lasting, parse_arguments, register, to_arguments
from orchestrator.resources.xml import element
from orchestrator.values import PciAddress
from orchestrator.waiting import wait_until

_FIRST_SLOT = 0x10
"""PCI slot of a guest's first disk. NICs come before: a guest numbers its interfaces by slot."""
PROBE_SECONDS = 30.0

Progress = Callable[[DiskProgress], None]
"""Called after each piece of work. An exception that it raises stops the work."""


@dataclass(frozen=True)
class Contents:
    """What a disk is filled with: the image's file of a whole disk, with its SHA-256; and whether it may be cleared first."""

    image: Path | None = None
    sha256: str = ""
    may_destroy: bool = False  # the configuration names the serial number


@dataclass(frozen=True)
class DiskBefore:
    """A controller that was verified clean for a guest, or may be cleared for it."""

    serial: str
    address: PciAddress
    namespaces: tuple[NvmeNamespace, ...]


@dataclass(frozen=True)
class FileBefore:
    """The file of an emulated disk, which did not exist."""

    file: str


@dataclass(frozen=True)
class ControllerBefore:
    """A controller that was bound to the driver nvme."""

    serial: str
    address: PciAddress


def check_disk(host: HostRoot, disk: DiskPlan, contents: Contents, progress: Progress) -> DiskCheck | None:
    """Reads the whole disk. None if it is not clean and may be cleared; changes nothing.

    Raises Conflict if it holds data that may not be destroyed, HostError if it cannot be read or the host uses it.
    """
    controller = find_controller(host, disk.serial, disk.address)
    found = find_signatures(host, controller)
    if not found:
        device = controller.namespaces[0].device
        offset = find_data(host, device, to_report(progress, disk.serial))
        if offset is None:
            return DiskCheck(disk.serial, disk.address, utc_now(), "read", disk.size.bytes, disk.size.bytes)
        found = (f"{device} holds data at offset {offset}",)
    if contents.may_destroy:
        return None
    hint = f"to have its contents destroyed, add {disk.serial} to [disks] serials and restart nohyped; or request another disk"
    raise Conflict(f"disk {disk.serial} is not empty: {'; '.join(found)}", hint)


@register
@lasting
@dataclass(frozen=True)
class ReserveDisk:
    """Keeps udev from examining what the guest writes. Undone after the disk was wiped."""

    action: ClassVar[str] = "disk-reserved"
    disk: DiskPlan

    def describe(self) -> str:
        return f"reserve disk {self.disk.serial} ({self.disk.address})"

    def read_before(self, host: HostRoot) -> Arguments | None:
        controller = find_controller(host, self.disk.serial, self.disk.address)
        return to_arguments(ControllerBefore(self.disk.serial, controller.address))

    def apply(self, host: HostRoot) -> None:
        reserve_controller(host, find_controller(host, self.disk.serial, self.disk.address).address, self.disk.serial)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """If the disk is gone, only its mark is removed: the host examines it when it is back."""
        if not ReserveDisk.release(context.host, arguments):
            remove_mark(context.host, parse_arguments(ControllerBefore, arguments).serial)

    @staticmethod
    def release(host: HostRoot, arguments: Arguments) -> bool:
        """False, and no change, if the disk is gone, or another one is at its address."""
        before = parse_arguments(ControllerBefore, arguments)
        found = _find_by_serial(host, before.serial)
        if not found or found.address != before.address:
            return False
        release_controller(host, before.address)
        return True


@register
@lasting
@dataclass(frozen=True)
class FillDisk:
    """Clears a disk that is not clean, and writes the image. From its record on, the disk is wiped before the claim is released.

    ``check`` is what ``check_disk`` returned; ``verified`` gets it, or that of the disk that was cleared.
    """

    action: ClassVar[str] = "disk-contents"
    disk: DiskPlan
    contents: Contents
    check: DiskCheck | None
    verified: Callable[[DiskCheck], None] = field(compare=False)
    progress: Progress = field(compare=False)

    def describe(self) -> str:
        what = f"write image {self.contents.image} to" if self.contents.image else "hand over"
        return f"{what} disk {self.disk.serial}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        controller = find_controller(host, self.disk.serial, self.disk.address)
        return to_arguments(DiskBefore(self.disk.serial, controller.address, controller.namespaces))

    def apply(self, host: HostRoot) -> None:
        serial, report = self.disk.serial, to_report(self.progress, self.disk.serial)
        controller = find_controller(host, serial, self.disk.address)
        check = self.check or _scrub(host, controller, controller.namespaces, report)
        image = self.contents.image
        if image is not None:
            write_image(host, controller.namespaces[0].device, image, report, blank=True, sha256=self.contents.sha256)
            check = DiskCheck(check.disk, check.address, check.time, check.method, check.read, check.size, self.contents.sha256)
        self.verified(check)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Wipes the disk, and verifies that by reading all of it. Raises HostError if it is gone, in use, or not clean then."""
        before = parse_arguments(DiskBefore, arguments)
        found = wait_until(lambda: _find_by_serial(context.host, before.serial), timeout=PROBE_SECONDS, interval=0.2)
        if found is None:
            raise HostError(
                f"disk {before.serial} cannot be wiped: no NVMe controller with this serial number is bound to the driver nvme",
                f"insert it again, or bind {before.address} to nvme; then `nohype quarantine clear`",
            )
        _scrub(context.host, found, before.namespaces, to_report(context.progress, before.serial))


@register
@dataclass(frozen=True)
class BindDisk:
    """Binds a controller to vfio-pci: the host no longer has a block device of it."""

    action: ClassVar[str] = "disk-driver"
    disk: DiskPlan

    def describe(self) -> str:
        return f"bind disk {self.disk.serial} ({self.disk.address}) to {VFIO}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        controller = find_controller(host, self.disk.serial, self.disk.address)
        return to_arguments(ControllerBefore(self.disk.serial, controller.address))

    def apply(self, host: HostRoot) -> None:
        controller = find_controller(host, self.disk.serial, self.disk.address)
        detach_controller(host, controller.address, self.disk.serial)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op if nothing at the address is bound to vfio-pci, as after a reboot or if the disk was removed."""
        before = parse_arguments(ControllerBefore, arguments)
        if has_function(context.host, before.address) and read_driver(context.host, before.address) in (None, VFIO):
            return_controller(context.host, before.address, before.serial)


@register
@lasting
@dataclass(frozen=True)
class MakeFile:
    """Creates the file of an emulated disk, with all its blocks allocated, and writes the image to it."""

    action: ClassVar[str] = "disk-file"
    disk: DiskPlan
    contents: Contents
    verified: Callable[[DiskCheck], None] = field(compare=False)
    progress: Progress = field(compare=False)

    def describe(self) -> str:
        return f"create file {self.disk.file} of {self.disk.size}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        check_absent(Path(self.disk.file))
        return to_arguments(FileBefore(self.disk.file))

    def apply(self, host: HostRoot) -> None:
        file, report = Path(self.disk.file), to_report(self.progress, self.disk.file)
        create_file(file, self.disk.size.bytes)
        if self.contents.image is not None:
            copy_image(file, self.contents.image, report, self.contents.sha256)
        size = self.disk.size.bytes
        self.verified(DiskCheck(self.disk.file, None, utc_now(), "new file", size, size, self.contents.sha256))

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Removes the file; no-op if there is none. The blocks go back to the host's file system, and are not overwritten."""
        remove_file(Path(parse_arguments(FileBefore, arguments).file))


def find_controller(host: HostRoot, serial: str, address: PciAddress | None) -> NvmeController:
    """The controller with this serial number. Raises HostError if it is gone, has moved, or cannot be given to a guest."""
    found = _find_by_serial(host, serial)
    if found is None:
        what = f"no NVMe controller with serial number {serial} is bound to the driver nvme"
        raise HostError(what, f"check {address} with `nohype survey`")
    if found.address != address:
        what = f"disk {serial} is at {found.address}, planned at {address}"
        raise HostError(what, "delete the guest and create it again, or move the disk back to its slot")
    if found.fault:
        raise HostError(f"disk {serial} ({address}): {found.fault}", "check it with `nohype survey`")
    if len(found.namespaces) != 1:
        raise HostError(f"disk {serial} has {len(found.namespaces)} namespaces, expected 1", "check it with `nvme list`")
    return found


def _find_by_serial(host: HostRoot, serial: str) -> NvmeController | None:
    return next((one for one in read_controllers(host) if one.serial == serial and (one.namespaces or one.fault)), None)


def _scrub(host: HostRoot, controller: NvmeController, wanted: tuple[NvmeNamespace, ...], report: Report) -> DiskCheck:
    serial = controller.serial or ""
    result = scrub_controller(host, controller.address, serial, wanted, report)
    return DiskCheck(serial, controller.address, utc_now(), result.method, result.size, controller.size.bytes)


def to_report(progress: Progress, disk: str) -> Report:
    """``disk`` names it in the progress."""

    def report(now: BlockProgress) -> None:
        progress(DiskProgress(disk, now.phase, 100 * now.done // now.total if now.total else 100))

    return report


def find_drivers(host: HostRoot, plan: Plan) -> dict[PciAddress, str | None]:
    """None for a controller that has no driver, or is gone."""
    return {disk.address: read_driver(host, disk.address) for disk in plan.disks if disk.address}


def diff_disks(plan: Plan, drivers: Mapping[PciAddress, str | None]) -> tuple[str, ...]:
    """Differences between a running guest's controllers and its plan. Pure."""
    return tuple(
        f"disk {disk.serial} ({disk.address}): driver {drivers.get(disk.address) or 'none'}, expected {VFIO}"
        for disk in plan.disks
        if disk.address and drivers.get(disk.address) != VFIO
    )


def find_still_bound(host: HostRoot, plan: Plan) -> tuple[str, ...]:
    """Controllers of an ended guest that are still passed through."""
    return tuple(f"disk {disk} is still bound to {VFIO}" for disk, driver in find_drivers(host, plan).items() if driver == VFIO)


def build_disks(plan: Plan, *, boot: bool) -> list[Element]:
    """``boot``: the guest's firmware boots from the first disk."""
    shown = [(number, disk) for number, disk in enumerate(plan.disks) if not disk.target]
    return [_build_disk(disk, number, boot=boot and not number) for number, disk in shown]


def _build_disk(disk: DiskPlan, number: int, *, boot: bool) -> Element:
    """managed='no': binding to vfio-pci and back is a step with its own undo."""
    order = [element("boot", order="1")] if boot else []
    guest_address = element(
        "address", type="pci", domain="0x0000", bus="0x00", slot=f"0x{_FIRST_SLOT + number:02x}", function="0x0"
    )
    if disk.address is None:
        kind, source_key = ("block", "dev") if disk.group else ("file", "file")
        return element(
            "disk",
            # cache=none: O_DIRECT, so that the guest's disk does not fill the host's page cache.
            element("driver", name="qemu", type="raw", cache="none", io="native", discard="ignore"),
            element("source", **{source_key: disk.file}),
            element("target", dev=f"vd{chr(ord('a') + number)}", bus="virtio"),
            *order,
            guest_address,
            type=kind,
            device="disk",
        )  # fmt: skip
    source = element(
        "address",
        domain=f"0x{disk.address.domain:04x}",
        bus=f"0x{disk.address.bus:02x}",
        slot=f"0x{disk.address.device:02x}",
        function=f"0x{disk.address.function:x}",
    )
    return element("hostdev", element("source", source), *order, guest_address, mode="subsystem", type="pci", managed="no")
