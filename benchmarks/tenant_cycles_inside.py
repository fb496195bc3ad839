"""Runs in the lab host (see tenant_cycles.py): creates and deletes one guest after the other on the same disk and cores.

Prints a line of JSON per cycle, and one of all. Exits with 1 at the first expectation that is not met.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.client.client import Client
from orchestrator.errors import NotFound, OrchestratorError
from orchestrator.host.nvme import read_controllers
from orchestrator.host.processes import read_maps, read_pagemap
from orchestrator.host.root import HostRoot
from orchestrator.host.run import run
from orchestrator.values import DEFAULT_SOCKET

SERIAL = "nohype-disk0"
READY = 180.0
MARKER = 16
"""Bytes."""


def main() -> int:
    """Breaks two things, then runs the cycles."""
    cycles, client = int(sys.argv[1]), Client(Path(DEFAULT_SOCKET))
    refused = break_wiped_disk(client)
    found = break_stopped_disk(client)
    print(json.dumps({"refused": refused, "found_on_disk": found}), flush=True)
    if not refused or not found:
        return 1
    total = {"cycles": 0, "hits": 0, "searched": 0, "same_pages": 0, "pages": 0}
    last, pages = os.urandom(MARKER), frozenset[int]()
    started = time.monotonic()
    for number in range(cycles):
        own = os.urandom(MARKER)
        name = f"tenant{number}"
        make(client, name)
        frames = read_frames(name)
        before = search(client, name, last)
        written = send(client, name, "write", own)
        after = search(client, name, own)
        delete(client, name)
        line = {
            "cycle": number, "hits_on_disk": before["disk"], "hits_in_memory": before["memory"], "own_on_disk": after["disk"],
            "own_in_memory": after["memory"], "searched": before["read"] + before["searched"], "same_pages": len(frames & pages),
            "pages": len(frames), "seconds": round(time.monotonic() - started),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        total["cycles"] += 1
        total["hits"] += before["disk"] + before["memory"]
        for key in ("searched", "same_pages", "pages"):
            total[key] += line[key]
        if before["disk"] or before["memory"] or after["disk"] != written["disk"] or after["memory"] < written["memory"]:
            print(json.dumps({"failed": line, "written": written}), flush=True)
            return 1
        last, pages = own, frames
    print(json.dumps({**total, "load": os.getloadavg()[0], "load_of": "the lab host"}), flush=True)
    return 0


def break_wiped_disk(client: Client) -> str:
    """A marker on a disk after its wipe, beyond what the survey reads: why the next guest does not get the disk."""
    make(client, "first")
    delete(client, "first")
    write_marker(os.urandom(MARKER))
    try:
        make(client, "second")
    except OrchestratorError as error:
        return error.message if "not empty" in error.message else ""
    finally:
        clear_disk()
    return ""


def break_stopped_disk(client: Client) -> int:
    """A marker on a guest's disk after it was verified clean: how often the guest finds it."""
    marker = os.urandom(MARKER)
    make(client, "third")
    client.kill("third")
    write_marker(marker)
    client.start("third")
    client.wait_ready("third", READY)
    found = search(client, "third", marker)["disk"]
    delete(client, "third")
    return found


def make(client: Client, name: str) -> None:
    """Creates a guest and waits until it reports ready."""
    client.create({"name": name, "memory": "128M", "image": "marker", "disks": [{"serial": SERIAL}]})
    client.wait_ready(name, READY)


def delete(client: Client, name: str) -> None:
    """Returns when the disk is wiped, and no program of udev examines it."""
    client.delete(name)
    with suppress(NotFound):
        while (state := client.guest(name)["state"]) == "wiping":
            time.sleep(0.2)
        sys.exit(f"{name} is {state}, and was deleted")
    run(["udevadm", "settle"], timeout=READY)


def search(client: Client, name: str, marker: bytes) -> dict[str, int]:
    """How often the guest finds the marker, and how many bytes it has read."""
    return send(client, name, "find", marker)


def send(client: Client, name: str, verb: str, marker: bytes) -> dict[str, int]:
    """The guest gets the complement: it must not contain the marker that it searches for."""
    words = [int.from_bytes(marker[at : at + 8], "little") ^ (1 << 64) - 1 for at in (0, 8)]
    reply = client.send_command(name, f"marker {verb} /dev/nvme0n1 {words[0]:016x}{words[1]:016x}", 300.0)
    return {key: int(value) for key, value in (word.split("=") for word in reply.split() if "=" in word)}


def read_frames(name: str) -> frozenset[int]:
    """The physical addresses of the guest's huge pages."""
    host, pid = HostRoot(), int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    huge = [mapping for mapping in read_maps(host, pid).mappings if mapping.huge]
    pages = [start for mapping in huge for start in range(mapping.start, mapping.end, mapping.page_size)]
    return frozenset(frame for frame in read_pagemap(host, pid, tuple(pages)) if frame is not None)


def find_device() -> str:
    disk = next(one for one in read_controllers(HostRoot()) if one.serial == SERIAL)
    return f"/dev/{disk.namespaces[0].device}"


def write_marker(marker: bytes) -> None:
    with open(find_device(), "r+b", buffering=0) as file:
        file.seek(32 << 20)
        file.write(marker * 256)
        os.fsync(file.fileno())


def clear_disk() -> None:
    with open(find_device(), "r+b", buffering=0) as file:
        file.seek(32 << 20)
        file.write(bytes(4096))
        os.fsync(file.fileno())


sys.exit(main())
