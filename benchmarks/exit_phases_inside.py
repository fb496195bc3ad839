"""The part of exit_phases.py that runs on the lab host: starts a guest, reads its exits, floods. Prints JSON."""

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.client import Client
from orchestrator.errors import GuestError

NAME, KINDS, KILLED = "phases", ("cpuid", "io", "hypercall", "msr", "mmio"), "npf"
MMIO = Path("/sys/kernel/tracing/instances/nohype/events/kvm/kvm_mmio/hist")
BUDGETS = {kind: {"second": 2000} for kind in KINDS}


def main() -> None:
    idle, client = float(sys.argv[1]), Client(Path("/run/nohype/nohyped.sock"))
    policy = {"action": "report", "housekeeping": BUDGETS}
    started_at = time.monotonic()
    client.create({"name": NAME, "memory": "128M", "image": "minimal", "exit_policy": policy})
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
            "floods": {kind: flood(client, kind) for kind in KINDS},
        }  # fmt: skip
    finally:
        client.delete(NAME)
    result["floods"][KILLED], result["killed"] = flood_and_die(client)
    print(json.dumps(result))


def add_up(report: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for vcpu in report["vcpus"]:
        for name, count in (vcpu["reasons"] or {}).items():
            found[name] = found.get(name, 0) + count
    return found


def count_mmio() -> int:
    """Of the guest's threads only."""
    pid = Path(f"/run/libvirt/qemu/{NAME}.pid").read_text().strip()
    tids = {path.name for path in Path(f"/proc/{pid}/task").iterdir()}
    lines = [line.replace("}", " ").split() for line in MMIO.read_text().splitlines() if line.startswith("{ common_pid:")]
    return sum(int(words[-1]) for words in lines if words[2] in tids)


def flood(client: Client, kind: str, seconds: int = 5) -> float | None:
    """Seconds from the command to the event; None without one."""
    last = max((event["id"] for event in client.events(limit=1)), default=0)
    begin = time.time()
    try:
        client.send_command(NAME, f"exits {kind} {seconds}", 60)
    except GuestError as error:
        print(error, file=sys.stderr)
    for event in client.events(last):
        if event["kind"] == "exit-policy" and f" of {kind} in " in event["detail"]:
            return datetime.fromisoformat(event["time"]).timestamp() - begin
    return None


def flood_and_die(client: Client) -> tuple[float | None, float | None]:
    """Seconds from the command to the event, and until the command failed since its guest had ended; None without."""
    policy = {"action": "kill", "housekeeping": {KILLED: BUDGETS[KINDS[0]]}}
    client.create({"name": NAME, "memory": "128M", "image": "minimal", "exit_policy": policy})
    try:
        while not client.guest(NAME)["disengaged"]:
            time.sleep(0.5)
        begin = time.monotonic()
        noticed = flood(client, KILLED, 30)  # the command fails when the guest ends
        ended = time.monotonic() - begin
        while client.guest(NAME)["state"] in ("running", "stopping") and time.monotonic() - begin < 30:
            time.sleep(0.1)
        return noticed, ended if client.guest(NAME)["state"] == "stopped" else None
    finally:
        client.delete(NAME)


if __name__ == "__main__":
    main()
