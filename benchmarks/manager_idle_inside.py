"""Runs in the lab host (see manager_idle.py): watches the threads of nohyped for some seconds and prints the result as JSON.

Standard library only, in its own process: nothing here runs in the manager. A voluntary context switch is a thread going to
sleep, so there is one per wake-up (proc_pid_status(5)). CPU time is schedstat's: clock ticks are too coarse.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

LOOK = 0.25


def read_thread(task: Path) -> dict[str, object]:
    """Counters of a thread, and the CPU it ran on last (proc_pid_stat(5), field 39)."""
    status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
    return {
        "tid": int(task.name),
        "name": status["Name"],
        "voluntary": int(status["voluntary_ctxt_switches"]),
        "involuntary": int(status["nonvoluntary_ctxt_switches"]),
        "cpu": int((task / "schedstat").read_text().split()[0]) / 1e9,
        "last": int((task / "stat").read_text().rpartition(")")[2].split()[36]),
    }


def read_threads(pid: int) -> dict[int, dict[str, object]]:
    """All threads of the process except those that exit during the read."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[int(task.name)] = read_thread(task)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def read_memory(pid: int, field: str) -> int:
    """A size of /proc/PID/status in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/{pid}/status has no {field}")


def main() -> None:
    seconds, settle = float(sys.argv[1]), float(sys.argv[2])
    show = ["systemctl", "show", "--value", "--property=MainPID", "nohyped.service"]
    pid = int(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    if not pid:
        raise SystemExit("nohyped does not run: systemctl status nohyped")
    time.sleep(settle)
    before, begin = read_threads(pid), time.monotonic()
    cpus: dict[int, set[object]] = {tid: set() for tid in before}
    now = before
    while time.monotonic() < begin + seconds:
        time.sleep(LOOK)
        now = read_threads(pid)
        for tid, thread in now.items():
            # Only CPUs where the thread ran during the measurement, not where it slept before.
            if thread["voluntary"] != before.get(tid, {}).get("voluntary"):
                cpus.setdefault(tid, set()).add(thread["last"])
    passed = time.monotonic() - begin
    threads = []
    for tid, thread in now.items():
        first = before.get(tid, {"voluntary": 0, "involuntary": 0, "cpu": 0.0})
        change = {key: thread[key] - first[key] for key in ("voluntary", "involuntary", "cpu")}  # type: ignore[operator]
        threads.append({"tid": tid, "name": thread["name"], **change, "cpus": sorted(cpus.get(tid, ()))})  # type: ignore[type-var]
    memory = {"resident": read_memory(pid, "VmRSS"), "anonymous": read_memory(pid, "RssAnon")}
    print(json.dumps({"seconds": passed, "threads": threads, **memory}))


if __name__ == "__main__":
    main()
