"""Runs on the lab host: prints what the kernel itself says of guests, as JSON. Imports nothing of the product.

Arguments: the uplink, then the names of guests.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def read_guest(name: str) -> dict[str, Any]:
    """The affinity of each vCPU by its number, the bytes in huge pages, and the functions that the process has open."""
    pid = Path(f"/run/libvirt/qemu/{name}.pid").read_text().strip()
    affinity = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if found := re.fullmatch(r"CPU (\d+)/KVM", (task / "comm").read_text().strip()):
            affinity[int(found[1])] = re.findall(r"^Cpus_allowed_list:\s*(\S+)", (task / "status").read_text(), re.MULTILINE)[0]
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    pages = sum(int(size) for size in re.findall(r"^(?:Private|Shared)_Hugetlb:\s*(\d+) kB", smaps, re.MULTILINE))
    groups = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if "vfio" in str(link.readlink())}
    return {"affinity": [affinity[number] for number in sorted(affinity)], "huge_bytes": pages * 1024, "vfio": sorted(groups)}


def read_vfs(uplink: str) -> dict[str, Any]:
    """By PCI address: number, driver, IOMMU group, and what ip-link(8) shows."""
    shown = json.loads(subprocess.run(["ip", "-j", "link", "show", uplink], capture_output=True, check=True).stdout)[0]
    settings = {vf["vf"]: vf for vf in shown["vfinfo_list"]}
    found = {}
    for link in Path(f"/sys/class/net/{uplink}/device").glob("virtfn*"):
        number, device = int(link.name.removeprefix("virtfn")), link.resolve()
        driver = device / "driver"
        found[device.name] = {
            "index": number,
            "driver": driver.resolve().name if driver.exists() else None,
            "group": (device / "iommu_group").resolve().name,
            **{key: settings[number].get(key) for key in ("address", "spoofchk", "trust")},
        }
    return found


def read_pools() -> dict[str, int]:
    """Free huge pages by node and size in kB."""
    files = Path("/sys/devices/system/node").glob("node*/hugepages/hugepages-*kB/free_hugepages")
    return {f"{file.parts[5][4:]} {file.parts[7][10:-2]}": int(file.read_text()) for file in files}


if __name__ == "__main__":
    uplink, *names = sys.argv[1:]
    print(json.dumps({"guests": {name: read_guest(name) for name in names}, "vfs": read_vfs(uplink), "pools": read_pools()}))
