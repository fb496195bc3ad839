"""What benchmarks judge by: no loss and no excess passes (benchmarks/crash_lab*.py, manager_idle.py, console_flood.py)."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import GuestError
from tests.fakes import tracing
from tests.fakes.root import FakeRoot
from tests.fakes.server import Server
from tests.harness.pauses import record_pauses

FOLDER = Path(__file__).parents[2] / "benchmarks"
LIFE, SECOND_LIFE = (10, 1000), (20, 2000)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a benchmark, which is no part of a package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def make_host(reading: Any, second: str | None = None) -> Any:
    """A sound host on which the bystander runs, and the second guest is in a state."""
    guests = {"bystander": reading.Claimed("running", frozenset({2}), 0, 64, "v0", 0, "m0")}
    lives = {"bystander": LIFE}
    if second:
        guests["second"] = reading.Claimed(second, frozenset({4}), 0, 64, "v1", 1, "m1")
    if second == "running":
        lives["second"] = SECOND_LIFE
    running = {name: one for name, one in guests.items() if one.state == "running"}
    return reading.Host(
        guests=guests,
        taken=(len(guests), len(guests), len(guests)),
        undo=tuple(name for name in running for _ in range(3)),
        domains=dict.fromkeys(running, 1),
        lives=lives,
        qemus=frozenset(pid for pid, _ in lives.values()),
        threads={name: one.cpus for name, one in running.items()},
        vfio=frozenset(one.vf for one in running.values()),
        macs=dict.fromkeys(range(4), "00:00:00:00:00:00") | {one.index: one.mac for one in running.values()},
        used={0: 64 * len(running), 1: 0},
    )


def check_second(load: Any, host: Any, states: tuple[str, ...], *events: tuple[int, str, str, str]) -> list[str]:
    """What is wrong after managers were killed that left the second guest alive in these states; the n-th at event n."""
    reading = load("crash_lab_reading")
    lefts = [reading.Left(state, 3, SECOND_LIFE, number) for number, state in enumerate(states, start=1)]
    found = load("crash_lab_checks").check_kept(host, lefts, [reading.Event(*event) for event in events])
    return [text.partition(":")[0] for text in found]


def make_flood(floods: Any, **change: Any) -> Any:
    fields = {"name": "x", "sent": 1, "plans": [0.01] * 100, "failed": 0, "rss": 70 << 20, "lines": 0, "seconds": 5.0}
    return floods.Figures(**{**fields, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"plans": [0.01] * 99 + [5.0]}, ""),
        ({"plans": [0.01] * 98 + [0.08] * 2}, "p99 of plan is 70 ms longer"),
        ({"failed": 1}, "1 of the operator's requests failed"),
        ({"rss": 201 << 20}, "201 MB resident"),
        ({"lines": 1001}, "1001 lines in the log"),
        ({"lines": 1900, "seconds": 60.0}, ""),
    ],
)
def test_a_flood_that_does_too_much_to_others_is_found(load: Any, change: dict[str, Any], said: str) -> None:
    floods = load("floods")
    faults = floods.find_faults(make_flood(floods, **change), make_flood(floods))
    assert [said in fault for fault in faults] == [True] * bool(said)


def test_the_checks_find_each_kind_of_loss(load: Any) -> None:
    reading, checks = load("crash_lab_reading"), load("crash_lab_checks")
    checks.prove_checks(make_host(reading), LIFE)
    for second in ("running", "stopped"):
        assert checks.check_guests(make_host(reading, second), LIFE, "") == []


def test_a_second_guest_that_a_recovery_has_ended_is_found(load: Any) -> None:
    stopped = make_host(load("crash_lab_reading"), "stopped")
    assert check_second(load, stopped, ("running",)) == ["stopped"]
    found_gone = ((2, "finish", "manager", "it ended while no manager ran"), (3, "ended", "manager", "end not observed"))
    assert check_second(load, stopped, ("running",), *found_gone) == ["stopped"]
    assert check_second(load, stopped, ("starting",), (2, "stopped", "manager", "ended at once")) == ["stopped"]


def test_a_second_guest_that_is_another_process_is_found(load: Any) -> None:
    running = make_host(load("crash_lab_reading"), "running")
    assert check_second(load, running, ("running", "running")) == []
    again = replace(running, lives=running.lives | {"second": (20, 2001)})
    assert check_second(load, again, ("running",)) == ["stopped"]


@pytest.mark.parametrize(
    "event",
    [
        (2, "stopped", "root", "powered off"),
        (2, "deleted", "root", "on request"),
        (2, "ended", "manager", "powered off"),
        (2, "ended", "manager", "reset (reboot or panic)"),
    ],
)
def test_a_second_guest_that_was_to_end_is_no_loss(load: Any, event: tuple[int, str, str, str]) -> None:
    stopped = make_host(load("crash_lab_reading"), "stopped")
    assert check_second(load, stopped, ("running",), event) == []
    # What was done before the kill was done to another process.
    assert check_second(load, stopped, ("running",), (1, *event[1:])) == ["stopped"]


def test_an_end_that_was_asked_for_needs_an_event(load: Any) -> None:
    """By whichever of the killed managers: libvirt and the guest itself may go on with it."""
    stopped = make_host(load("crash_lab_reading"), "stopped")
    gone = (3, "ended", "manager", "its end was cut short when the manager ended")
    for states in (("stopping",), ("deleting",), ("running", "stopping"), ("stopping", "running")):
        assert check_second(load, stopped, states, gone) == []
        assert set(check_second(load, stopped, states)) == {"unexplained"}


def judge(load: Any, monkeypatch: pytest.MonkeyPatch, *looks: list[str]) -> tuple[Any, dict[str, Any]]:
    """A run in which this is wrong at one look after another, and the sums."""
    inside, reading = load("crash_lab_inside"), load("crash_lab_reading")
    record_pauses(monkeypatch)
    monkeypatch.setattr(inside, "LATE", 0.2)
    said = [*looks]
    run = inside.Run(0, "stop", recovery=1.0, left=[reading.Left("running", 3, SECOND_LIFE, 1)])
    run.slips += inside.check_until_well(run, lambda: said.pop(0) if len(said) > 1 else said[0])
    return run, load("crash_lab").summarise([asdict(run)], {"clean": 1.0}, 1, 1.0)


@pytest.mark.parametrize("grave", ["stopped: the bystander", "doubled cores: [2, 2]"])
def test_what_may_never_be_is_a_fault_at_once(load: Any, monkeypatch: pytest.MonkeyPatch, grave: str) -> None:
    run, sums = judge(load, monkeypatch, [grave, "unsettled: second is stopping"], [])
    kind = grave.partition(":")[0]
    assert run.faults == [grave]
    assert (sums["faults"], sums[kind], sums[f"{kind} when ready"], sums["wrong when ready"]) == (1, 1, 1, 2)
    assert judge(load, monkeypatch, ["leaked pages: 1"], [grave], [])[0].faults == [grave]


def test_what_is_wrong_for_a_while_is_counted_by_itself(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sums = judge(load, monkeypatch, ["leaked pages: 5"], ["leaked pages: 3"], [])
    assert run.faults == []
    assert (sums["faults"], sums["leaked pages"], sums["leaked pages when ready"]) == (0, 0, 1)
    run, sums = judge(load, monkeypatch, ["leaked pages: 5"])
    assert (sums["faults"], sums["leaked pages"], sums["leaked pages when ready"]) == (1, 1, 1)


def test_the_table_shows_what_the_first_kill_left(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = judge(load, monkeypatch, [])
    load("crash_lab").print_table([asdict(run)])
    assert "running, 3 changes, QEMU" in capsys.readouterr().out


def test_all_that_the_lab_needs_is_carried_there(load: Any, tmp_path: Path) -> None:
    parts = load("crash_lab").PARTS
    for part in parts:
        shutil.copy(part, tmp_path)
    subprocess.run([sys.executable, "-c", f"import {parts[-1].stem}"], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("changed", "good"),
    [({}, True), ({"resident": 80.1e6}, False), ({"cpu": 0.13}, False), ({"cpus": [0, 2]}, False), ({"cpu": 0.12}, True)],
)
def test_an_idle_manager_is_judged(load: Any, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], good: bool) -> None:
    found: dict[str, Any] = {"resident": 80e6, "cpu": 0.05, "cpus": [0, 1]} | changed
    thread = {"tid": 1, "name": "nohyped", "voluntary": 40, "involuntary": 0, "cpu": found["cpu"], "cpus": found["cpus"]}
    measured = {"seconds": 60.0, "threads": [thread], "resident": found["resident"], "anonymous": 6e7}
    assert load("manager_idle").report(measured, [{"cpus": [2, 3]}]) is good
    shown = capsys.readouterr().out
    assert "wanted: at most 80\n" in shown
    assert "wanted: at most 0.2\n" in shown


def test_a_host_with_many_vfs_is_measured(load: Any, tmp_path: Path) -> None:
    figures = load("big_host").measure_vfs(tmp_path, vfs=6, guests=2, runs=1)
    assert len(figures) == 6
    assert all(seconds > 0 for seconds in figures.values())


def test_the_benchmark_of_a_large_host_runs_and_judges(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small one: what it measures is there, and a limit that is passed is named."""
    large = load("big_host_cpus")
    monkeypatch.setattr(sys, "argv", ["big_host_cpus.py", "1"])
    for name, value in {"SERVER": Server(cores=16, nodes=2, vfs=7, pages=64), "THREADS": 90, "IRQS": 20, "GUESTS": 2}.items():
        monkeypatch.setattr(large, name, value)
    with pytest.raises(SystemExit) as ended:
        large.main()
    said = capsys.readouterr().out
    assert (ended.value.code, "32 CPUs, 2 nodes, 90 threads, 20 interrupts" in said) == (0, True)
    assert all(f"\n{name}  " in said for name in large.LIMITED)
    monkeypatch.setattr(large, "LIMIT", 0.0)
    with pytest.raises(SystemExit) as ended:
        large.main()
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""), ({"peak": 201.0}, "201 MB resident"), ({"polls": 0}, "nothing was flooded"),
        ({"wrong": ["ledger: x"]}, "wrong answer"), ({"guests": 0.0599}, ""),
        ({"guests": 0.0611}, "99th percentile of GET rises by 51 ms"),
        ({"plans": 0.0611}, "99th percentile of plan rises by 51 ms"),
    ],
)  # fmt: skip
def test_a_flood_that_others_notice_is_a_fault(load: Any, change: dict[str, Any], fault: str) -> None:
    flood = load("console_flood")
    quiet = flood.Times([0.010] * 100, [0.010] * 100)
    slow = {name: [change.pop(name, 0.010)] * 2 for name in ("guests", "plans")}
    flooded = flood.Times([0.010] * 98 + slow["guests"], [0.010] * 98 + slow["plans"])
    faults = flood.find_faults(
        "noise", flood.Figures(**{"quiet": quiet, "flooded": flooded, "peak": 199.0, "polls": 1, **change})
    )
    assert len(faults) == bool(fault)
    assert fault in "".join(faults)


@pytest.mark.netns
@pytest.mark.parametrize("inside", [False, True], ids=["as they should", "not through the switch"])
def test_edges_counts_the_frames_at_the_switch(load: Any, monkeypatch: pytest.MonkeyPatch, *, inside: bool) -> None:
    if os.geteuid():
        pytest.skip("network namespaces need root")
    edges = load("edges")
    for name, value in (("TRIPS", 5), ("BATCHES", 2)):
        monkeypatch.setattr(edges, name, value)
    if inside:
        monkeypatch.setattr(edges, "connect_edge", lambda host, folder, _name: edges.connect_macvtaps(host, folder))
    ways, right = edges.run(2)
    assert right is not inside
    assert [(way.lost, len(way.found["round trip"])) for way in ways] == [(0, 2)] * len(ways)


@pytest.mark.parametrize(
    ("outside", "after", "lost", "right"),
    [(True, (430, 430), 0, True), (True, (430, 429), 0, False), (True, (430, 430), 1, False), (True, (100, 100), 0, False),
     (False, (100, 100), 0, True), (False, (101, 101), 0, False)],
)  # fmt: skip
def test_edges_lab_counts_the_frames_at_the_switch(
    load: Any, monkeypatch: pytest.MonkeyPatch, *, outside: bool, after: tuple[int, int], lost: int, right: bool
) -> None:
    edges_lab = load("edges_lab")
    counts = iter([(100, 100), after])
    monkeypatch.setattr(edges_lab, "read_port", lambda *_: next(counts))
    monkeypatch.setattr(edges_lab.switch, "port", lambda _: SimpleNamespace(netns="n", interface="p"))
    sent = {"round trip": 200, "60 bytes": 66, "1,514 bytes": 64}
    found = {name: {"sent": count, "lost": lost, "seconds": 2.0, "exits": {"msr": count}} for name, count in sent.items()}
    bench = edges_lab.Bench(SimpleNamespace(name="bench"), None)
    monkeypatch.setattr(bench, "inside", lambda *_: found)
    way = edges_lab.Measured("VF, hairpin", outside)
    assert bench.measure(way, ["m1", "m2"]) is right
    assert way.found["exits, round trip"] == [1.0]


PHASES: dict[str, Any] = {
    "idle": 60.0, "boot": {"io": 900, "msr": 60}, "run": {"msr": 100, "hlt": 40}, "mmio": 0, "boundary": 12.5,
    "floods": {"cpuid": {"noticed": 1.0, "killed": 2.0}}, "samples": [(0.5, {}), (1.0, {"io": 5}), (2.0, {"io": 900, "msr": 9})],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"run": {"msr": 100, "io": 1}}, False),
        ({"mmio": 1}, False),
        ({"floods": {**PHASES["floods"], "io": {"noticed": 1.1, "killed": 2.1}}}, False),
        ({"floods": {"cpuid": {"noticed": 1.1, "killed": None}}}, False),
        ({"floods": {"cpuid": {"noticed": None, "killed": None}}}, False),
    ],
)
def test_phases_without_device_access_and_stopped_floods_are_good(load: Any, change: dict[str, Any], good: bool) -> None:
    assert load("exit_phases").report({**PHASES, **change}) is good


def test_counts_of_a_kind_are_those_of_the_guests_threads(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside, fake = load("exit_phases_inside"), FakeRoot(tmp_path)
    tracing.add_tracing(fake)
    tracing.make_instance(fake, f"{tracing.INSTANCES}/nohype")
    fake.add("sys/module/kvm_amd/parameters/avic", "N")
    cpuid, msr, own, other = 0x72, 0x7C, 11, 12
    exits = {(own, cpuid): 3, (own + 100, cpuid): 4, (other, cpuid): 50, (own, msr): 600}
    tracing.show_hist(fake, f"{tracing.INSTANCES}/nohype/{tracing.EXIT}", exits, 0)
    tracing.show_calls(fake, {own: 5, other: 70}, event=tracing.MMIO)
    monkeypatch.setattr(inside, "HOST", fake)
    threads = [own, own + 100]
    assert [inside.count(kind, threads) for kind in ("cpuid", "msr", "io", "mmio")] == [7, 600, 0, 5]


class Flooded:
    """A client whose guest, a process, floods from the command on, and is killed after some readings of its exits."""

    def __init__(self, *, is_killed: bool) -> None:
        self.qemu = subprocess.Popen(["sleep", "600"])
        self._is_killed, self._floods, self._exits, self._read = is_killed, False, 40, threading.Event()
        self.found: list[dict[str, Any]] = []

    def count(self, *_: object) -> int:
        if self._floods:
            self._exits += 1000
            if self._exits > 5000:
                self._read.set()
        return self._exits

    def send_command(self, _name: str, _line: str, _timeout: float) -> None:
        self._floods = True
        self._read.wait()
        if self._is_killed:
            detail = "vCPU 0 (housekeeping): 5000 exits of cpuid in 1.2 s, allowed 2000 per second; killed"
            self.found.append({"id": 8, "kind": "exit-policy", "time": datetime.now(UTC).isoformat(), "detail": detail})
            self.qemu.kill()
            self.qemu.wait()
            raise GuestError("guest phases has ended")
        self._floods = False

    def events(self, _after: int = 0, limit: int = 0) -> list[dict[str, Any]]:
        return [{"id": 7}] if limit else self.found

    def guest(self, _name: str) -> dict[str, Any]:
        return {"disengaged": {"signal": "call"}}

    def create(self, _request: object) -> None:
        return

    def delete(self, _name: str) -> None:
        self.qemu.kill()
        self.qemu.wait()


@pytest.mark.parametrize("is_killed", [True, False])
def test_floods_are_timed_from_their_first_exits(load: Any, monkeypatch: pytest.MonkeyPatch, *, is_killed: bool) -> None:
    inside, client = load("exit_phases_inside"), Flooded(is_killed=is_killed)
    monkeypatch.setattr(inside, "count", client.count)
    monkeypatch.setattr(inside, "find_threads", lambda: (client.qemu.pid, [client.qemu.pid]))
    if not is_killed:
        monkeypatch.setattr(inside, "LONGEST", 0.5)
    times = inside.flood(client, "cpuid")
    if is_killed:
        assert 0 < times["noticed"] <= times["killed"] < 60
        assert times["stopped"] <= times["killed"]
    else:
        assert times == {"noticed": None, "stopped": None, "killed": None}
