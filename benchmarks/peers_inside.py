"""The part of peers.py that runs on the lab host: starts one guest after the other and measures all in the same way.

The argument is a job as JSON (see `peers.py`). Prints one line of JSON per guest, and empty lines meanwhile: writing fails once
the connection is lost, so that the process ends and cleans up.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import tty
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import libvirt

from orchestrator.client import Client
from orchestrator.config import DEFAULT_CONFIG, read_config
from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host import netlink
from orchestrator.host.activity import Activity, read_activity, read_thread_slices
from orchestrator.host.exit_trace import name_reason, read_reasons
from orchestrator.host.histogram import TRACING
from orchestrator.host.processes import Mapping as MemoryMapping
from orchestrator.host.processes import Thread, find_comm, read_maps, read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import find_vf, read_numvfs, read_pfs, set_numvfs
from orchestrator.images.store import find_image
from orchestrator.values import CpuSet, PciAddress

OURS, PREFIX = "nohype", "peers-"
MEMORY = 256 << 20
BRIDGE, MAC = "peers0", "52:54:00:70:65:01"
CPUS = "2-3"
FIFO, FIFO_PRIORITY, RT_RUNTIME = "kubevirt", 1, "proc/sys/kernel/sched_rt_runtime_us"
INSTANCE = f"{TRACING}/instances/peers"
EVENT = f"{INSTANCE}/events/kvm/kvm_exit"
TRIGGER = "hist:keys=common_pid,exit_reason:size=4096"
ENTRY = re.compile(r"\{ common_pid: *(\d+), exit_reason: *(\d+) *\} hitcount: *(\d+)", re.ASCII)
VCPU = re.compile(r"CPU (\d+)/KVM")
RECORD = Path("/run/nohype-peers.json")
"""What was changed on the host, with the values before."""
READY_TIMEOUT, SETTLE, BURN_MARGIN, POLL, BEAT = 300.0, 10.0, 12.0, 0.1, 5.0

host = HostRoot(net=netlink)


@dataclass(frozen=True)
class Guest:
    """A running guest of the benchmark."""

    name: str
    pid: int
    log: Path
    console: str
    vcpus: dict[int, Thread]
    cpus: CpuSet  # where its vCPUs may run


@dataclass(frozen=True)
class Reading:
    time: float
    exits: dict[int, dict[str, int]]  # by vCPU and reason
    activity: Activity
    slices: dict[int, int]  # by vCPU
    ran: dict[int, float]  # seconds by vCPU


def main() -> None:
    job = json.loads(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    libvirt.registerErrorHandler(lambda *_: None, None)
    config = read_config(DEFAULT_CONFIG)
    client, connection = Client(Path(config.paths.socket)), libvirt.open("qemu:///system")
    clean(client, connection)
    if client.guests() or connection.numOfDomains():
        sys.exit("the lab has running guests: delete them first")
    try:
        versions = {"kernel": platform.release(), "qemu": split_version(connection.getVersion()),
                    "libvirt": split_version(connection.getLibVersion()), "cmdline": host.read("proc/cmdline")}  # fmt: skip
        for peer in job["order"]:
            result = measure(peer, job, client, connection, Path(config.paths.images))
            print(json.dumps({"peer": peer, **result, "host": versions}), flush=True)
    finally:
        clean(client, connection)


def split_version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def measure(peer: str, job: dict[str, Any], client: Client, connection: Any, images: Path) -> dict[str, Any]:
    """Raises SystemExit with the reason if the guest does not become ready, or its workload does not run."""
    xml = job["peers"].get(peer)
    values = {"name": PREFIX + peer, "cmdline": job["cmdline"], "memory": str(MEMORY >> 10)}
    vf = prepare(peer, needs_vf="$vf_bus" in xml) if xml else None
    begin_counting()
    started = time.monotonic()
    if xml is None:
        client.create({"name": values["name"], "memory": "256M", "image": "minimal", "cores": 1, "placement": {"cpus": CPUS},
                       "cmdline": values["cmdline"], "housekeeping": "0"})  # fmt: skip
    else:
        connection.createXML(fill(xml, values, find_image(images, "minimal"), vf))
    guest = find_guest(values["name"], connection)
    if peer == FIFO:
        for thread in guest.vcpus.values():
            os.sched_setscheduler(thread.tid, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
    line = wait_for_line(guest, "nohype: ready ", READY_TIMEOUT)
    ready, boot = time.monotonic() - started, read_exits(guest)
    wait(SETTLE)
    idle = watch(guest, job["idle"])
    busy = watch_busy(guest, job["busy"])
    memory = measure_memory(read_maps(host, guest.pid).mappings)
    result = {"ready": ready, "uptime": float(line.rpartition("uptime=")[2]), "boot": boot, "idle": idle, "busy": busy,
              "memory": memory, "cpus": str(guest.cpus)}  # fmt: skip
    end_guest(guest.name, client, connection)
    clean(client, connection)
    return result


def fill(xml: str, values: dict[str, str], image: Any, vf: PciAddress | None) -> str:
    """Raises KeyError if the template has an unknown name."""
    more = {"kernel": image.kernel, "initrd": image.choose_initrd(has_disk=False), "bridge": BRIDGE, "mac": MAC,
            "log": f"/var/log/libvirt/qemu/{values['name']}.console"}  # fmt: skip
    if vf:
        more |= {"vf_domain": f"{vf.domain:#06x}", "vf_bus": f"{vf.bus:#04x}", "vf_slot": f"{vf.device:#04x}",
                 "vf_function": f"{vf.function:#x}"}  # fmt: skip
    cmdline = f"{image.cmdline} nohype.name={values['name']} {values['cmdline']}".strip()
    with suppress(FileNotFoundError):
        Path(more["log"]).unlink()
    return Template(xml).substitute({**values, **more, "cmdline": cmdline})


def prepare(peer: str, *, needs_vf: bool) -> PciAddress | None:
    """The network of a guest that the manager does not start, and its VF, if any."""
    if not needs_vf:
        note("bridge", BRIDGE)
        netlink.create_bridge(BRIDGE)
        return None
    pf = read_pfs(host)[0]
    if pf.interface is None:
        sys.exit(f"PF {pf.address} has no network interface")
    note("numvfs", [str(pf.address), read_numvfs(host, pf.address)])
    netlink.set_link_up(pf.interface, up=True)
    set_numvfs(host, pf.address, 1)
    wait_until(lambda: any(one.address == pf.address and one.up for one in read_pfs(host)), 60, f"PF {pf.address} has no carrier")
    vf = find_vf(host, pf.address, 0)
    if vf is None:
        sys.exit(f"PF {pf.address} has no VF")
    if peer == FIFO:
        subprocess.run(["ip", "link", "set", pf.interface, "vf", "0", "mac", MAC], check=True)
        host.write(f"sys/bus/pci/devices/{vf}/driver_override", "vfio-pci")
        host.write("sys/bus/pci/drivers_probe", str(vf))
        note("rt_runtime", host.read(RT_RUNTIME))
        host.write(RT_RUNTIME, "-1")
    return vf


def note(key: str, value: object) -> None:
    """Before the change: what `clean` has to undo."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**known, key: known.get(key, value)}))


def clean(client: Client, connection: Any) -> None:
    """Removes what this run or a run before it has left."""
    for domain in connection.listAllDomains():
        if domain.name().startswith(PREFIX):
            end_guest(domain.name(), client, connection)
    for guest in client.guests():
        if guest["name"].startswith(PREFIX):
            client.delete(guest["name"])
    if host.exists(INSTANCE):
        host.remove_folder(INSTANCE)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if "bridge" in record:
        with suppress(HostError):
            netlink.delete_link(record["bridge"])
    if "rt_runtime" in record:
        host.write(RT_RUNTIME, record["rt_runtime"])
    if "numvfs" in record:
        release_vfs(PciAddress.parse(record["numvfs"][0]), record["numvfs"][1])
    RECORD.unlink(missing_ok=True)


def release_vfs(pf: PciAddress, count: int) -> None:
    vf = find_vf(host, pf, 0)
    if vf and host.exists(f"sys/bus/pci/devices/{vf}/driver"):
        host.write(f"sys/bus/pci/devices/{vf}/driver/unbind", str(vf))
    set_numvfs(host, pf, count)


def end_guest(name: str, client: Client, connection: Any) -> None:
    if any(guest["name"] == name for guest in client.guests()):
        client.delete(name)
        return
    with suppress(libvirt.libvirtError):
        connection.lookupByName(name).destroy()


def begin_counting() -> None:
    host.make_folder(INSTANCE)
    host.write(f"{EVENT}/trigger", TRIGGER)


def find_guest(name: str, connection: Any) -> Guest:
    pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    serial = ET.fromstring(connection.lookupByName(name).XMLDesc()).find("./devices/serial")
    log, source = (serial.find("log"), serial.find("source")) if serial is not None else (None, None)
    if log is None or source is None:
        sys.exit(f"guest {name} has no serial console with a log")
    vcpus = {int(found[1]): thread for thread in read_process_threads(host, pid) if (found := VCPU.fullmatch(thread.name))}
    if len(vcpus) != 2:
        sys.exit(f"guest {name} has {len(vcpus)} threads of vCPUs, expected 2")
    allowed = CpuSet.of(cpu for thread in vcpus.values() for cpu in os.sched_getaffinity(thread.tid))
    return Guest(name, pid, Path(log.get("file", "")), source.get("path", ""), vcpus, allowed)


def wait_for_line(guest: Guest, beginning: str, timeout: float) -> str:
    """The first whole line of the console with these words."""

    def find() -> str:
        lines = guest.log.read_text(errors="replace").splitlines(keepends=True) if guest.log.exists() else []
        return next((line[line.index(beginning) :].strip() for line in lines if beginning in line and line.endswith("\n")), "")

    try:
        return str(wait_until(find, timeout, f"guest {guest.name} did not print {beginning!r} within {timeout:g} s", guest))
    except SystemExit as error:
        last = guest.log.read_text(errors="replace")[-1500:] if guest.log.exists() else "(nothing)"
        sys.exit(f"{error}; the end of its console:\n{last}")


def wait_until(found: Callable[[], object], timeout: float, message: str, guest: Guest | None = None) -> object:
    """Raises SystemExit with the message after the timeout, and if the guest has ended."""
    end, beat = time.monotonic() + timeout, 0.0
    while not (value := found()):
        if time.monotonic() > end:
            sys.exit(message)
        if guest and not find_comm(host, guest.pid):
            sys.exit(f"guest {guest.name} ended")
        if time.monotonic() > beat:
            print(flush=True)
            beat = time.monotonic() + BEAT
        time.sleep(POLL)
    return value


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        print(flush=True)
        time.sleep(min(left, BEAT))


def read_exits(guest: Guest) -> dict[int, dict[str, int]]:
    text, names = host.read(f"{EVENT}/hist"), read_reasons(host)
    if not re.search(r"Dropped: 0\b", text):
        sys.exit("the histogram of exits is full")
    threads = {thread.tid: vcpu for vcpu, thread in guest.vcpus.items()}
    counts: dict[int, dict[str, int]] = {vcpu: {} for vcpu in guest.vcpus}
    for tid, reason, count in ENTRY.findall(text):
        if int(tid) in threads:
            counts[threads[int(tid)]][name_reason(int(reason), names)] = int(count)
    return counts


def read(guest: Guest) -> Reading:
    # The slices of the vCPUs directly after those of their CPUs, which read_activity reads last: the difference is of interest.
    exits, activity = read_exits(guest), read_activity(host, guest.cpus)
    slices = read_thread_slices(host, [(guest.pid, thread.tid) for thread in guest.vcpus.values()])
    by_vcpu = {vcpu: slices[thread.tid] for vcpu, thread in guest.vcpus.items()}
    return Reading(time.monotonic(), exits, activity, by_vcpu, read_run_times(guest))


def read_run_times(guest: Guest) -> dict[int, float]:
    """Seconds that the thread of each vCPU has run."""
    return {vcpu: int(host.read(f"proc/{guest.pid}/task/{thread.tid}/schedstat").split()[0]) / 1e9
            for vcpu, thread in guest.vcpus.items()}  # fmt: skip


def has_run(guest: Guest, before: Mapping[int, float], seconds: float) -> bool:
    return all(now - before[vcpu] > seconds for vcpu, now in read_run_times(guest).items())


def watch(guest: Guest, seconds: float) -> dict[str, Any]:
    before = read(guest)
    wait(seconds)
    return compare(before, read(guest))


def watch_busy(guest: Guest, seconds: float) -> dict[str, Any]:
    """While the command `burn` runs in the guest. Raises SystemExit if its vCPUs were not busy."""
    console = os.open(guest.console, os.O_RDWR | os.O_NOCTTY)
    try:
        tty.setraw(console)
        os.write(console, f"burn {seconds + BURN_MARGIN:.0f}\n".encode())
        begin = read_run_times(guest)
        wait_until(lambda: has_run(guest, begin, 1), 60, "the workload did not start", guest)
        result = watch(guest, seconds)
        wait_for_line(guest, "nohype: done burn ", 60)
    finally:
        os.close(console)
    if min(result["ran"].values()) < 0.5:
        sys.exit(f"the vCPUs of guest {guest.name} were not busy: {result['ran']}")
    return result


def compare(before: Reading, after: Reading) -> dict[str, Any]:
    """Exits per vCPU and reason; `ran` is the part of the time in which a vCPU's thread ran; the rest are counts. `switches`: to
    threads that are not vCPUs of the guest; the counters are read one after the other, so it can be off by 2.
    """
    seconds = after.time - before.time
    exits = {vcpu: subtract(counts, before.exits[vcpu]) for vcpu, counts in after.exits.items()}
    if after.activity.slices is None or before.activity.slices is None:
        sys.exit("the kernel of the lab host does not count time slices (CONFIG_SCHEDSTATS)")
    others = after.activity.slices - before.activity.slices - sum(after.slices.values()) + sum(before.slices.values())
    interrupts = subtract(after.activity.interrupts, before.activity.interrupts)
    names = {f"{number} {after.activity.names.get(number, '')}".strip(): count for number, count in interrupts.items()}
    return {"seconds": seconds, "exits": exits, "interrupts": names, "switches": max(0, others),
            "softirqs": subtract(after.activity.softirqs, before.activity.softirqs),
            "ran": {vcpu: (ran - before.ran[vcpu]) / seconds for vcpu, ran in after.ran.items()}}  # fmt: skip


def subtract(after: Any, before: Any) -> dict[str, int]:
    return {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}


def measure_memory(mappings: Sequence[MemoryMapping]) -> int:
    """Bytes of QEMU in RAM outside of the guest's memory, which is one mapping, of huge pages or of its exact size."""
    guest = [one for one in mappings if "ht" in one.flags or one.end - one.start == MEMORY]
    if sum(one.end - one.start for one in guest) != MEMORY:
        sys.exit(f"cannot find the guest's memory among the mappings of QEMU: {[one.path for one in guest]}")
    return sum(one.resident for one in mappings if one not in guest)


if __name__ == "__main__":
    try:
        main()
    except OrchestratorError as error:
        sys.exit(str(error))
    except libvirt.libvirtError as error:
        sys.exit(f"libvirt: {error}")
