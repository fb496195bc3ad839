"""Measures the idle manager in a lab: memory, CPU time, wake-ups, and the CPUs of its threads.

    .venv/bin/python benchmarks/manager_idle.py [SECONDS]

Requires root. Uses the lab `bench`, or the one named by NOHYPE_TEST_LAB; starts two guests unless guests run there already. Exits
with 1 if the manager exceeds the limits for memory and CPU time, or ran on a guest's core.
"""

import json
import sys
from pathlib import Path
from typing import Any

from bench_lab import use_lab

from orchestrator.lab import lab as labs
from orchestrator.lab.demo import GUESTS, ask, create_guest

INSIDE = Path(__file__).with_name("manager_idle_inside.py")
RESIDENT, SHARE = 80.0, 0.2
"""Limits: MB, and percent of one core."""
SETTLE = 30
"""Seconds before the measurement, until the work of the last request is done."""


def main() -> int:
    """Prints one row per thread and a row with totals and limits. Returns the exit status."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    made: list[str] = []
    with use_lab() as lab:
        try:
            _forget_switch(lab)
            if not ask(lab, "guest", "list"):
                for guest in GUESTS:
                    create_guest(lab, guest)
                    made.append(guest.name)
            guests = ask(lab, "guest", "list")
            words = ["python3", "-", str(seconds), str(SETTLE)]
            done = labs.execute(lab, words, input=INSIDE.read_bytes(), timeout=seconds + SETTLE + 60)
            if done.status:
                sys.exit(done.stderr)
            return 0 if report(json.loads(done.stdout), guests) else 1
        finally:
            for name in made:
                ask(lab, "guest", "delete", name)


def _forget_switch(lab: labs.Lab) -> None:
    """Reading a switch over SSH every 5 s is work of its own, and loads a library that most hosts do not need."""
    if known := ask(lab, "switch", "list"):
        for view in known:
            ask(lab, "switch", "delete", view["switch"]["name"], "--force")
        labs.execute(lab, "systemctl restart nohyped", timeout=60)


def report(found: dict[str, Any], guests: list[dict[str, Any]]) -> bool:
    """Prints the result; returns whether it is within the limits."""
    minutes = found["seconds"] / 60
    print(f"{'THREAD':24} {'WAKE-UPS/MIN':>12} {'PREEMPTED/MIN':>13} {'CPU %':>8}  CPUS SEEN")
    for thread in sorted(found["threads"], key=lambda one: -one["voluntary"]):
        share = 100 * thread["cpu"] / found["seconds"]
        numbers = f"{thread['voluntary'] / minutes:12.1f} {thread['involuntary'] / minutes:13.1f} {share:8.4f}"
        print(f"{thread['name'] + ' ' + str(thread['tid']):24} {numbers}  {','.join(map(str, thread['cpus']))}")
    guest_cpus = {cpu for guest in guests for cpu in guest["cpus"]}
    strayed = sorted({cpu for thread in found["threads"] for cpu in thread["cpus"]} & guest_cpus)
    wakeups = sum(thread["voluntary"] for thread in found["threads"]) / minutes
    resident, share = found["resident"] / 1e6, 100 * sum(thread["cpu"] for thread in found["threads"]) / found["seconds"]
    print(f"\nover {found['seconds']:.1f} s, {len(guests)} guests, {len(found['threads'])} threads")
    print(f"resident         {resident:8.1f} MB   wanted: at most {RESIDENT:g}")
    print(f"  of it its own  {found['anonymous'] / 1e6:8.1f} MB")
    print(f"CPU              {share:8.4f} %    of one core; wanted: at most {SHARE:g}")
    print(f"wake-ups         {wakeups:8.1f} a minute")
    print(f"on guest cores   {len(strayed):8} CPUs {strayed or ''}   wanted: none (guests have {sorted(guest_cpus)})")
    good = resident <= RESIDENT and share <= SHARE and not strayed
    print("all is as wanted" if good else "FAULT: not as wanted")
    return good


if __name__ == "__main__":
    sys.exit(main())
