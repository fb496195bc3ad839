"""Runs in the lab host (see crash_lab.py): kills nohyped at random moments of operations on a real guest, and checks for losses.

Prints lines of JSON: first the duration of undisturbed operations, then one line per run. A bystander runs all the time.
crash_lab_reading.py reads the state of the host and crash_lab_checks.py checks it; both are next to this file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random

import libvirt
from crash_lab_checks import check_clean, check_guests, check_kept, prove_checks
from crash_lab_reading import BYSTANDER, SECOND, Host, Left, Life, last_event, read_events, read_host, read_ledger, read_left

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
"""Seconds in which two of the manager's reconciliations, one per minute, repair what its recovery did not."""
AT_ONCE = ("stopped", "doubled")
"""Kinds of findings that are a fault even for a moment: such a loss cannot be repaired."""


@dataclass
class Run:
    """The result of a run.

    Attributes:
        moment: seconds from the start of the command to the kill.
        left: what each killed manager left of the second guest.
        twice: whether the next manager was killed too, before it was ready.
        said: status and standard error of the command.
        did: events of the next managers about the second guest.
        recovery: seconds from the start of the manager's process until it was ready.
        late: seconds after that until there was no finding any more.
        slips: findings when the manager was ready.
        faults: findings that persist, or that must not occur even for a moment.
    """

    number: int
    operation: str
    moment: float = 0.0
    left: list[Left] = field(default_factory=list)
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
    """Seconds per undisturbed command; "list" is the minimum of any command."""
    words = {"list": ("list",), **{name: OPERATIONS[name] for name in ("create", "stop", "start", "restart", "delete")}}
    return {name: measure(*line) for name, line in words.items()}


def measure(*words: str) -> float:
    began = time.monotonic()
    command(*words)
    return time.monotonic() - began


def restart_cleanly() -> float:
    """Seconds until a manager is ready that has only the bystander to recover."""
    subprocess.run(["systemctl", "restart", "nohyped"], check=True)
    return read_start()


def crash(run: Run, rng: Random, typical: dict[str, float], base: Host) -> None:
    """One run. All random values are drawn first, so that a seed always draws the same."""
    run.operation = rng.choice(sorted(OPERATIONS))
    part, run.twice, prompt, again = rng.uniform(0, 1.05), rng.random() < SECOND_CRASH, rng.random() < 0.5, rng.uniform(0, 10)
    bring_to(BEFORE[run.operation], run, typical, base)
    # In the first half of a command's minimum duration, no request has reached the manager.
    least = typical["list"] / 2
    run.moment = round(least + part * (typical[run.operation] - least), 3)
    after, old = last_event(), manager()
    words = ["nohype", "guest", *OPERATIONS[run.operation]]
    asked = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(run.moment)
    os.kill(old, signal.SIGKILL)
    run.left.append(read_left())
    if run.twice:
        start_manager(old, prompt=True, wait=False)
        time.sleep(again)
        old = kill_manager(old)
        run.left.append(read_left())
    start_manager(old, prompt=prompt, wait=True)
    run.recovery = round(read_start(), 3)
    # A request that no manager has accepted waits in the socket's queue for the next manager.
    _, error = asked.communicate(timeout=300)
    run.said = (asked.returncode, " ".join(error.split())[:200])
    wanted = AFTER[run.operation] if asked.returncode == 0 else ""
    run.slips += check_until_well(run, lambda: check_crashed(run, base.lives[BYSTANDER], wanted, after))
    run.did = [event.kind for event in read_events(after)]


def check_crashed(run: Run, bystander: Life, wanted: str | None, after: int) -> list[str]:
    """The present findings. Events are read last, so that the end of a guest that was missing before is in them."""
    host = read_host()
    return check_guests(host, bystander, wanted) + check_kept(host, run.left, read_events(after))


def bring_to(wanted: str | None, run: Run, typical: dict[str, float], base: Host) -> None:
    """Brings the second guest into a state. What the run before has left is used, so that guests get a longer history.

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
    """Deletes the second guest; nothing of it must be left."""
    status, error = command("delete", SECOND, check=False)
    if status and "no guest named" not in error:
        run.faults.append(f"the second guest cannot be deleted: {error}")
    run.slips += check_until_well(run, lambda: check_clean(read_host(), base))


def check_until_well(run: Run, check: Callable[[], list[str]]) -> list[str]:
    """The first findings. Those that persist, and those that must never occur, are added to the run's faults."""
    began = time.monotonic()
    first = now = check()
    while now and not find_grave(now) and time.monotonic() < began + LATE:
        time.sleep(1)
        now = check()
    if first:
        run.late = round(max(run.late, time.monotonic() - began), 1)
    run.faults += find_grave(now) or now
    return first


def find_grave(wrong: list[str]) -> list[str]:
    """Those that begin with AT_ONCE."""
    return [text for text in wrong if text.startswith(AT_ONCE)]


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
    """Starts a new manager.

    Args:
        prompt: immediately, instead of waiting for systemd's restart.
        wait: until the manager is ready.
    """
    if prompt:
        # systemd starts nothing until it has noticed the end of the old manager.
        while manager() == old:
            time.sleep(0.02)
        subprocess.run(["systemctl", "start", "nohyped", *([] if wait else ["--no-block"])], check=True)
    deadline = time.monotonic() + 300
    while wait:
        pid, state = show("MainPID", "ActiveState")
        if state == "active" and int(pid) != old:
            return
        if time.monotonic() > deadline:
            raise SystemExit("no new manager after 300 s: see journalctl -u nohyped")
        time.sleep(0.2)


def read_start() -> float:
    """Seconds from the start of the manager's process until it was ready, by systemd's clock."""
    began, ready = show("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    return (int(ready) - int(began)) / 1e6


if __name__ == "__main__":
    main()
