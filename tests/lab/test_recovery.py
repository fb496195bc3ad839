"""Failures of the manager, of libvirt and of a guest: no other guest is affected, and the manager detects what happened."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import build_wheelhouse, source_tree
from orchestrator.lab import lab as labs
from tests.lab.conftest import LabHost

MEMORY = ("--memory", "128M", "--image", "minimal")
VICTIM = "victim"
DROP_IN = "/run/systemd/system/nohyped.service.d"
PERIOD = 60
"""Seconds between the manager's checks of its guests (daemon)."""

LOOK = """
import json, re, subprocess, sys
from pathlib import Path
from orchestrator.client.client import Client

def run(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout

def read_lives():  # with the start time: the pid may belong to another process by now
    for file in Path("/run/libvirt/qemu").glob("*.pid"):
        try:
            pid = file.read_text().strip()
            start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it exited during the read
        if file.stem != "driver":
            yield file.stem, [pid, start]

def read_driver(vf):
    return (vf / "driver").resolve().name if (vf / "driver").exists() else ""

client, after = Client(Path("/run/nohype/nohyped.sock")), int(sys.argv[1])
nic = Path("/sys/class/net/nic0/device")
(link,) = json.loads(run("ip", "-json", "link", "show", "nic0"))
print(json.dumps({
    "manager": run("systemctl", "show", "--property=MainPID", "--value", "nohyped").strip(),
    "guests": {guest["name"]: guest | {"version": 0, "disengaged": None} for guest in client.guests()},
    "lives": dict(read_lives()),
    "vfs": {vf["vf"]: [vf["address"], read_driver(nic / f"virtfn{vf['vf']}")] for vf in link["vfinfo_list"]},
    "pools": {str(file): file.read_text() for file in Path("/sys/devices/system/node").glob("node*/hugepages/*/free_hugepages")},
    "events": client.events(after),
    "answers": {name: client.send_command(name, "counters", 60) for name in sys.argv[2:]},
}))
"""


@dataclass(frozen=True)
class Look:
    """The state of the lab host at one moment.

    Attributes:
        manager: its process id.
        guests: as the manager shows them, except their versions and the ends of their boots.
        lives: of each guest that libvirt runs, the pid and start time of its QEMU.
        vfs: of each VF, by number, the address that the PF enforces, and its driver.
        pools: free huge pages.
        events: those after the given one.
        answers: of the guests whose counters were requested.
    """

    manager: str
    guests: dict[str, dict[str, Any]]
    lives: dict[str, list[str]]
    vfs: dict[str, list[str]]
    pools: dict[str, str]
    events: list[dict[str, Any]]
    answers: dict[str, str]

    @property
    def last(self) -> int:
        return int(self.events[-1]["id"])

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The events, without those that may come late: of the end of a boot, and of VM exits, as replies to `look` make."""
        return [event for event in self.events if event["kind"] not in ("disengaged", "exit-policy")]

    def kinds(self, subject: str) -> list[str]:
        return [event["kind"] for event in self.changes if event["subject"] == subject]


def look(host: LabHost, after: int = 0, *ask: str) -> Look:
    """With one command, since each takes time in the lab."""
    return Look(**json.loads(host.python(LOOK, str(after), *ask)))


def await_events(host: LabHost, after: int, subject: str, kinds: list[str], seconds: float) -> Look:
    """Waits until a guest has exactly these events."""
    deadline = time.monotonic() + seconds
    while (found := look(host, after)).kinds(subject) != kinds:
        assert time.monotonic() < deadline, f"no {kinds} of {subject} within {seconds:g} s, only {found.events}"
    return look(host, after)  # again: look() reads the events last, and the rest may be older


def await_new(host: LabHost, unit: str, old: str, seconds: int = 90) -> None:
    """Waits until the unit is active in a process other than the old one; a starting unit has a process already."""
    new = f'[ "$(systemctl is-active {unit})" = active ] && [ "$(systemctl show --property=MainPID --value {unit})" != {old} ]'
    done = host.run(f"for _ in $(seq {2 * seconds}); do {new} && exit; sleep 0.5; done; exit 1", check=False)
    assert done.status == 0, host.run(f"systemctl status {unit}; journalctl --no-pager -n 30 -u {unit}", check=False).stdout


def check_unnoticed(host: LabHost, before: Look) -> Look:
    """The same guests run in the same processes, own the same resources, and respond."""
    now = look(host, before.last, *before.guests)
    assert now.lives == before.lives
    assert now.guests == before.guests
    assert (now.vfs, now.pools) == (before.vfs, before.pools)
    assert {guest["state"] for guest in now.guests.values()} == {"running"}
    assert all("nohype: done counters" in now.answers[name] for name in before.guests)
    return now


def upgrade(host: LabHost, _pid: str) -> None:
    """Like the host role: pip, with the package of this source tree, then a restart."""
    with tarfile.open(build_wheelhouse(source_tree(), cache_folder(), progress=print)) as archive:
        (entry,) = (entry for entry in archive if entry.name.startswith("nohype_orchestrator"))
        data = archive.extractfile(entry)
        assert data
        labs.execute(host.lab, f"cat > /tmp/{entry.name}", input=data.read(), timeout=60)
    package = "/opt/nohype/lib/python3*/site-packages/orchestrator/__init__.py"
    host.run(f"touch -d 2001-01-01 {package}")
    host.run(f"/opt/nohype/bin/pip install --quiet --no-index --no-deps --force-reinstall /tmp/{entry.name}")
    host.run(f"rm /tmp/{entry.name}")
    assert not host.run(f"stat -c %y {package}").stdout.startswith("2001"), "pip installed nothing"
    host.run("systemctl restart nohyped")


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(upgrade, id="upgrade-and-restart", marks=pytest.mark.soak),
        pytest.param(lambda host, pid: host.run(f"kill -KILL {pid}"), id="kill"),
    ],
)
@pytest.mark.usefixtures("guests")
def test_restarted_manager_does_not_affect_guests(host: LabHost, trouble: Callable[[LabHost, str], object]) -> None:
    before = look(host)
    trouble(host, before.manager)
    await_new(host, "nohyped", before.manager)
    now = check_unnoticed(host, before)
    assert now.manager != before.manager
    assert {name: now.kinds(name) for name in now.guests} == dict.fromkeys(before.guests, ["adopt"])


@pytest.mark.soak
def test_a_second_manager_is_refused_and_the_first_is_named(host: LabHost) -> None:
    """Also one with other paths: both would allocate the same cores."""
    first = host.run("systemctl show --property=MainPID --value nohyped").stdout.strip()
    paths = '[paths]\nledger = "/root/second/ledger.sqlite"\nsocket = "/root/second/socket"\n'
    host.run(f"{{ cat /etc/nohype/nohype.toml; printf '{paths}'; }} > /root/second.toml")
    done = host.run("nohyped --config /root/second.toml", check=False, timeout=60)
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith(f"nohyped: another manager (pid {first}) holds /run/nohype/host.lock")
    assert host.run("rm /root/second.toml; ls -d /root/second", check=False).status, "nothing was created"
    host.nohype("guest", "list")


@pytest.fixture
def short_watchdog(host: LabHost) -> Iterator[None]:
    """Sets the manager's watchdog time-out to 9 s instead of 90 s."""
    write = f"mkdir -p {DROP_IN} && printf '[Service]\\nWatchdogSec=9\\n' > {DROP_IN}/short.conf"
    make = f"{write} && systemctl daemon-reload && systemctl restart nohyped"
    with host.changed(make, f"rm -r {DROP_IN}; systemctl daemon-reload; systemctl restart nohyped"):
        yield


@pytest.mark.soak
@pytest.mark.usefixtures("guests", "short_watchdog")
def test_hung_manager_does_not_affect_guests(host: LabHost) -> None:
    before, run = look(host), host.run("systemctl show --property=InvocationID --value nohyped").stdout.strip()
    host.run(f"kill -STOP {before.manager}")
    await_new(host, "nohyped", before.manager)
    assert "Watchdog timeout" in host.run(f"journalctl --no-pager -o cat INVOCATION_ID={run}").stdout
    now = check_unnoticed(host, before)
    assert {name: now.kinds(name) for name in now.guests} == dict.fromkeys(before.guests, ["adopt"])


@pytest.mark.usefixtures("guests")
def test_libvirt_restart_does_not_affect_guests_and_manager(host: LabHost) -> None:
    before, old = look(host), host.run("systemctl show --property=MainPID --value libvirtd").stdout.strip()
    host.run("systemctl restart libvirtd")
    await_new(host, "libvirtd", old)
    now = check_unnoticed(host, before)
    assert now.manager == before.manager
    assert now.changes == []


def spoof_check(guest: dict[str, Any]) -> str:
    """The command that sets the spoof check of the guest's VF, without `on` or `off`."""
    return f"ip link set {guest['vf']['interface']} vf {guest['vf']['index']} spoofchk"


@pytest.fixture(scope="module")
def repinned(host: LabHost, guests: list[dict[str, Any]]) -> Iterator[tuple[str, str, Look]]:
    """A guest with a wrongly pinned vCPU and a VF without spoof check, a command for the vCPU's CPUs, and the state before.

    The manager checks once per minute: other failures of guests are tested in the meantime.
    """
    name, (first, second, *_) = guests[0]["name"], guests[0]["cpus"]
    before = look(host)
    task = f"$(dirname $(grep -l 'CPU 1/KVM' /proc/{before.lives[name][0]}/task/*/comm))"
    allowed = f"awk '/^Cpus_allowed_list/ {{print $2}}' {task}/status"
    assert host.run(allowed).stdout.strip() == str(second)
    with host.changed(f"{spoof_check(guests[0])} off", f"{spoof_check(guests[0])} on"):
        host.run(f"virsh vcpupin {name} 1 {first} --live")
        assert host.run(allowed).stdout.strip() == str(first)
        yield name, allowed, before


@pytest.fixture
def victim(host: LabHost) -> Iterator[str]:
    """The name of a third guest, which is deleted afterwards."""
    yield VICTIM
    host.nohype("guest", "delete", VICTIM, check=False)


@pytest.mark.usefixtures("guests", "repinned")
def test_killed_guest_is_stopped_and_clean(host: LabHost, victim: str) -> None:
    before = look(host)
    made = json.loads(host.nohype("guest", "create", victim, *MEMORY, "--json").stdout)
    vf, ran = made["vf"], look(host)
    assert ran.vfs[str(vf["index"])] == [vf["mac"], "vfio-pci"]
    assert ran.pools != before.pools
    host.run(f"kill -KILL {ran.lives[victim][0]}")
    # libvirt reports it: no wait for the manager's next check.
    now = await_events(host, ran.last, victim, ["ended"], PERIOD / 4)
    assert [event["detail"] for event in now.events if (event["subject"], event["kind"]) == (victim, "ended")] == ["failed"]
    assert now.guests[victim]["state"] == "stopped"
    assert (now.lives, now.vfs, now.pools) == (before.lives, before.vfs, before.pools)


@pytest.mark.soak
@pytest.mark.usefixtures("guests", "repinned")
def test_killed_guest_with_restart_on_failure_is_restarted(host: LabHost, victim: str) -> None:
    host.nohype("guest", "create", victim, *MEMORY, "--restart", "on-failure")
    ran = look(host)
    host.run(f"kill -KILL {ran.lives[victim][0]}")
    now = await_events(host, ran.last, victim, ["ended", "started"], PERIOD)
    assert now.guests[victim] == {**ran.guests[victim], "restarts": 1}
    assert now.lives.pop(victim) != ran.lives.pop(victim)
    assert now.lives == ran.lives


@pytest.mark.soak
@pytest.mark.usefixtures("guests", "repinned")
def test_panicked_guest_with_restart_on_failure_is_restarted(host: LabHost, victim: str) -> None:
    before = look(host)
    panic = ("--cmdline", "rdinit=/nonexistent panic=1")
    host.nohype("guest", "create", victim, *MEMORY, *panic, "--restart", "on-failure")
    expected, deadline = ["claimed", "started", "ended", "started"], time.monotonic() + 2 * PERIOD
    while (now := look(host, before.last)).kinds(victim)[: len(expected)] != expected:
        assert time.monotonic() < deadline, now.events
    assert next(event["detail"] for event in now.events if event["kind"] == "ended").startswith("reset (reboot or panic)")


def test_drift_is_reported_and_pinning_restored(host: LabHost, repinned: tuple[str, str, Look]) -> None:
    name, allowed, before = repinned
    first, second, *_ = before.guests[name]["cpus"]
    told: list[str] = []
    deadline = time.monotonic() + 1.5 * PERIOD
    while "affinity" not in " ".join(told) and time.monotonic() < deadline:
        now = look(host, before.last)
        told = [event["detail"] for event in now.events if (event["subject"], event["kind"]) == (name, "drifted")]
    pin = f"vCPU 1: affinity {first}, expected {second}"
    vf = before.guests[name]["vf"]["address"]
    # two events if the manager checks while the fixture changes the one after the other
    assert set("; ".join(told).split("; ")) == {f"{pin} (restored)", f"VF {vf}: spoof check is off, expected on"}
    assert host.run(allowed).stdout.strip() == str(second)
    assert now.lives[name] == before.lives[name]
    host.run(f"{spoof_check(before.guests[name])} on")


@pytest.mark.usefixtures("guests")
def test_interrupted_create_is_finished_or_undone(host: LabHost, victim: str) -> None:
    """The manager is killed when the VF is bound to vfio-pci: the host is partly changed, and QEMU does not run yet."""
    before = look(host)
    bound = f"[ $(ls -d /sys/bus/pci/drivers/vfio-pci/0000:* | wc -l) -gt {len(before.guests)} ]"
    create = f"nohype guest create {victim} {' '.join(MEMORY)}"
    host.run(f"{create} > /tmp/create 2>&1 & for _ in $(seq 9999); do {bound} && exec kill -KILL {before.manager}; done; exit 1")
    await_new(host, "nohyped", before.manager)
    now = look(host, before.last)
    assert now.lives.keys() == now.guests.keys() == {name for name, guest in now.guests.items() if guest["state"] == "running"}
    ends = {False: ["claimed", "undo", "deleted"], True: ["claimed", "finish"]}
    assert now.kinds(victim) == ends[victim in now.guests]
    if victim in now.guests:
        host.nohype("guest", "delete", victim)
        now = look(host, before.last)
    assert (now.guests, now.lives, now.vfs, now.pools) == (before.guests, before.lives, before.vfs, before.pools)
