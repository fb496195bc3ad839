"""Runs in the lab host (see edges_lab.py), while its manager is stopped. Prints a line of JSON.

mode UPLINK veb|vepa                        sets the loopback bit of the NIC
echo GUEST MAC                              makes the guest answer frames
warm FIRST SECOND MAC MAC                   sends frames until some are answered: the switch learns the addresses
measure FIRST SECOND MAC MAC TRIPS BATCHES  by name of a figure: frames sent and lost, seconds, exits of both guests by reason
"""

import json
import os
import re
import select
import subprocess
import sys
import termios
import time
import tty
from collections import Counter
from pathlib import Path
from typing import NoReturn

from orchestrator.host.edge import registers
from orchestrator.host.exit_trace import read_counts
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_pfs
from orchestrator.model.edge import EdgeMode

PATIENCE = 120.0  # seconds for an answer


def fail(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(1)


def virsh(*words: str) -> str:
    return subprocess.run(["virsh", "--quiet", *words], check=True, capture_output=True, text=True).stdout.strip()


def tell(guest: str, line: str) -> str:
    """Types on the guest's console; returns its answer."""
    descriptor = os.open(virsh("ttyconsole", guest), os.O_RDWR | os.O_NOCTTY)
    try:
        tty.setraw(descriptor)
        termios.tcflush(descriptor, termios.TCIOFLUSH)
        os.write(descriptor, f"{line}\n".encode())
        printed, deadline = b"", time.monotonic() + PATIENCE
        while not (match := re.search(rb"^nohype: (done|error) ([^\r\n]*)\r?\n", printed, re.MULTILINE)):
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                fail(f"{guest}: no answer to {line!r}: {printed!r}")
            printed += os.read(descriptor, 4096)
        if match[1] == b"error":
            fail(f"{guest}: {line!r}: {match[2]!r}")
        return match[2].decode()
    finally:
        os.close(descriptor)


def count_exits(guests: list[str]) -> Counter[str]:
    """By hardware reason, of all guests. The manager has made the histogram, which counts while the manager is stopped."""
    threads = [tid for guest in guests for tid in os.listdir(f"/proc/{read_pid(guest)}/task")]
    found = read_counts(HostRoot()).threads
    return sum((Counter(found.get(int(tid), {})) for tid in threads), Counter[str]())


def read_pid(guest: str) -> str:
    return Path(f"/run/libvirt/qemu/{guest}.pid").read_text().strip()


def set_mode(uplink: str, mode: str) -> None:
    host = HostRoot()
    (pf,) = [pf for pf in read_pfs(host) if pf.interface == uplink]
    registers.set_mode(host, pf, EdgeMode(mode))


def send(first: str, line: str) -> dict[str, float]:
    return {key: float(value) if "." in value else int(value) for key, value in re.findall(r"(\w+)=([\d.]+)", tell(first, line))}


def warm(first: str, mac: str, target: str) -> None:
    """The carriers of NICs come late."""
    deadline = time.monotonic() + PATIENCE
    while send(first, f"frames trips {mac} {target} 5")["lost"]:
        if time.monotonic() > deadline:
            fail(f"frames of {first} do not arrive")


def measure(guests: list[str], macs: list[str], trips: str, batches: str) -> dict[str, dict[str, object]]:
    pair = " ".join(macs)
    rates = {name: f"rate {pair} {size} {batches}" for name, size in (("60 bytes", 60), ("1,514 bytes", 1514))}
    found: dict[str, dict[str, object]] = {}
    for figure, line in {"round trip": f"trips {pair} {trips}", **rates}.items():
        before = count_exits(guests)
        answer = send(guests[0], f"frames {line}")
        found[figure] = {**answer, "exits": count_exits(guests) - before}
    return found


def main(command: str, *words: str) -> object:
    match command:
        case "mode":
            set_mode(*words)
        case "echo":
            tell(words[0], f"frames echo {words[1]}")
        case "warm":
            warm(words[0], *words[2:])
        case _:
            return measure([*words[:2]], [*words[2:4]], *words[4:])
    return None


print(json.dumps(main(*sys.argv[1:])))
