"""The part of counting_cost.py that runs on the lab host. Prints JSON."""

import json
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.host import netlink
from orchestrator.host.exit_trace import EXITS
from orchestrator.host.histogram import begin_counter, end_counter
from orchestrator.host.root import HostRoot
from orchestrator.host.thread_counts import CALLS, MMIO

NAME, SOCKET = "counted", Path("/run/nohype/nohyped.sock")
WINDOW = 0.8
HISTOGRAMS = (EXITS, CALLS, MMIO)


def main() -> None:
    rounds, host, client = int(sys.argv[1]), HostRoot(net=netlink), Client(SOCKET)
    client.create({"name": NAME, "memory": "128M", "image": "minimal"})
    try:
        while not client.guest(NAME)["disengaged"]:
            time.sleep(0.5)
        # Longer than the measurement: the guest is deleted afterwards.
        threading.Thread(target=send, args=(f"exits work {100 * rounds}",), daemon=True).start()
        counter = find_counter("hypercalls")
        wait_for_change(counter)
        systemctl("stop", "nohyped.service", "nohyped.socket")
        try:
            found = [measure_round(host, counter) for _ in range(rounds)]
            exits = measure(find_counter("exits"))
        finally:
            switch(host, counted=True)
            systemctl("start", "nohyped.socket", "nohyped.service")
    finally:
        Client(SOCKET).delete(NAME)  # the manager has been restarted
    print(json.dumps({"rounds": found, "exits": exits}))


def send(command: str) -> None:
    with suppress(OrchestratorError):  # the manager is stopped before the guest answers
        Client(SOCKET).send_command(NAME, command, 3600)


def systemctl(*words: str) -> None:
    subprocess.run(["systemctl", *words], check=True)


def find_counter(name: str) -> Path:
    """KVM's own counter of the guest, of all vCPUs; its folder is PID-DESCRIPTOR (virt/kvm/kvm_main.c)."""
    pid = Path(f"/run/libvirt/qemu/{NAME}.pid").read_text().strip()
    (found,) = Path("/sys/kernel/debug/kvm").glob(f"{pid}-*/{name}")
    return found


def wait_for_change(counter: Path) -> tuple[float, int]:
    """The time at which the counter changes, and its value."""
    before = int(counter.read_text())
    while True:
        now, at = int(counter.read_text()), time.monotonic()
        if now != before:
            return at, now
        time.sleep(0.001)


def measure(counter: Path) -> float:
    """Changes per second, from one change to another."""
    begin, first = wait_for_change(counter)
    time.sleep(WINDOW)
    end, last = wait_for_change(counter)
    return (last - first) / (end - begin)


def switch(host: HostRoot, *, counted: bool) -> None:
    for histogram in HISTOGRAMS:
        (begin_counter if counted else end_counter)(host, histogram)


def measure_round(host: HostRoot, counter: Path) -> tuple[float, float]:
    """Pieces per second without and with counting."""
    found = {}
    for counted in random.sample((False, True), 2):
        switch(host, counted=counted)
        found[counted] = measure(counter)
    return found[False], found[True]


if __name__ == "__main__":
    main()
