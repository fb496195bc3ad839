"""Kills programs of a fleet with SIGKILL at random while guests are submitted and cancelled, and looks for what was lost.

Killed are the controller, slurmds, managers and job scripts. A manager is also killed by itself, after a random number of changes
of the host or the ledger, so that it ends in the middle of an operation.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

from orchestrator.host.run import Completed
from orchestrator.waiting import wait_until
from tests.harness.slurm import Cluster, FleetHost

CONTROLLER, SLURMD, MANAGER, MANAGER_AT_POINT, SCRIPT = "controller", "slurmd", "manager", "manager at a change", "job script"
_IN_FLIGHT, _MOST_GUESTS = 5, 10
_POINTS = 150
_REQUESTS = ((), (), ("--cores", "2"), ("--disk", ""))
_DOWN_SECONDS = 2.0
_WATCH_SECONDS = 0.3
_NOT_STARTED = "its host has not reported a start"
_GUESTS, _GUESTS_SECONDS = (0, 2, 4, 6), 15.0
"""Guests that run at the next kill, if they do so within this time: a controller that is killed often forgets most guests."""


@dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        kills: by what was killed.
        points: where managers have killed themselves.
        submitted: guests that were requested.
        started: starts of guests, as the hypervisors have seen them.
        cancelled: guests of which a cancellation was requested.
        ended: guests by the state of their last job.
        not_started: confirmed guests that Slurm ended before their host started them, without a cancellation, as their note says.
        drained: why Slurm took nodes out of use; they were resumed.
        lost: confirmed guests that have ended without a reason, or that the controller forgot.
        doubled: guests that ran on two hosts, or were started again after they were confirmed.
        orphaned: guests without a running job when all had settled, running jobs without a guest, and what is left at the end.
        shared: places that were given twice.
    """

    kills: Counter[str] = field(default_factory=Counter)
    points: list[str] = field(default_factory=list)
    submitted: int = 0
    started: int = 0
    cancelled: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    not_started: list[str] = field(default_factory=list)
    drained: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    orphaned: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Slurm ends a guest before its start only if its host loses the controller: not more often than that is killed."""
        too_many = self.not_started if len(self.not_started) > self.kills[CONTROLLER] else []
        return [*self.lost, *self.doubled, *self.orphaned, *self.shared, *self.errors, *too_many]


class Watch:
    """A thread that starts managers again after they have been killed, and notes which guests run, several times per second."""

    def __init__(self, cluster: Cluster, rng: Random, outcome: Outcome) -> None:
        self._cluster, self._rng, self._outcome = cluster, rng, outcome
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self.lives: dict[str, list[tuple[str, str, int]]] = {}
        """Each start of a guest that was seen, by its name: host, id of the start, and its time."""

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for host in self._cluster.hosts:
            if host.served.has_ended():
                self._start(host, 0)

    def _run(self) -> None:
        while not self._over.wait(_WATCH_SECONDS):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - the test must not pass because nothing was watched
                self._outcome.errors.append(f"the watch failed: {type(error).__name__}: {error}")
                return

    def count_starts(self, name: str) -> int:
        """How often a guest has been started until now."""
        self._note_lives()
        return len(self.lives.get(name, []))

    def _note_lives(self) -> dict[str, list[str]]:
        """Returns the hosts of each guest that runs."""
        found: dict[str, list[str]] = {}
        with self._lock:
            for host in self._cluster.hosts:
                for life in host.served.world.hypervisor.lives():
                    found.setdefault(life.name, []).append(host.name)
                    start = (host.name, life.uuid, life.start)
                    if start not in (seen := self.lives.setdefault(life.name, [])):
                        seen.append(start)
        return found

    def _look(self) -> None:
        for name, hosts in self._note_lives().items():
            # The hosts are read one after the other: a guest that has moved meanwhile is not doubled.
            if len(hosts) > 1 and len(self._cluster.guests().get(name, [])) > 1:
                self._outcome.doubled.append(f"{name} runs on {hosts}")
        for host in self._cluster.hosts:
            if host.served.has_ended():
                time.sleep(self._rng.uniform(0, _DOWN_SECONDS))
                self._start(host, self._rng.choice((0, self._rng.randint(1, _POINTS))))

    def _start(self, host: FleetHost, points: int) -> None:
        if where := host.served.read_end():
            self._outcome.points.append(where)
            self._outcome.kills[MANAGER_AT_POINT] += 1
        host.served.start(points)


def run_kills(cluster: Cluster, rounds: int, seed: int, say: Callable[[str], object]) -> Outcome:
    """Kills something in each round. Returns when all guests have been cancelled and are gone."""
    rng, outcome, names = Random(seed), Outcome(), iter(f"guest{number}" for number in range(100_000))
    submits: dict[str, Future[tuple[Completed, int]]] = {}
    cancels: dict[str, Future[Completed]] = {}
    killed: set[str] = set()
    with Watch(cluster, Random(seed), outcome) as watch, ThreadPoolExecutor(2 * _IN_FLIGHT) as pool:
        for number in range(rounds):
            if outcome.errors:
                break
            while sum(not done.done() for done in submits.values()) < _IN_FLIGHT and len(cluster.guests()) < _MOST_GUESTS:
                name = next(names)
                submits[name] = pool.submit(_submit, cluster, watch, name, rng.choice(_REQUESTS))
                time.sleep(rng.uniform(0, 0.5))
            enough = rng.choice(_GUESTS)
            wait_until(lambda enough=enough: len(cluster.guests()) >= enough, timeout=_GUESTS_SECONDS, interval=0.2)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 1))
            what = _kill(cluster, rng, killed)
            outcome.kills[what] += 1
            outcome.shared += cluster.find_violations()
            running = sorted(cluster.guests().keys() - cancels.keys())
            if running and rng.random() < 0.4:
                name = rng.choice(running)
                cancels[name] = pool.submit(cluster.nohype, "fleet", "cancel", name, check=False)
            outcome.drained += _resume(cluster)
            say(f"round {number + 1}: {what}, {len(running)} guests run")
        results = {name: result.result(600) for name, result in submits.items()}
        refused = {name: result.result(600) for name, result in cancels.items()}
        outcome.drained += _resume(cluster)
        cluster.wait_for(lambda: _is_settled(cluster), "jobs and guests agree", timeout=180)
        outcome.submitted, outcome.cancelled = len(results), len(cancels)
        outcome.started = sum(map(len, watch.lives.values()))
        outcome.shared += cluster.find_violations()
        outcome.orphaned += _find_orphans(cluster)
        shown = {job["name"]: job for job in json.loads(cluster.nohype("fleet", "list", "--json").stdout)}
        outcome.ended = Counter(job["state"] for job in shown.values())
        for name, (result, starts) in results.items():
            expected, note = name in cancels or name in killed, shown.get(name, {}).get("note", "")
            if result.status == 0 and note.startswith(_NOT_STARTED) and not expected:
                outcome.not_started.append(name)
                if watch.lives.get(name):
                    outcome.lost.append(f"{name} has run, and its note says that no start was reported")
            outcome.lost += _find_loss(name, result, shown.get(name), expected=expected)
            if result.status == 0 and (again := watch.lives.get(name, [])[max(1, starts) :]):
                outcome.doubled.append(f"{name} was started again after it was confirmed: {again}")
        outcome.errors += [
            f"cancellation of {name} failed without a message"
            for name, done in refused.items()
            if done.status and not done.stderr
        ]
        _end_all(cluster)
        outcome.orphaned += [*_find_records(cluster), *_find_left(cluster)]
    return outcome


def _submit(cluster: Cluster, watch: Watch, name: str, request: tuple[str, ...]) -> tuple[Completed, int]:
    """The result, and how often the guest had been started when the command returned."""
    words = ("--memory", "64M", "--image", "minimal", *request)
    done = cluster.nohype("fleet", "submit", name, *words, check=False)
    return done, watch.count_starts(name)


def _kill(cluster: Cluster, rng: Random, killed: set[str]) -> str:
    """Kills one program; starts it again after a while, but for a manager, which the watch starts. Returns what it was."""
    scripts = cluster.find_processes("fleet step job")
    managers = [host for host in cluster.hosts if not host.served.has_ended()]
    choices = (CONTROLLER, SLURMD, *([MANAGER] if managers else []), *([SCRIPT] if scripts else []))
    what = rng.choice(choices)
    if what == CONTROLLER:
        cluster.kill_controller()
        time.sleep(rng.uniform(0, _DOWN_SECONDS))
        cluster.start_controller()
    elif what == SLURMD:
        node = rng.choice(cluster.node_names())
        cluster.kill_slurmd(node)
        time.sleep(rng.uniform(0, _DOWN_SECONDS))
        cluster.start_slurmd(node)
    elif what == MANAGER:
        rng.choice(managers).served.kill()
    else:
        number = rng.choice(scripts)
        text = cluster.run("cat", f"/proc/{number}/environ", check=False).stdout
        killed.update(word.partition("=")[2] for word in text.split("\0") if word.startswith("SLURM_JOB_NAME="))
        cluster.run("kill", "-9", number, check=False)
    return what


def _resume(cluster: Cluster) -> list[str]:
    """What an operator does with nodes that Slurm took out of use, when they have no guest any more. Returns the reasons."""
    found = []
    for line in cluster.run("sinfo", "--Node", "--noheader", "--format=%N|%T|%E", check=False).stdout.splitlines():
        node, state, reason = line.split("|", 2)
        if state.startswith("drained"):
            found.append(f"{node}: {reason}")
            cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    return found


def _is_settled(cluster: Cluster) -> bool:
    """Each running job has its guest, and each guest its job, on the same host; no job is about to start."""
    starting = cluster.run("squeue", "--noheader", "--states=configuring", check=False).stdout
    return not starting and not _find_orphans(cluster) and not any("comp" in state for state in cluster.node_states().values())


def _find_orphans(cluster: Cluster) -> list[str]:
    jobs = {name: [node.rpartition("-")[0] for node in nodes] for name, nodes in cluster.jobs().items()}
    guests = cluster.guests()
    return [
        f"{name}: jobs on {jobs.get(name, [])}, guests on {guests.get(name, [])}"
        for name in sorted(jobs.keys() | guests.keys())
        if jobs.get(name) != guests.get(name)
    ]


def _find_loss(name: str, result: Completed, job: dict[str, Any] | None, *, expected: bool) -> list[str]:
    """``expected``: its job script was killed, or its cancellation was requested."""
    if result.status:
        return [] if result.stderr else [f"{name} was refused without a message"]
    if job is None:
        return [f"{name} was confirmed and is forgotten"]
    if job["state"] not in ("RUNNING", "PENDING", "NODE_FAIL") and not expected and not job["note"]:
        return [f"{name} was confirmed and is {job['state']} without a note: {job['reason']}"]
    return []


def _end_all(cluster: Cluster) -> None:
    cluster.run("scancel", "--partition=guests", "--user=nohype-fleet", check=False)
    cluster.wait_for(lambda: not cluster.guests(), "the end of all guests", timeout=180)


def _find_records(cluster: Cluster) -> list[str]:
    """Which guests' Epilogs have not succeeded."""
    wait_until(lambda: not cluster.find_records(), timeout=120, interval=1)
    return [f"record {path} is left" for path in cluster.find_records()]


def _find_left(cluster: Cluster) -> list[str]:
    """Guests that the managers still have: their disks were not wiped."""

    def read() -> list[str]:
        return [
            f"{host.name}: {guest['name']} is {guest['state']}" for host in cluster.hosts for guest in host.served.client.guests()
        ]

    wait_until(lambda: not read(), timeout=120, interval=1)
    return read()
