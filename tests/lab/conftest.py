"""One lab, booted once and shared by all lab tests. A test that changes it restores it.

NOHYPE_TEST_LAB=NAME uses a lab that is up (`nohype lab up NAME`) and leaves it up.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.errors import LabLost
from orchestrator.lab import lab as labs
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.demo import GUESTS, measure
from orchestrator.lab.health import check_emulation
from orchestrator.lab.progress import Event, Kind, Timeline
from orchestrator.lab.spec import load_spec
from orchestrator.lab.start import attached_lab
from orchestrator.model.proof import Proof
from orchestrator.ssh import Completed
from tests.harness.lab_command import LabCommand

NAME = "test"
LINK_UP = "ip link set nic0 up && timeout 60 sh -c 'until grep -qs 1 /sys/class/net/nic0/carrier; do sleep 0.1; done'"


# EX_TEMPFAIL of sysexits.h: the emulated server was lost, which says nothing about any test. The Makefile then tries once more.
LAB_LOST = 75


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests need all cores run before those that share two guests: each is a minute of the lab's time."""
    own = [item for item in items if item.path.is_relative_to(os.path.dirname(__file__))]
    for item in own:
        item.add_marker(pytest.mark.lab)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
    shared = {item.path for item in own if "guests" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path in shared)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """If the emulator has failed, no test result is valid, and the session ends."""
    report = yield
    used = getattr(item, "funcargs", {})
    hosts = [host for host in (used.get("host"), *(used.get("hosts") or ())) if isinstance(host, LabHost)]
    if report.failed:
        try:
            for host in hosts:
                check_emulation(host.lab)
        except LabLost as error:
            pytest.exit(f"{item.name} failed: {report.longreprtext[-2000:]}\n{error}", returncode=LAB_LOST)
    return report


@dataclass(frozen=True)
class LabHost:
    """The lab host, as tests use it."""

    lab: labs.Lab
    command: LabCommand

    def run(self, line: str, *, check: bool = True, timeout: float = 400) -> Completed:
        """Runs a line of shell as root."""
        done = labs.execute(self.lab, line, timeout=timeout)
        assert done.status == 0 or not check, f"{line!r} ended with {done.status}: {done.stdout}{done.stderr}"
        return done

    def nohype(self, *words: str, check: bool = True, timeout: float = 400) -> Completed:
        """Runs the operator's command, in a fork of a process that has imported it; `run("nohype ...")` runs the program."""
        done = self.command.run(list(words), timeout)
        assert done.status == 0 or not check, f"nohype {shlex.join(words)} ended with {done.status}: {done.stdout}{done.stderr}"
        return done

    def python(self, program: str, *arguments: str, timeout: float = 120) -> str:
        """Runs a Python program with the installed package, as `nohype` does; returns what it printed."""
        done = self.command.run(["-c", program, *arguments], timeout)
        assert done.status == 0, f"{program} ended with {done.status}: {done.stdout}{done.stderr}"
        return done.stdout

    def await_ready(self, *guests: str) -> list[dict[str, Any]]:
        """Running guests, as the manager shows them, once all are ready: they boot at the same time."""
        return [json.loads(self.nohype("guest", "start", name, "--wait", "240", "--json").stdout) for name in guests]

    def proofs(self, frames: int = 0) -> dict[tuple[str, str], Proof]:
        """All proofs by name and subject, measured now."""

        def ask(_lab: labs.Lab, *words: str, check: bool) -> Any:
            return json.loads(self.nohype(*words, "--json", check=check).stdout)

        return {(proof.name, proof.subject): proof for proof in measure(self.lab, frames, ask)}

    @contextmanager
    def changed(self, change: str, back: str) -> Iterator[None]:
        """Changes the host during the block."""
        try:
            self.run(change)
            yield
        finally:
            self.run(back)

    def scope(self, guest: str) -> str:
        """The control group of a guest's threads, quoted for the shell."""
        pid = self.run(f"cat /run/libvirt/qemu/{guest}.pid").stdout.strip()
        path = self.run(f"sed -n 's/^0:://;s,/libvirt/.*,,p' /proc/{pid}/cgroup").stdout.strip()
        return shlex.quote(f"/sys/fs/cgroup{path}")

    @contextmanager
    def unconfined(self, guest: dict[str, Any]) -> Iterator[None]:
        """Lifts the guest's cpuset during the block, so that its threads can be moved to other guests' cores."""
        file = f"{self.scope(guest['name'])}/cpuset.cpus"
        with self.changed(f"echo 0-7 > {file}", f"echo 0-1,{','.join(guest['cores'])} > {file}"):
            yield


@pytest.fixture(scope="session")
def host() -> Iterator[LabHost]:
    """The lab host, without guests."""
    given = os.environ.get("NOHYPE_TEST_LAB")
    if given:
        with connected(labs.find_lab(given)) as found:
            yield found
        return
    with own_lab(NAME, "numa") as found:
        yield found


@contextmanager
def own_lab(name: str, spec: str, *, switch_of: str = "") -> Iterator[LabHost]:
    """A lab that is up during the block. ``spec``, ``switch_of``: as of `load_spec` and of `start_lab`."""
    if os.geteuid():
        reason = "the lab needs root"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)

    def show(event: Event) -> None:
        if event.kind in (Kind.NOTE, Kind.END, Kind.FAILED):
            print(f"{event.stage}: {event.text or f'{event.seconds:.1f} s'}", flush=True)

    with (
        attached_lab(name, load_spec(spec), AccelChoice.AUTO, Timeline(show), switch_of=switch_of) as lab,
        connected(lab) as found,
    ):
        yield found


@contextmanager
def connected(lab: labs.Lab) -> Iterator[LabHost]:
    with labs.keeping_connection(lab) as kept:
        command = LabCommand(kept)
        try:
            yield LabHost(kept, command)
        finally:
            command.close()


@pytest.fixture(scope="session")
def guests(host: LabHost) -> Iterator[list[dict[str, Any]]]:
    """Two running guests, as the manager shows them; deleted when the session ends."""
    for guest in GUESTS:
        words = ("--memory", "256M", "--image", "minimal", "--address", guest.address)
        host.nohype("guest", "create", guest.name, *words)
    yield host.await_ready(*(guest.name for guest in GUESTS))
    for guest in GUESTS:
        host.nohype("guest", "delete", guest.name, check=False)
