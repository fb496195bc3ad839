"""LVM logical volumes for guests: created, activated and removed by LVM's own tools (lvm(8)). Others' volumes are not touched.

A volume of the manager has a tag, and each command selects it by its LVM id. A volume is inactive while its guest is stopped.
LVM must not read what guests have written: the commands skip volumes, and the NVMe controllers that the manager has reserved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import ENODEV, ENOENT

from orchestrator.errors import CommandError, HostError
from orchestrator.host.block import BLOCK, read_device_number
from orchestrator.host.nvme_binding import find_reserved
from orchestrator.host.root import HostRoot
from orchestrator.host.run import run
from orchestrator.model.topology import VolumeGroup
from orchestrator.values import Size
from orchestrator.waiting import wait_until

_TIMEOUT = 60  # seconds; LVM waits for the lock of a group
_NODE_TIMEOUT = 30.0  # seconds until the kernel has the device and udev its link
_ENVIRONMENT = {"LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
_TAG = "nohype"
_GROUP_FIELDS = "vg_name,vg_uuid,vg_extent_size,vg_free_count,vg_missing_pv_count,vg_exported,vg_permissions,vg_shared"
_VOLUME_FIELDS = "vg_name,vg_uuid,lv_name,lv_uuid,lv_size,lv_tags"


@dataclass(frozen=True)
class Volume:
    """A logical volume of the manager. ``uuid`` and ``group_uuid`` are LVM's ids, which never change."""

    group: str
    group_uuid: str
    name: str
    uuid: str
    size: Size

    @property
    def path(self) -> str:
        return volume_path(self.group, self.name)


def volume_path(group: str, name: str) -> str:
    return f"/dev/{group}/{name}"


def read_group(host: HostRoot, name: str) -> VolumeGroup:
    """What the group can give. ``fault`` has the reason if it cannot be used, or cannot be read."""
    nothing = VolumeGroup(name, "", Size(0), Size(0))
    try:
        rows = _report(host, "vgs", _GROUP_FIELDS, f"vg_name={name}", what=f"volume group {name}")
    except HostError as error:
        return replace(nothing, fault=error.message)
    if len(rows) != 1:
        fault = f"{len(rows)} volume groups have the name {name}" if rows else f"volume group {name} does not exist"
        return replace(nothing, fault=fault)
    row = rows[0]
    try:
        extent = int(row["vg_extent_size"])
        return VolumeGroup(name, row["vg_uuid"], Size(extent), Size(extent * int(row["vg_free_count"])), _find_fault(name, row))
    except (KeyError, ValueError):
        return replace(nothing, fault=f"cannot parse the output of vgs: {row}")


def _find_fault(name: str, row: Mapping[str, str]) -> str:
    if row["vg_missing_pv_count"] not in ("", "0"):
        return f"volume group {name} lacks {row['vg_missing_pv_count']} physical volumes"
    for field, word in (("vg_exported", "exported"), ("vg_shared", "shared with other hosts")):
        if row[field]:
            return f"volume group {name} is {word}"
    return "" if row["vg_permissions"] in ("", "writeable") else f"volume group {name} is {row['vg_permissions']}"


def find_volume(host: HostRoot, group_uuid: str, name: str) -> Volume | None:
    """The manager's volume of this name; None if there is none, or it is not the manager's.

    Raises HostError if the group is not there, or cannot be read.
    """
    rows = _report(host, "lvs", _VOLUME_FIELDS, f"vg_uuid={group_uuid}", what=f"volumes of group {group_uuid}")
    if not rows and not _report(host, "vgs", "vg_uuid", f"vg_uuid={group_uuid}", what=f"volume group {group_uuid}"):
        hint = "`pvs` shows the physical volumes; connect the disks of the group again"
        raise HostError(f"the volume group with the id {group_uuid} does not exist", hint, ENODEV)
    found = [_parse(row) for row in rows if row.get("lv_name") == name and _TAG in row.get("lv_tags", "").split(",")]
    return found[0] if found else None


def has_name(host: HostRoot, group: str, name: str) -> bool:
    """Whether the group has a volume of this name, the manager's or not."""
    return any(row.get("lv_name") == name for row in _report(host, "lvs", _VOLUME_FIELDS, f"vg_name={group}", what=group))


def create_volume(host: HostRoot, group: str, name: str, size: Size) -> None:
    """Creates an inactive volume with allocated extents, which may contain data of former volumes. It is never activated at boot.

    Raises HostError if the group does not have the room, or a volume of the name.
    """
    words = ["--yes", "--type", "linear", "--activate", "n", "--zero", "n", "--wipesignatures", "n", "--setactivationskip", "y"]
    words += ["--addtag", _TAG, "--size", f"{size.bytes}b", "--name", name, group]
    _execute(
        host, "lvcreate", words, f"cannot create logical volume {group}/{name} of {size}", f"`vgs {group}` shows its free space"
    )


def activate_volume(host: HostRoot, volume: Volume) -> str:
    """Returns the block device ("dm-3"), to which the volume's path links. No-op if it is active."""
    words = ["--activate", "y", "--ignoreactivationskip"]
    _change(host, "lvchange", words, volume, "activate")
    # udev makes the link. Without that, QEMU would be given another file or none.
    if not wait_until(lambda: _is_linked(host, volume), timeout=_NODE_TIMEOUT, interval=0.05):
        what = f"logical volume {volume.group}/{volume.name} was activated, but {volume.path} does not link to its device"
        raise HostError(what, "check udev with `udevadm info`, and the kernel log with dmesg", ENOENT)
    device = find_device(host, volume)
    if device is None:
        raise HostError(f"logical volume {volume.group}/{volume.name} was deactivated by another program", "retry", ENODEV)
    return device


def deactivate_volume(host: HostRoot, volume: Volume) -> None:
    """No-op if it is not active. Raises HostError if it is in use, or is active afterwards."""
    _change(host, "lvchange", ["--activate", "n"], volume, "deactivate")
    if device := find_device(host, volume):
        raise HostError(f"logical volume {volume.group}/{volume.name} is still active ({device})", f"`lsof /dev/{device}`")


@contextmanager
def activated(host: HostRoot, volume: Volume) -> Iterator[str]:
    """Activates the volume for the time of the block, and yields its block device."""
    device = activate_volume(host, volume)
    try:
        yield device
    finally:
        deactivate_volume(host, volume)


def remove_volume(host: HostRoot, volume: Volume) -> None:
    """It must be inactive. Raises HostError if the volume is there afterwards."""
    deactivate_volume(host, volume)
    _change(host, "lvremove", ["--yes"], volume, "remove")
    if find_volume(host, volume.group_uuid, volume.name):
        raise HostError(
            f"logical volume {volume.group}/{volume.name} was not removed", f"`lvremove {volume.group}/{volume.name}`"
        )


def find_device(host: HostRoot, volume: Volume) -> str | None:
    """The block device of an active volume."""
    # drivers/md/dm-sysfs.c. LVM's lib/activate/dev_manager.c: "LVM-" and both ids without hyphens.
    wanted = f"LVM-{volume.group_uuid}{volume.uuid}".replace("-", "")
    devices = [name for name in host.names(BLOCK) if re.fullmatch(r"dm-\d+", name)] if host.exists(BLOCK) else []
    return next((name for name in devices if (host.find(f"{BLOCK}/{name}/dm/uuid") or "").replace("-", "") == wanted), None)


def _is_linked(host: HostRoot, volume: Volume) -> bool:
    device = find_device(host, volume)
    path = volume.path.lstrip("/")
    try:
        # The link can lead to another one, in /dev/mapper.
        return device is not None and (
            host.link(path) == device or host.find_device_number(path) == read_device_number(host, device)
        )
    except HostError:  # a node instead of a link, or deactivated meanwhile
        return False


def _change(host: HostRoot, command: str, words: list[str], volume: Volume, verb: str) -> None:
    selection = f"lv_uuid={volume.uuid} && vg_uuid={volume.group_uuid} && lv_tags={_TAG}"
    name = f"{volume.group}/{volume.name}"
    hint = f"`lvs {volume.group}` and `lsblk` show its state and who uses it"
    _execute(host, command, [*words, "--select", selection], f"cannot {verb} logical volume {name}", hint)


def _report(host: HostRoot, command: str, fields: str, selection: str, *, what: str) -> list[dict[str, str]]:
    words = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", fields, "--select", selection]
    text = _execute(host, command, words, f"cannot read {what}", "check it with `vgs` and `lvs`")
    try:
        (report,) = json.loads(text)["report"]
        ((_, rows),) = report.items()
        return [{name: str(value) for name, value in row.items()} for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HostError(f"cannot parse the output of {command}: {text[:200]!r}") from None


def _parse(row: Mapping[str, str]) -> Volume:
    try:
        return Volume(row["vg_name"], row["vg_uuid"], row["lv_name"], row["lv_uuid"], Size(int(row["lv_size"])))
    except (KeyError, ValueError):
        raise HostError(f"cannot parse the output of lvs: {row}") from None


def _execute(host: HostRoot, command: str, words: list[str], what: str, hint: str) -> str:
    skipped = ",".join(f'"r|^/dev/{name}$|","r|^/dev/{name}p|"' for name in find_reserved(host))
    try:
        # use_aio: the manager's unit does not permit io_setup(2).
        config = f"global{{use_aio=0}} devices{{scan_lvs=0{f' {_choose_filter()}=[{skipped}]' if skipped else ''}}}"
        return run([command, "--config", config, *words], timeout=_TIMEOUT, env=_ENVIRONMENT).stdout
    except CommandError as error:
        if error.errno == ENOENT or "is not installed" in error.message:
            raise HostError(f"{what}: {command} is not installed", "install the package lvm2") from None
        # The last lines are LVM's own; the command line is long.
        cause = "; ".join(line.strip() for line in error.message.splitlines()[1:]) or error.message
        raise HostError(f"{what}: {cause}", hint) from None


def _choose_filter() -> str:
    """The setting that lvm.conf does not use: one on the command line replaces it. LVM reads a device that both let pass.

    ``filter`` if it uses both. The patterns cannot be combined: LVM reads a device if one of its names is accepted.
    """
    text = run(["lvmconfig", "devices"], timeout=_TIMEOUT, env=_ENVIRONMENT, check=False).stdout
    used = {line.partition("=")[0].strip() for line in text.splitlines()}
    return "global_filter" if "filter" in used and "global_filter" not in used else "filter"
