"""Runs in the lab host (see crash_lab.py): kills nohyped at random moments of operations on a real guest, and looks what is lost.

What is looked at is read from ledger, libvirt, /proc and /sys, never asked of the manager. Prints lines of JSON: first how long
the operations take by themselves, then one a run. A bystander runs all the time.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import libvirt

BYSTANDER, SECOND = "bystander", "second"
LEDGER = Path("/var/lib/nohype/ledger.sqlite")
NIC = Path("/sys/class/net/nic0/device")
PIDS = Path("/run/libvirt/qemu")
POOLS = "/sys/devices/system/node/node{}/hugepages/hugepages-2048kB/{}_hugepages"
NODES = (0, 1)
NO_MAC = "00:00:00:00:00:00"
"""Of a VF that nobody has given an address."""
SETTLED = ("running", "stopped", "quarantined")
FIELDS = ("--memory", "128M", "--image", "minimal")
OPERATIONS: dict[str, tuple[str, ...]] = {
    "create": ("create", SECOND, *FIELDS),
    "stop": ("stop", SECOND, "--timeout", "2"),
    "start": ("start", SECOND),
    "restart": ("restart", SECOND, "--timeout", "2"),
    "delete": ("delete", SECOND),
}
BEFORE = {"create": None, "stop": "running", "start": "stopped", "restart": "running", "delete": "running"}
AFTER = {"create": "running", "stop": "stopped", "start": "running", "restart": "running", "delete": None}
"""State of the second guest before and after each operation; None if there is none."""
SECOND_CRASH = 0.2
LATE = 135.0
"""Seconds within which two of the manager's looks, once a minute, put right what its recovery has not."""


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
    """All that is looked at, at one moment.

    Attributes:
        guests: the ledger's, by name.
        taken: how many CPUs, VFs and addresses the ledger's tables of claims hold.
        undo: owners of the records in the undo journal; one entry a record.
        domains: libvirt's, by name, with their states; also those that do not run.
        lives: process id and start of each guest's QEMU.
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
    lives: dict[str, tuple[int, int]]
    qemus: frozenset[int]
    threads: dict[str, frozenset[int]]
    vfio: frozenset[str]
    macs: dict[int, str]
    used: dict[int, int]


@dataclass
class Run:
    """What a run has shown.

    Attributes:
        moment: seconds from the begin of the command to the kill.
        left: what the killed manager left: state of the second guest in the ledger, undo records for it, whether it had a QEMU.
        twice: whether the next manager was killed too, before it was ready.
        said: status of the command, and what it printed on standard error.
        did: what the next managers noted about the second guest.
        recovery: seconds from the start of the manager's process until it was ready.
        late: seconds after that until nothing was wrong any more, 0 if nothing was; ``slips`` are what was.
        faults: what is still wrong then.
    """

    number: int
    operation: str
    moment: float = 0.0
    left: tuple[str, int, bool] = ("", 0, False)
    twice: bool = False
    said: tuple[int, str] = (0, "")
    did: list[str] = field(default_factory=list)
    recovery: float = 0.0
    late: float = 0.0
    slips: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> None:
    """Calibrates, then runs."""
    runs, seed, only = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    command("create", BYSTANDER, *FIELDS, "--wait", "180")
    base = read_host()
    life = base.lives[BYSTANDER]
    try:
        prove_checks(base, life)
        print(json.dumps({"typical": (typical := measure_operations()), "clean": restart_cleanly()}), flush=True)
        for number in range(runs) if only < 0 else [only]:
            run = Run(number, "")
            try:
                crash(run, Random(f"{seed}/{number}"), typical, base)
                if number in (runs - 1, only):
                    end_second(run, base)
            finally:
                print(json.dumps(asdict(run)), flush=True)
        command("tell", BYSTANDER, "counters")
    finally:
        for name in (SECOND, BYSTANDER):
            subprocess.run(["nohype", "guest", "delete", name], capture_output=True, check=False)


def command(*words: str, check: bool = True) -> tuple[int, str]:
    """A command of `nohype guest`; its status and standard error."""
    done = subprocess.run(["nohype", "guest", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"nohype guest {' '.join(words)}: {done.stderr}")
    return done.returncode, done.stderr


def measure_operations() -> dict[str, float]:
    """Seconds that each command takes when nobody kills anything, and under "list" what a command takes at the least."""
    words = {"list": ("list",), **{name: OPERATIONS[name] for name in ("create", "stop", "start", "restart", "delete")}}
    return {name: measure(*line) for name, line in words.items()}


def measure(*words: str) -> float:
    """Seconds that a command takes."""
    began = time.monotonic()
    command(*words)
    return time.monotonic() - began


def restart_cleanly() -> float:
    """Seconds that a manager takes to be ready when there is nothing to recover but the bystander."""
    subprocess.run(["systemctl", "restart", "nohyped"], check=True)
    return read_start()


def crash(run: Run, rng: Random, typical: dict[str, float], base: Host) -> None:
    """One run. All that is random is drawn first, so that the same seed draws the same whatever happens."""
    run.operation = rng.choice(sorted(OPERATIONS))
    part, run.twice, prompt, again = rng.uniform(0, 1.05), rng.random() < SECOND_CRASH, rng.random() < 0.5, rng.uniform(0, 10)
    bring_to(BEFORE[run.operation], run, typical, base)
    # Before the least that a command takes is half over, the manager has not been asked yet.
    least = typical["list"] / 2
    run.moment = round(least + part * (typical[run.operation] - least), 3)
    after, old = last_event(), manager()
    words = ["nohype", "guest", *OPERATIONS[run.operation]]
    asked = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(run.moment)
    os.kill(old, signal.SIGKILL)
    run.left = read_left()
    if run.twice:
        start_manager(old, prompt=True, wait=False)
        time.sleep(again)
        old = kill_manager(old)
    start_manager(old, prompt=prompt, wait=True)
    run.recovery = round(read_start(), 3)
    # A request that no manager had taken up is in the socket's queue, and is the next manager's.
    _, error = asked.communicate(timeout=300)
    run.said = (asked.returncode, " ".join(error.split())[:200])
    wanted = AFTER[run.operation] if asked.returncode == 0 else ""
    run.slips += check_until_well(run, lambda: check_guests(read_host(), base.lives[BYSTANDER], wanted))
    run.did = read_events(after)


def bring_to(wanted: str | None, run: Run, typical: dict[str, float], base: Host) -> None:
    """Sees to it that the second guest is in a state. What the run before has left is used: so guests get a longer history.

    How long a create takes is measured each time, and the other operations are taken to be slower or faster likewise: the machine
    under the lab may be busy now and idle then.
    """
    found = read_ledger()[0].get(SECOND)
    state = found.state if found else None
    if found and (wanted is None or state not in ("running", "stopped")):
        end_second(run, base)
        state = None
    if wanted and state is None:
        slower = measure(*OPERATIONS["create"]) / typical["create"]
        typical.update({name: seconds * slower for name, seconds in typical.items()})
        state = "running"
    if wanted == "running" and state == "stopped":
        command(*OPERATIONS["start"])
    if wanted == "stopped" and state == "running":
        command("kill", SECOND)


def end_second(run: Run, base: Host) -> None:
    """Deletes the second guest; then nothing of it must be left."""
    status, error = command("delete", SECOND, check=False)
    if status and "no guest named" not in error:
        run.faults.append(f"the second guest cannot be deleted: {error}")
    run.slips += check_until_well(run, lambda: check_clean(read_host(), base))


def check_until_well(run: Run, check: Callable[[], list[str]]) -> list[str]:
    """What was wrong at first; what is still wrong after a while goes to the run's faults."""
    began = time.monotonic()
    first = now = check()
    while now and time.monotonic() < began + LATE:
        time.sleep(1)
        now = check()
    if first:
        run.late = round(max(run.late, time.monotonic() - began), 1)
    run.faults += now
    return first


def check_guests(host: Host, life: tuple[int, int], wanted: str | None) -> list[str]:
    """What is wrong, a sentence each. Pure.

    Args:
        life: the bystander's.
        wanted: state of the second guest, as somebody was told: None for none; empty if nobody was told anything.
    """
    found = []
    if host.lives.get(BYSTANDER) != life:
        found.append(f"stopped: the bystander was process {life}, now it is {host.lives.get(BYSTANDER)}")
    state = host.guests[SECOND].state if SECOND in host.guests else None
    if wanted != "" and state != wanted:
        found.append(f"broken word: the second guest is {state}, but somebody was told that it is {wanted}")
    found += [f"unsettled: {name} is {one.state}" for name, one in host.guests.items() if one.state not in SETTLED]
    found += [f"quarantined: {name}" for name, one in host.guests.items() if one.state == "quarantined"]
    running = {name: one for name, one in host.guests.items() if one.state == "running"}
    domains = {name for name, state in host.domains.items() if state == libvirt.VIR_DOMAIN_RUNNING}
    if domains != running.keys() or domains != host.domains.keys():
        found.append(f"guests: running by the ledger {sorted(running)}, libvirt has {host.domains} (1 is running, 3 paused)")
    if host.qemus != {pid for pid, _ in host.lives.values()} or host.lives.keys() != running.keys():
        found.append(f"guests: processes {sorted(host.qemus)}, but libvirt's are {host.lives}")
    return found + check_claims(host) + check_host(host, running)


def check_claims(host: Host) -> list[str]:
    """Nothing is claimed twice, or by nobody. Pure."""
    guests = host.guests.values()
    cpus = [cpu for one in guests for cpu in one.cpus]
    found = []
    for what, items in (("cores", cpus), ("VFs", [one.vf for one in guests]), ("MACs", [one.mac for one in guests])):
        if len(set(items)) != len(items):
            found.append(f"doubled {what}: {sorted(items)}")
    if host.taken != (len(cpus), len(host.guests), len(host.guests)):
        found.append(
            f"leaked claims: {host.taken} CPUs, VFs and addresses are taken by {len(host.guests)} guests with {len(cpus)} CPUs"
        )
    return found


def check_host(host: Host, running: dict[str, Claimed]) -> list[str]:
    """Host and ledger agree to the last page. Pure."""
    found = []
    if host.vfio != {one.vf for one in running.values()}:
        found.append(
            f"leaked VFs: vfio-pci has {sorted(host.vfio)}, running guests have {sorted(one.vf for one in running.values())}"
        )
    given = {index: mac for index, mac in host.macs.items() if mac in {one.mac for one in host.guests.values()}}
    if given != {one.index: one.mac for one in running.values()}:
        found.append(f"leaked MACs: the PF has {host.macs}, running guests {[(one.index, one.mac) for one in running.values()]}")
    macs = [mac for mac in host.macs.values() if mac != NO_MAC]
    if len(set(macs)) != len(macs):
        found.append(f"doubled MACs: {host.macs}")
    pages = {node: sum(one.pages for one in running.values() if one.node == node) for node in host.used}
    if host.used != pages:
        found.append(f"leaked pages: in use on each node {host.used}, running guests have {pages}")
    for name, one in running.items():
        if host.threads.get(name) != one.cpus:
            found.append(f"cores: the vCPUs of {name} may run on {sorted(host.threads.get(name, ()))}, it has {sorted(one.cpus)}")
    owners = sorted(owner for owner in host.undo if owner != "host")
    if owners != sorted([*running, *running, *running]):
        found.append(f"undo journal: records of {owners}, wanted are three of each running guest {sorted(running)}")
    return found


def check_clean(host: Host, base: Host) -> list[str]:
    """Without the second guest all is as before it. Pure."""
    return [
        f"after the end {name}: {getattr(host, name)}, before the begin: {getattr(base, name)}"
        for name in ("guests", "taken", "undo", "domains", "lives", "qemus", "threads", "vfio", "macs", "used")
        if getattr(host, name) != getattr(base, name)
    ]


def prove_checks(host: Host, life: tuple[int, int]) -> None:
    """Each kind of loss, put into what was read, is found; what was really read is sound."""
    sound, one = check_guests(host, life, None), host.guests[BYSTANDER]
    stopped = replace(one, state="stopped", vf="x", mac="x", index=9, cpus=frozenset({9}))
    wrong: dict[str, Host] = {
        "stopped:": replace(host, lives={BYSTANDER: (life[0], life[1] + 1)}),
        "broken word:": replace(host, guests={**host.guests, SECOND: stopped}),
        "unsettled:": replace(host, guests={**host.guests, SECOND: replace(stopped, state="creating")}),
        "quarantined:": replace(host, guests={**host.guests, SECOND: replace(stopped, state="quarantined")}),
        "guests: running": replace(host, domains={BYSTANDER: libvirt.VIR_DOMAIN_PAUSED}),
        "guests: processes": replace(host, qemus=host.qemus | {1}),
        "doubled cores": replace(host, guests={**host.guests, SECOND: replace(stopped, cpus=one.cpus)}),
        "doubled VFs": replace(host, guests={**host.guests, SECOND: replace(stopped, vf=one.vf)}),
        "doubled MACs": replace(host, guests={**host.guests, SECOND: replace(stopped, mac=one.mac)}),
        "leaked claims": replace(host, taken=(0, 1, 1)),
        "leaked VFs": replace(host, vfio=host.vfio | {"x"}),
        "leaked MACs": replace(host, macs={**host.macs, one.index: "x"}),
        "doubled MACs:": replace(host, macs=dict.fromkeys(host.macs, one.mac)),
        "leaked pages": replace(host, used={node: pages + 1 for node, pages in host.used.items()}),
        "cores:": replace(host, threads={BYSTANDER: frozenset({0})}),
        "undo journal": replace(host, undo=(*host.undo, SECOND)),
    }
    blind = [
        kind for kind, reading in wrong.items() if not any(text.startswith(kind) for text in check_guests(reading, life, None))
    ]
    if sound or blind or not check_clean(wrong["leaked VFs"], host):
        raise SystemExit(f"the checks are no good: on a sound host they find {sound}, and they do not find {blind}")


def read_host() -> Host:
    """Everything, as it is now."""
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
    """Guests, claims and undo records, past the product's own reader."""
    with open_ledger() as db:
        db.execute("BEGIN")
        guests = {}
        for name, state, text in db.execute("SELECT name, state, plan FROM guest"):
            plan = json.loads(text)
            cpus = frozenset(cpu for core in plan["cores"] for cpu in parse_cpus(core))
            vf = plan["vf"]
            guests[name] = Claimed(state, cpus, plan["node"], plan["pages"], vf["address"], vf["index"], vf["mac"])
        cpus_vfs_macs = [db.execute(f"SELECT count(*) FROM claim_{what}").fetchone()[0] for what in ("cpu", "vf", "mac")]
        undo = tuple(owner for (owner,) in db.execute("SELECT owner FROM undo ORDER BY owner"))
    db.close()
    return guests, tuple(cpus_vfs_macs), undo


def read_left() -> tuple[str, int, bool]:
    """See ``Run.left``."""
    guests, _, undo = read_ledger()
    return (guests[SECOND].state if SECOND in guests else "none", undo.count(SECOND), (PIDS / f"{SECOND}.pid").exists())


def read_events(after: int) -> list[str]:
    """Kinds of the second guest's events after one."""
    with open_ledger() as db:
        rows = db.execute("SELECT kind FROM event WHERE id > ? AND subject = ? ORDER BY id", (after, SECOND)).fetchall()
    db.close()
    return [kind for (kind,) in rows]


def last_event() -> int:
    """The id of the newest event."""
    with open_ledger() as db:
        (found,) = db.execute("SELECT max(id) FROM event").fetchone()
    db.close()
    return int(found)


def open_ledger() -> sqlite3.Connection:
    """Only to be read."""
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


def read_life(file: Path) -> tuple[int, int] | None:
    """Process id and start of a guest's QEMU; None if it is gone."""
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
    """A kernel list of CPUs."""
    ends = [part.split("-") for part in text.split(",")]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}


def read(path: Path | str) -> str:
    return Path(path).read_text().strip()


def show(*properties: str) -> list[str]:
    """Properties of the manager's unit."""
    words = ["systemctl", "show", "nohyped", *(f"--property={name}" for name in properties)]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    values = dict(line.split("=", 1) for line in lines)
    return [values[name] for name in properties]


def manager() -> int:
    """The manager's process id."""
    return int(show("MainPID")[0])


def kill_manager(old: int) -> int:
    """Kills the manager that has come after another; returns its process id."""
    while (pid := manager()) in (0, old):
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return pid


def start_manager(old: int, *, prompt: bool, wait: bool) -> None:
    """Has a new manager started.

    Args:
        prompt: at once, in place of when systemd does it by itself.
        wait: until it is ready.
    """
    if prompt:
        # Until systemd has seen the end of the old one, there is nothing to start.
        while manager() == old:
            time.sleep(0.02)
        subprocess.run(["systemctl", "start", "nohyped", *([] if wait else ["--no-block"])], check=True)
    deadline = time.monotonic() + 300
    while wait:
        pid, state = show("MainPID", "ActiveState")
        if state == "active" and int(pid) != old:
            return
        if time.monotonic() > deadline:
            raise SystemExit("there is no new manager after 300 s: journalctl -u nohyped")
        time.sleep(0.2)


def read_start() -> float:
    """Seconds from the start of the manager's process until it was ready, by systemd's clock."""
    began, ready = show("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    return (int(ready) - int(began)) / 1e6


if __name__ == "__main__":
    main()
