"""resctrl as the product uses it: control groups with masks, bandwidth limits and CPUs (kernel: fs/resctrl).

What the kernel writes to info/last_cmd_status is its own text.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import RequestError
from orchestrator.values import CpuSet

if TYPE_CHECKING:
    from tests.fakes.root import FakeRoot

RESCTRL = "sys/fs/resctrl"
INFO = f"{RESCTRL}/info"
_STATUS = f"{INFO}/last_cmd_status"
_FIXED = ("info", "mon_data", "mon_groups")
_DECIMAL = ("MB", "SMBA")


def add_caches(fake: FakeRoot, caches: Mapping[int, str], level: int = 3) -> None:
    """Gives the CPUs unified caches. ``caches``: id → the CPUs that share the cache."""
    for id, cpus in caches.items():
        for cpu in CpuSet.parse(cpus):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{level}"
            for name, text in {"id": id, "level": level, "type": "Unified", "shared_cpu_list": cpus}.items():
                fake.add(f"{folder}/{name}", str(text))


def mount(
    fake: FakeRoot, caches: Iterable[int], *, ways: int = 12, minimum: int = 1, shared: int = 0, closids: int = 16,
    cdp: bool = False, sparse: bool = False, bandwidth: str = "percent", level: int = 3,
) -> None:  # fmt: skip
    """``ways`` 0: without CAT. ``bandwidth``: "percent", "MB/s", "1/8 GB/s", or empty without MBA."""
    caches = tuple(caches)
    lines = [] if not ways else [f"L{level}CODE", f"L{level}DATA"] if cdp else [f"L{level}"]
    for line in lines:
        texts = {
            "cbm_mask": f"{(1 << ways) - 1:x}", "min_cbm_bits": minimum, "shareable_bits": f"{shared:x}", "num_closids": closids,
            "sparse_masks": int(sparse), "bit_usage": "",
        }  # fmt: skip
        for name, text in texts.items():
            fake.add(f"{INFO}/{line}/{name}", str(text))
    maximum = {"percent": 100, "MB/s": (1 << 32) - 1, "1/8 GB/s": 2048}.get(bandwidth)
    if maximum:
        step = 10 if bandwidth == "percent" else 1
        for name, text in {"min_bandwidth": step, "bandwidth_gran": step, "num_closids": closids, "delay_linear": 1}.items():
            fake.add(f"{INFO}/MB/{name}", str(text))
        lines.append("MB")
    fake.add(f"{INFO}/L3_MON/mon_features", "llc_occupancy\nmbm_total_bytes\nmbm_local_bytes")
    fake.add(_STATUS, "ok")
    options = "mba_MBps" if bandwidth == "MB/s" else "rw"
    fake.add("proc/self/mounts", f"sysfs /sys sysfs rw 0 0\nresctrl /sys/fs/resctrl resctrl {options},relatime 0 0")
    fake.add("proc/cpuinfo", f"processor\t: 0\nvendor_id\t: {'AuthenticAMD' if bandwidth == '1/8 GB/s' else 'GenuineIntel'}")
    limits = {line: dict.fromkeys(caches, maximum if line == "MB" else (1 << ways) - 1) for line in lines}
    _add_group(fake, "", limits, fake.read("sys/devices/system/cpu/online"))  # type: ignore[arg-type]


def show(fake: FakeRoot, name: str, counters: Mapping[str, str]) -> None:
    """``counters``: "mon_L3_00/llc_occupancy" → text."""
    for file, text in counters.items():
        fake.add(f"{_folder(name)}/mon_data/{file}", text)


def make_group(fake: FakeRoot, name: str) -> None:
    """fs/resctrl/rdtgroup.c, rdtgroup_mkdir_ctrl_mon() and __init_one_rdt_domain()."""
    if fake.exists(name):
        raise OSError(errno.EEXIST, "")
    if not fake.exists(INFO):
        raise OSError(errno.ENOENT, "")
    _say(fake, "")
    limits, groups = _read_limits(fake, ""), _list_groups(fake)
    if len(groups) >= min(int(fake.read(f"{INFO}/{line}/num_closids")) for line in limits):
        _refuse(fake, errno.ENOSPC, "Out of CLOSIDs")
    for line, values in limits.items():
        if line in _DECIMAL:
            continue
        full = int(fake.read(f"{INFO}/{line}/cbm_mask"), 16)
        # Free ways, and those of groups in shareable mode, which all of this fake's are: the lowest run of them.
        for id in values:
            values[id] = _lowest_run(full)
    _add_group(fake, name.rpartition("/")[2], limits, "")


def remove_group(fake: FakeRoot, name: str) -> None:
    """rdtgroup_rmdir_ctrl(): the CPUs go to the default group."""
    if not fake.exists(name):
        raise OSError(errno.ENOENT, "")
    _add_cpus(fake, "", CpuSet.parse(fake.text(f"{name}/cpus_list").strip()))
    shutil.rmtree(fake.path / name)


def write_schemata(fake: FakeRoot, path: str, value: str) -> None:
    """fs/resctrl/ctrlmondata.c, rdtgroup_schemata_write(): all lines, or none."""
    name = _name(path)
    _say(fake, "")
    if not value.endswith("\n"):
        raise OSError(errno.EINVAL, "")
    limits = _read_limits(fake, name)
    for text in value.splitlines():
        line, colon, rest = text.strip().partition(":")
        if not colon:
            _refuse(fake, errno.EINVAL, "Missing ':'")
        if line not in limits:
            _refuse(fake, errno.EINVAL, f"Unknown or unsupported resource name '{line}'")
        for pair in rest.split(";"):
            id, equals, number = pair.partition("=")
            if not equals or not id.strip().isdecimal():
                _refuse(fake, errno.EINVAL, "Missing '=' or non-numeric domain")
            if int(id) not in limits[line]:
                raise OSError(errno.EINVAL, "")
            limits[line][int(id)] = _parse_bandwidth(fake, number) if line in _DECIMAL else _parse_mask(fake, line, number)
    _show_limits(fake, name, limits)


def write_cpus(fake: FakeRoot, path: str, value: str) -> None:
    """rdtgroup_cpus_write() and cpus_ctrl_write()."""
    name = _name(path)
    _say(fake, "")
    try:
        cpus = CpuSet.parse(value.strip())
    except RequestError:
        _refuse(fake, errno.EINVAL, "Bad CPU list/mask")
    if cpus - CpuSet.parse(fake.read("sys/devices/system/cpu/online")):
        _refuse(fake, errno.EINVAL, "Can only assign online CPUs")
    before = CpuSet.parse(fake.text(path).strip())
    if not name and before - cpus:
        _refuse(fake, errno.EINVAL, "Can't drop CPUs from default group")
    for other in _list_groups(fake):
        file = f"{_folder(other)}/cpus_list"
        fake.add(file, str(CpuSet.parse(fake.text(file).strip()) - cpus))
    _add_cpus(fake, "", before - cpus)
    fake.add(path, str(cpus))


def _parse_mask(fake: FakeRoot, line: str, text: str) -> int:
    """cbm_validate()"""
    if not re.fullmatch(r"[0-9a-fA-F]+", text):
        _refuse(fake, errno.EINVAL, f"Non-hex character in the mask {text}")
    mask, full = int(text, 16), int(fake.read(f"{INFO}/{line}/cbm_mask"), 16)
    minimum = int(fake.read(f"{INFO}/{line}/min_cbm_bits"))
    if (minimum and not mask) or mask > full:
        _refuse(fake, errno.EINVAL, "Mask out of range")
    if mask != _lowest_run(mask) and fake.read(f"{INFO}/{line}/sparse_masks") == "0":
        _refuse(fake, errno.EINVAL, f"The mask {mask:x} has non-consecutive 1-bits")
    if mask.bit_count() < minimum:
        _refuse(fake, errno.EINVAL, f"Need at least {minimum} bits in the mask")
    return mask


def _parse_bandwidth(fake: FakeRoot, text: str) -> int:
    """bw_validate(): rounded up to whole steps."""
    if not text.isdecimal():
        _refuse(fake, errno.EINVAL, f"Invalid MB value {text}")
    minimum, step = (int(fake.read(f"{INFO}/MB/{name}")) for name in ("min_bandwidth", "bandwidth_gran"))
    largest = 100 if step == 10 else (1 << 32) - 1
    if not minimum <= int(text) <= largest:
        _refuse(fake, errno.EINVAL, f"MB value {text} out of range [{minimum},{largest}]")
    return -(-int(text) // step) * step


def _lowest_run(mask: int) -> int:
    return mask & ~(mask + (mask & -mask))


def _folder(name: str) -> str:
    return f"{RESCTRL}/{name}" if name else RESCTRL


def _name(path: str) -> str:
    folder = path.rpartition("/")[0]
    return folder[len(RESCTRL) + 1 :]


def _list_groups(fake: FakeRoot) -> list[str]:
    folders = sorted(found.name for found in Path(fake.path / RESCTRL).iterdir() if found.is_dir() and found.name not in _FIXED)
    return ["", *folders]


def _read_limits(fake: FakeRoot, name: str) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for text in fake.read(f"{_folder(name)}/schemata").splitlines():
        line, _, rest = text.strip().partition(":")
        pairs = (pair.split("=") for pair in rest.split(";"))
        found[line] = {int(id): int(value, 10 if line in _DECIMAL else 16) for id, value in pairs}
    return found


def _add_group(fake: FakeRoot, name: str, limits: dict[str, dict[int, int]], cpus: str) -> None:
    _show_limits(fake, name, limits)
    fake.add(f"{_folder(name)}/cpus_list", cpus)
    fake.add(f"{_folder(name)}/tasks", "1" if not name else "")
    fake.add(f"{_folder(name)}/mode", "shareable")


def _show_limits(fake: FakeRoot, name: str, limits: dict[str, dict[int, int]]) -> None:
    """Right-aligned, as schemata_list_create() does."""
    width = max(map(len, limits), default=0)
    texts = [
        f"{line:>{width}}:" + ";".join(f"{id}={value}" if line in _DECIMAL else f"{id}={value:x}" for id, value in of.items())
        for line, of in limits.items()
    ]
    fake.add(f"{_folder(name)}/schemata", "\n".join(texts))


def _add_cpus(fake: FakeRoot, name: str, cpus: CpuSet) -> None:
    file = f"{_folder(name)}/cpus_list"
    fake.add(file, str(CpuSet.parse(fake.text(file).strip()) | cpus))


def _say(fake: FakeRoot, text: str) -> None:
    fake.add(_STATUS, text or "ok")


def _refuse(fake: FakeRoot, number: int, text: str) -> None:
    _say(fake, text)
    raise OSError(number, "")
