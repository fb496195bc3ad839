"""The demo of a fleet: two labs as two hosts behind one switch, guests that Slurm places, and the loss of a host."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.audit.catalogue import HOST_RESTORED
from orchestrator.audit.report import summarize
from orchestrator.audit.restored import Surveys
from orchestrator.errors import LabError, LabLost, ShellError
from orchestrator.lab import control
from orchestrator.lab.demo import WrittenReport, ask, measure
from orchestrator.lab.fleet_setup import ACCOUNT, set_up_fleet
from orchestrator.lab.health import check_emulation
from orchestrator.lab.lab import Lab
from orchestrator.lab.progress import Timeline
from orchestrator.model.plain import to_plain
from orchestrator.model.proof import Verdict
from orchestrator.waiting import wait_until

_COMMAND_TIMEOUT = 400.0
_READY_TIMEOUT = 400.0
_LOST_TIMEOUT = 300.0
"""Slurm marks a host down that has not responded for SlurmdTimeout, and looks at intervals of a third of it."""
_POLL = 2.0
_NO_LOSS = re.compile(r" sent=([1-9]\d*) received=\1 duplicates=0 ")


@dataclass(frozen=True)
class FleetGuest:
    name: str
    cores: int
    address: str  # of its VF, with prefix length
    requeue: bool  # its policy for the loss of its host

    @property
    def ip(self) -> str:
        return self.address.partition("/")[0]


# Each host of the spec `small` has three cores for guests, so one of two cores and one of one core fill it.
GUESTS = (
    FleetGuest("web1", 2, "10.9.0.11/24", requeue=False),
    FleetGuest("web2", 2, "10.9.0.12/24", requeue=False),
    FleetGuest("db1", 1, "10.9.0.13/24", requeue=True),
    FleetGuest("db2", 1, "10.9.0.14/24", requeue=True),
)
WAITING = FleetGuest("late", 1, "10.9.0.15/24", requeue=False)


@dataclass(frozen=True)
class Check:
    """A statement about the fleet, and what was seen. The proofs of the audit are about a host."""

    name: str
    passed: bool
    evidence: str


@dataclass(frozen=True)
class FleetReport(WrittenReport):
    """The content of the report of a fleet."""

    verdict: str  # "pass" only if every proof and every check passed
    hosts: list[dict[str, Any]]  # name, how it was emulated, its survey before the guests, its guests, its proofs
    checks: list[dict[str, Any]]
    jobs: list[dict[str, Any]]  # as the controller shows them at the end
    timings: dict[str, float]  # seconds per stage


def run_fleet_demo(labs: Sequence[Lab], timeline: Timeline) -> FleetReport:
    """The first lab is the controller too; the second is killed.

    Raises LabLost if another lab is lost or an emulator failed, and LabError if a command failed.
    """
    try:
        report = _Demo(labs[0], labs[1], timeline).run()
    except LabLost:
        raise
    except (LabError, ShellError):
        check_emulation(labs[0])
        raise
    if report.verdict != Verdict.PASS:
        check_emulation(labs[0])
    return report


class _Demo:
    def __init__(self, controller: Lab, other: Lab, timeline: Timeline) -> None:
        self._labs = {lab.name: lab for lab in (controller, other)}
        self._controller, self._other, self._timeline = controller, other, timeline
        self._checks: list[Check] = []

    def run(self) -> FleetReport:
        stage = self._timeline.stage
        with stage("role nohype_fleet on both hosts"):
            set_up_fleet(list(self._labs.values()))
        with stage("survey of both hosts"):
            surveys = {name: ask(lab, "survey") for name, lab in self._labs.items()}
        with stage("guests from submission to ready"):
            for guest in GUESTS:
                self._submit(guest)
            places = self._wait_started(GUESTS)
        self._check_places(places)
        with stage("guest for which no host has room"):
            self._submit(WAITING)
            waiting = self._jobs()[WAITING.name]
            found = f"{WAITING.name}: {waiting['state']}, {waiting['reason']}"
            self._check("a guest without room waits", found, passed=waiting["state"] == "PENDING")
            self._fleet("cancel", WAITING.name)
        with stage("pings between guests of different hosts"):
            self._ping(places)
        hosts = []
        for name, lab in self._labs.items():
            with stage(f"proofs of {name}"):
                proofs = measure(lab)
                if summarize(proofs) != Verdict.PASS:
                    check_emulation(lab)  # later the second lab is gone
            emulator = lab.state.emulator and lab.state.emulator.model_dump(mode="json")
            guests = ask(lab, "guest", "list")
            hosts.append(
                {"name": name, "spec": lab.state.spec.name, "accel": lab.state.accel, "emulator": emulator,
                 "survey": surveys[name], "guests": guests, "proofs": to_plain(proofs)}
            )  # fmt: skip
        self._lose_host(places)
        with stage("end of the guests"):
            proof = HOST_RESTORED.prove(Surveys(surveys[self._controller.name], self._end_all(surveys[self._controller.name])))
        hosts[0]["proofs"] += to_plain((proof,))
        return self._report(hosts)

    def _report(self, hosts: list[dict[str, Any]]) -> FleetReport:
        verdicts = [proof["verdict"] for host in hosts for proof in host["proofs"]]
        passed = all(verdict == Verdict.PASS for verdict in verdicts) and all(check.passed for check in self._checks)
        verdict = str(Verdict.PASS if passed else Verdict.FAIL)
        jobs = self._fleet("list")
        return FleetReport(verdict, hosts, [asdict(check) for check in self._checks], jobs, self._timeline.timings)

    def _lose_host(self, places: dict[str, str]) -> None:
        """The host is killed as by a loss of power; the operator declares it off; what may be started elsewhere is."""
        stage, lost = self._timeline.stage, [guest for guest in GUESTS if places[guest.name] == self._other.name]
        kept = [guest for guest in GUESTS if guest not in lost]
        before = self._running()
        with stage(f"loss of {self._other.name}, until Slurm notices"):
            control.down(self._other.name)
            self._wait(
                lambda: all(self._jobs()[guest.name]["state"] == "NODE_FAIL" for guest in lost), "the end of the lost guests",
                _LOST_TIMEOUT,
            )  # fmt: skip
        states = {guest.name: str(self._jobs()[guest.name]["state"]) for guest in lost}
        passed = set(states.values()) == {"NODE_FAIL"}
        self._check("lost guests are reported, and not started again by Slurm", _list(states), passed=passed)
        self._check("guests of the other host run on", ", ".join(sorted(before)), passed=self._running() == before)
        with stage("requeue, after the operator has declared the host off"):
            told = self._fleet("requeue", self._other.name, "--host-is-off")
            # The host is full: another guest of one core makes room.
            for guest in kept:
                if guest.requeue:
                    self._fleet("cancel", guest.name)
            again = [guest for guest in lost if guest.requeue]
            found = self._wait_started(again)
        allowed = {one["name"] for one in told if one["job"]}
        expected = {guest.name for guest in again}
        what = "; ".join(f"{one['name']}: {one['outcome']}" for one in told)
        self._check("only guests whose policy allows it are requeued", what, passed=allowed == expected)
        passed = set(found.values()) == {self._controller.name}
        self._check("requeued guests run on the remaining host", _list(found), passed=passed)
        for guest in again:
            other = next(one for one in kept if not one.requeue)
            answer = self._ping_once(self._controller, guest.name, other)
            self._check(f"{guest.name} pings {other.name} after the requeue", answer, passed=bool(_NO_LOSS.search(answer)))

    def _check_places(self, places: dict[str, str]) -> None:
        """Raises LabError if the guests are not placed as the rest of the demo requires."""
        for lab in self._labs.values():
            if sorted(guest.cores for guest in GUESTS if places[guest.name] == lab.name) != [1, 2]:
                raise LabError(f"Slurm did not give each host one guest of two cores and one of one core: {_list(places)}")
        self._check("guests are spread over both hosts", _list(places), passed=True)

    def _ping(self, places: dict[str, str]) -> None:
        for first, second in ((GUESTS[0], GUESTS[1]), (GUESTS[3], GUESTS[2])):
            answer = self._ping_once(self._labs[places[first.name]], first.name, second)
            where = f"{first.name} on {places[first.name]} pings {second.name} on {places[second.name]}"
            across = places[first.name] != places[second.name]
            self._check("ping across the external switch", f"{where}: {answer}", passed=across and bool(_NO_LOSS.search(answer)))

    def _ping_once(self, lab: Lab, name: str, target: FleetGuest) -> str:
        return " ".join(ask(lab, "guest", "tell", name, f"ping {target.ip} 10 0.2")["answer"].split())

    def _submit(self, guest: FleetGuest) -> None:
        self._fleet(
            "submit", guest.name, "--memory", "256M", "--image", "minimal", "--cores", str(guest.cores),
            "--address", guest.address, *(["--requeue"] if guest.requeue else []),
        )  # fmt: skip

    def _wait_started(self, guests: Sequence[FleetGuest]) -> dict[str, str]:
        """The host of each guest, once its boot is over. Raises LabError if one has ended, or after a time limit."""
        places: dict[str, str] = {}

        def have_started() -> bool:
            jobs = self._jobs()
            if ended := [guest.name for guest in guests if jobs[guest.name]["state"] not in ("PENDING", "RUNNING")]:
                job = jobs[ended[0]]
                raise LabError(f"guest {ended[0]} of the fleet is {job['state']}: {job['note'] or job['reason']}")
            places.update({guest.name: jobs[guest.name]["node"] for guest in guests})
            started = {
                found["name"]
                for name in set(places.values()) - {""}
                for found in ask(self._labs[name], "guest", "list")
                if found["state"] == "running" and found["disengaged"]
            }
            return started >= {guest.name for guest in guests}

        self._wait(have_started, "the start of the guests", _READY_TIMEOUT)
        return places

    def _end_all(self, before: Any) -> Any:
        """The survey of the controller's host after the end of its guests."""
        for name, job in self._jobs().items():
            if job["state"] in ("PENDING", "RUNNING"):
                self._fleet("cancel", name)
        self._wait(lambda: not ask(self._controller, "guest", "list"), "the end of the guests", _COMMAND_TIMEOUT)
        return wait_until(lambda: ask(self._controller, "survey"), lambda survey: survey == before, timeout=20, interval=1)

    def _running(self) -> dict[str, Any]:
        """Guests of the controller's host, with what changes if one is started again."""
        return {
            guest["name"]: (guest["state"], guest["id"], guest["version"]) for guest in ask(self._controller, "guest", "list")
        }

    def _jobs(self) -> dict[str, dict[str, Any]]:
        """The newest job of each guest."""
        return {job["name"]: job for job in self._fleet("list")}

    def _fleet(self, *words: str) -> Any:
        """`nohype fleet ... --json` on the controller, as the account that submits guests."""
        return ask(self._controller, "fleet", *words, account=ACCOUNT)

    def _check(self, name: str, evidence: str, *, passed: bool) -> None:
        self._checks.append(Check(name, passed, evidence))
        self._timeline.note(f"{name}: {'pass' if passed else 'FAIL'} ({evidence})")

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        if not wait_until(condition, timeout=seconds, interval=_POLL):
            nodes = "; ".join(f"{node['name']} {node['state']} {node['reason']}" for node in self._fleet("hosts"))
            raise LabError(f"timed out after {seconds:g} s waiting for {what}: {_list(_states(self._jobs()))}; nodes: {nodes}")


def _states(jobs: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: f"{job['state']} {job['note'] or job['reason']}" for name, job in jobs.items()}


def _list(found: dict[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in found.items())
