"""Runs in the lab host (see crash_lab.py): reads ledger, libvirt, /proc and /sys, without the manager."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import libvirt

BYSTANDER, SECOND = "bystander", "second"
LEDGER = Path("/var/lib/nohype/ledger.sqlite")
PIDS = Path("/run/libvirt/qemu")
POOLS = "/sys/devices/system/node/node{}/hugepages/hugepages-2048kB/{}_hugepages"
NODES = (0, 1)
Life = tuple[int, int]
"""Process id of a QEMU, and its start (starttime in proc_pid_stat(5))."""


@dataclass(frozen=True)
class Claimed:
    """A guest of the ledger."""

    state: str
    cpus: frozenset[int]
    node: int
    pages: int
    vf: str
    index: int
    mac: str


@dataclass(frozen=True)
class Host:
    """The state of the host at one moment.

    Attributes:
        guests: the ledger's, by name.
        taken: numbers of claimed CPUs, VFs and addresses in the ledger.
        undo: owners of the records in the undo journal, one entry per record.
        domains: libvirt's, by name, with their states; also inactive ones.
        lives: of each guest's QEMU.
        qemus: process ids of all QEMUs of the host.
        threads: CPUs on which the vCPUs of each guest may run.
        vfio: VFs that are bound to vfio-pci.
        macs: address of each VF, as the PF enforces it.
        used: huge pages of each node that are not free.
    """

    guests: dict[str, Claimed]
    taken: tuple[int, int, int]
    undo: tuple[str, ...]
    domains: dict[str, int]
    lives: dict[str, Life]
    qemus: frozenset[int]
    threads: dict[str, frozenset[int]]
    vfio: frozenset[str]
    macs: dict[int, str]
    used: dict[int, int]


@dataclass(frozen=True)
class Left:
    """What a killed manager left of the second guest.

    Attributes:
        state: in the ledger; "none" if the guest is not in it.
        records: number of its records in the undo journal.
        life: of its QEMU; None if it has none.
        event: id of the newest event of any guest.
    """

    state: str
    records: int
    life: Life | None
    event: int


class Event(NamedTuple):
    """An event of the second guest."""

    id: int
    kind: str
    who: str
    detail: str


def read_host() -> Host:
    guests, taken, undo = read_ledger()
    connection = libvirt.openReadOnly("qemu:///system")
    domains = {domain.name(): domain.state()[0] for domain in connection.listAllDomains()}
    connection.close()
    lives = {file.stem: life for file in PIDS.glob("*.pid") if file.stem != "driver" and (life := read_life(file))}
    return Host(
        guests=guests,
        taken=taken,
        undo=undo,
        domains=domains,
        lives=lives,
        qemus=frozenset(find_qemus()),
        threads={name: read_threads(pid) for name, (pid, _) in lives.items()},
        vfio=frozenset(path.name for path in Path("/sys/bus/pci/drivers/vfio-pci").glob("0000:*")),
        macs=read_macs(),
        used={node: int(read(POOLS.format(node, "nr"))) - int(read(POOLS.format(node, "free"))) for node in NODES},
    )


def read_ledger() -> tuple[dict[str, Claimed], tuple[int, int, int], tuple[str, ...]]:
    """Guests, claims and undo records, without the product's own reader."""
    with open_ledger() as db:
        db.execute("BEGIN")
        guests = {}
        for name, state, text in db.execute("SELECT name, state, plan FROM guest"):
            plan = json.loads(text)
            cpus = frozenset(cpu for core in plan["cores"] for cpu in parse_cpus(core))
            vf = plan["nics"][0]
            guests[name] = Claimed(state, cpus, plan["node"], plan["pages"], vf["address"], vf["index"], vf["mac"])
        cpus_vfs_macs = [db.execute(f"SELECT count(*) FROM claim_{what}").fetchone()[0] for what in ("cpu", "vf", "mac")]
        undo = tuple(owner for (owner,) in db.execute("SELECT owner FROM undo ORDER BY owner"))
    db.close()
    return guests, tuple(cpus_vfs_macs), undo


def read_left() -> Left:
    # First: an end that is logged from now on is not older than the kill.
    event = last_event()
    guests, _, undo = read_ledger()
    state = guests[SECOND].state if SECOND in guests else "none"
    return Left(state, undo.count(SECOND), read_life(PIDS / f"{SECOND}.pid"), event)


def read_events(after: int) -> list[Event]:
    """The second guest's events after one."""
    columns = "id, kind, who, detail"
    with open_ledger() as db:
        rows = db.execute(f"SELECT {columns} FROM event WHERE id > ? AND subject = ? ORDER BY id", (after, SECOND)).fetchall()
    db.close()
    return [Event(*row) for row in rows]


def last_event() -> int:
    """The id of the newest event."""
    with open_ledger() as db:
        (found,) = db.execute("SELECT max(id) FROM event").fetchone()
    db.close()
    return int(found)


def open_ledger() -> sqlite3.Connection:
    return sqlite3.connect(f"file:{LEDGER}?mode=ro", uri=True, isolation_level=None)


def find_qemus() -> list[int]:
    """Process ids of all QEMUs that are alive."""
    found = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            if file.read_text().startswith("qemu-system") and " Z " not in read(file.with_name("stat")):
                found.append(int(file.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def read_life(file: Path) -> Life | None:
    """From the pid file of a guest's QEMU; None if the process does not exist."""
    try:
        pid = int(file.read_text())
        return pid, int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


def read_threads(pid: int) -> frozenset[int]:
    """CPUs on which the vCPUs of a QEMU may run."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            if task.joinpath("comm").read_text().rstrip().endswith("/KVM"):
                (line,) = [
                    line for line in task.joinpath("status").read_text().splitlines() if line.startswith("Cpus_allowed_list")
                ]
                found |= parse_cpus(line.split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return frozenset(found)


def read_macs() -> dict[int, str]:
    """Addresses that the PF enforces for its VFs."""
    done = subprocess.run(["ip", "-json", "link", "show", "nic0"], capture_output=True, text=True, check=True)
    return {vf["vf"]: vf["address"] for vf in json.loads(done.stdout)[0]["vfinfo_list"]}


def parse_cpus(text: str) -> set[int]:
    ends = [part.split("-") for part in text.split(",")]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}


def read(path: Path | str) -> str:
    return Path(path).read_text().strip()
