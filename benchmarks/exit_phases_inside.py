"""The part of exit_phases.py that runs on the lab host: starts guests, reads their exits, floods. Prints JSON."""

import json
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.client import Client
from orchestrator.errors import NotFound, OrchestratorError
from orchestrator.host.exit_trace import EXITS, read_reasons
from orchestrator.host.histogram import read_histogram
from orchestrator.host.root import HostRoot
from orchestrator.host.thread_counts import MMIO, read_counter

NAME, KINDS = "phases", ("cpuid", "msr", "io", "mmio", "hypercall", "npf")
VMX = {"cpuid": "CPUID", "msr": "MSR_READ", "io": "IO_INSTRUCTION", "hypercall": "VMCALL", "npf": "EPT_VIOLATION"}
BUDGET = {"second": 2000}
WINDOW, BEGUN = 0.2, 400
"""Seconds, and exits of a kind in them, with which its flood has begun: the command on the console makes fewer."""
LONGEST = 30.0
HOST = HostRoot()


def main() -> None:
    idle, client = float(sys.argv[1]), Client(Path("/run/nohype/nohyped.sock"))
    started_at = time.monotonic()
    client.create({"name": NAME, "memory": "128M", "image": "minimal"})
    try:
        samples: list[tuple[float, dict[str, int]]] = []
        boundary = over = 0.0
        while not over or time.monotonic() - over < idle:
            samples.append((time.monotonic() - started_at, add_up(client.exits(NAME))))
            if not over and client.guest(NAME)["disengaged"]:
                over = time.monotonic()
                boundary, before = over - started_at, count_mmio()
            time.sleep(0.5)
        result = {
            "idle": time.monotonic() - over, "boot": add_up(client.exits(NAME, phase="boot")), "boundary": boundary,
            "run": add_up(client.exits(NAME, phase="run")), "mmio": count_mmio() - before, "samples": samples,
        }  # fmt: skip
    finally:
        client.delete(NAME)
    result["floods"] = {kind: flood(client, kind) for kind in KINDS}
    print(json.dumps(result))


def add_up(report: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for vcpu in report["vcpus"]:
        for name, count in (vcpu["reasons"] or {}).items():
            found[name] = found.get(name, 0) + count
    return found


def count_mmio() -> int:
    """Of the guest's threads only."""
    counts = read_counter(HOST, MMIO)
    return sum(counts.get(tid, 0) for tid in find_threads()[1])


def find_threads() -> tuple[int, list[int]]:
    """The guest's QEMU, and its threads."""
    pid = int(Path(f"/run/libvirt/qemu/{NAME}.pid").read_text())
    return pid, [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]


def count(kind: str, tids: list[int]) -> int:
    if kind == "mmio":
        counts = read_counter(HOST, MMIO)
        return sum(counts.get(tid, 0) for tid in tids)
    numbers = {number for number, name in read_reasons(HOST).items() if name in (kind, VMX[kind])}
    text, _dropped = read_histogram(HOST, EXITS)
    words = [line.replace(",", " ").split() for line in text.splitlines() if line.startswith("{ common_pid:")]
    return sum(int(line[-1]) for line in words if int(line[2]) in tids and int(line[4]) in numbers)


def flood(client: Client, kind: str) -> dict[str, float | None]:
    """Seconds from the first exits of a flood until the event, the last exits, and the end of the guest's QEMU. None: it did not
    happen.

    The kernel's counts are read some times per tenth of a second; the flood began after the first reading of the window.
    """
    policy = {"action": "kill", "housekeeping": {kind: BUDGET}}
    client.create({"name": NAME, "memory": "128M", "image": "minimal", "exit_policy": policy})
    try:
        while not client.guest(NAME)["disengaged"]:
            time.sleep(0.5)
        last = max((event["id"] for event in client.events(limit=1)), default=0)
        pid, tids = find_threads()
        readings, begun = [(time.time(), count(kind, tids))], 0.0
        typing = threading.Thread(target=type_command, args=(client, f"exits {kind} {LONGEST:.0f}"))
        typing.start()
        limit = time.monotonic() + 2 * LONGEST
        while not begun and time.monotonic() < limit:
            time.sleep(0.02)
            at, now = time.time(), count(kind, tids)
            readings = [*(one for one in readings if one[0] >= at - WINDOW), (at, now)]
            begun = readings[0][0] if now - readings[0][1] >= BEGUN else 0.0
        before, last_exits = now, begun
        while Path(f"/proc/{pid}").exists() and time.monotonic() < limit:
            at, now = time.time(), count(kind, tids)
            before, last_exits = now, at if now > before else last_exits
            time.sleep(0.02)
        ended = time.time()
        typing.join()
        noticed = [
            datetime.fromisoformat(event["time"]).timestamp() - begun
            for event in client.events(last)
            if event["kind"] == "exit-policy" and f" of {kind} in " in event["detail"]
        ]
        killed = begun and not Path(f"/proc/{pid}").exists()
        times = {"noticed": noticed[0] if noticed else None, "stopped": last_exits - begun, "killed": ended - begun}
        return times if killed else dict.fromkeys(times)
    finally:
        with suppress(NotFound):
            client.delete(NAME)


def type_command(client: Client, line: str) -> None:
    """It fails when the guest ends."""
    with suppress(OrchestratorError):
        client.send_command(NAME, line, 2 * LONGEST)


if __name__ == "__main__":
    main()
