"""Kills a manager with SIGKILL at a random point of a random operation, starts another, and looks whether anything was lost.

Real: system manager, ledger (on disk), steps, signal. Fake: host and hypervisor, which outlive the manager as real ones do. One
run is one seed. Points are the moments before and after each change of the host and of the hypervisor, and before each statement
that changes the ledger, a commit and an fsync too.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from orchestrator.errors import Conflict, NoRoom, NotFound, OrchestratorError
from orchestrator.guests.service import GuestService
from orchestrator.hypervisor.connection import EndCause
from orchestrator.ledger import Claim, Ledger
from orchestrator.ledger.database import FSYNC
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.secret import Secret
from orchestrator.model.state import SETTLED, GuestState
from tests.fakes import nvme
from tests.fakes.hypervisor import FakeHypervisor, Life
from tests.fakes.root import LOOPBACK, FakeRoot
from tests.fakes.server import BOOT_ID, CLOUD_IMAGE, IMAGE, Server, build_server, make_image

Tell = Callable[..., object]
"""Passes named values on to the parent process."""

SERVER = Server(cores=8, nodes=2, vfs=7, pages=512, disks=3)
CHANGES = ("BEGIN", "INSERT", "UPDATE", "DELETE", "COMMIT", FSYNC)
"""What statements begin with that change the ledger; and its fsync."""
_NAMES = tuple(f"guest{number}" for number in range(6))
_POINTS = 300
_MOST_BEFORE = 5
"""Guests that there may be before anything is killed."""
_SECOND_CRASH, _REBOOT, _END_MEANWHILE = 0.25, 0.05, 0.2


@dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        point: where the manager was killed.
        operation: what it was doing.
        rebooted: whether the host lost its power meanwhile.
        recovery: seconds from the new manager's start to the end of its recovery.
        running: guests that ran when it was killed.
        faults: what went wrong, nothing if all is well.
    """

    seed: int
    point: str = ""
    operation: str = ""
    rebooted: bool = False
    recovery: float = 0.0
    running: int = 0
    faults: list[str] = field(default_factory=list)


class World:
    """A fake host with its ledger, on disk. Each process opens its own.

    Args:
        folder: where it is, or is to be made.
        server: what the host has.
    """

    def __init__(self, folder: Path, server: Server = SERVER) -> None:
        self.folder, self.server = folder, server
        if not (folder / "host").exists():
            build_server(folder / "host", server)
            make_image(folder / "images")
            make_image(folder / "images", CLOUD_IMAGE, configuration=["credentials", "cloud-init"])
        self.host = FakeRoot(folder / "host")
        self.trace: Callable[[str], object] = lambda _statement: None
        self.hypervisor = FakeHypervisor(self.host)

    def open_manager(self, policy: Policy | None = None) -> tuple[GuestService, Ledger]:
        """A manager as `nohyped` makes it, not recovered yet; with another policy than the server's, if one is given."""
        ledger = Ledger(self.folder / "ledger.sqlite", trace=lambda statement: self.trace(statement))
        folders = {"images": self.folder / "images", "consoles": self.folder / "consoles"}
        return GuestService(self.host, self.hypervisor, ledger, policy or self.server.policy, **folders), ledger  # type: ignore[arg-type]

    @property
    def secrets(self) -> Path:
        """The folder with the guests' user data."""
        return self.folder / "ledger.sqlite.secrets"

    def count_undo_records(self) -> int:
        """Length of the undo journal, past the ledger's own words."""
        with sqlite3.connect(self.folder / "ledger.sqlite") as database:
            return int(database.execute("SELECT count(*) FROM undo").fetchone()[0])

    def reboot(self) -> None:
        """What a power cut leaves: the ledger, and a host as it is after boot."""
        shutil.rmtree(self.folder / "host")
        build_server(self.folder / "host", self.server)


def arm(world: World, points: int, told: Callable[[str], object]) -> None:
    """Kills this process at the given number of points from now on.

    Args:
        told: gets where that is.
    """
    left = points

    def pass_point(where: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            with world.host.wait_between_changes():
                told(where)
                os.kill(os.getpid(), signal.SIGKILL)

    def trace(statement: str) -> None:
        if statement.startswith(CHANGES):
            pass_point(f"before {' '.join(statement.split()[:3])}")

    object.__setattr__(world.host, "watch", lambda moment, what: pass_point(f"{moment} {what}"))
    world.trace = trace
    for name in ("fsync", "unlink"):
        setattr(os, name, _watch_secrets(getattr(os, name), world.secrets, pass_point))


def _watch_secrets(call: Callable[..., Any], folder: Path, pass_point: Callable[[str], None]) -> Callable[..., Any]:
    """A function of os that passes a point before and after it is called for a file of this folder, or for the folder."""

    def watched(which: Any, *arguments: Any, **named: Any) -> Any:
        file = Path(os.readlink(f"/proc/self/fd/{which}") if isinstance(which, int) else which)
        if folder not in (file, file.parent):
            return call(which, *arguments, **named)
        pass_point(f"before {call.__name__} {file.name}")
        result = call(which, *arguments, **named)
        pass_point(f"after {call.__name__} {file.name}")
        return result

    return watched


def run_crash(folder: Path, seed: int) -> Outcome:
    """One run in an empty folder."""
    rng, outcome = Random(seed), Outcome(seed)
    world = World(folder)
    original = world.host.tree()
    status, text = in_child(lambda tell: work_until_killed(World(folder), Random(seed), rng.randrange(_POINTS), tell))
    said = [json.loads(line) for line in text.splitlines()]
    outcome.point = next((line["killed"] for line in said if "killed" in line), "")
    outcome.operation = next((f"{line['begin']} {line['name']}" for line in reversed(said) if "begin" in line), "")
    outcome.faults += [line["fault"] for line in said if "fault" in line]
    if status != -signal.SIGKILL:
        outcome.faults.append(f"the manager was not killed, but ended with {status}")
    if rng.random() < _END_MEANWHILE and (names := sorted(world.hypervisor.running_names())):
        world.hypervisor.end(rng.choice(names), EndCause.FAILED)
    if rng.random() < _REBOOT:
        world.reboot()
        outcome.rebooted = True
    running = world.hypervisor.lives()
    outcome.running = len(running)
    if rng.random() < _SECOND_CRASH:
        in_child(lambda tell: _recover_until_killed(World(folder), rng.randrange(60), tell))
    expected = _expect(said)
    status, text = in_child(lambda tell: _check_recovery(World(folder), running, expected, original, tell))
    answer: dict[str, Any] = json.loads(text.splitlines()[-1]) if status == 0 and text else {}
    outcome.recovery = answer.get("recovery", 0.0)
    outcome.faults += answer.get("faults", [f"the recovery failed ({status}): {text}"])
    return outcome


def measure_recovery(folder: Path, guests: int, times: int) -> list[float]:
    """Kills the manager of a host with many guests that often; how long, in seconds, the next one took to recover each time."""
    server = Server(cores=guests + 8, threads=1, nodes=2, vfs=64, pages=4096)
    world = World(folder, server)

    def fill(_tell: object) -> None:
        manager, _ = World(folder, server).open_manager()
        for number in range(guests):
            manager.create(OPERATOR, GuestRequest(name=f"guest{number}", memory="64M", image=IMAGE))

    def work(seed: int, tell: Tell) -> None:
        # A few points only, so that most of the guests stay.
        work_until_killed(World(folder, server), Random(seed), 40, tell, before=0)

    def recover(tell: Tell) -> None:
        began = time.perf_counter()
        manager, _ = World(folder, server).open_manager()
        manager.reconciler.recover()
        tell(recovery=time.perf_counter() - began)

    taken = []
    status, text = in_child(fill)
    for seed in range(times):
        assert status in (0, -signal.SIGKILL), text
        status, text = in_child(partial(work, seed))
        running = world.hypervisor.lives()
        _, said = in_child(recover)
        taken.append(float(json.loads(said)["recovery"]))
        faults = check_lives(running, world.hypervisor.lives())
        assert not faults, faults
    return taken


def _expect(said: list[dict[str, str]]) -> tuple[set[str], set[str]]:
    """Names of guests that somebody was promised, and of those that nobody knows any more.

    What was going on when the manager was killed may have come to either end.
    """
    present: set[str] = set()
    absent: set[str] = set(_NAMES)
    for line in said:
        if line.get("begin") in ("create", "delete"):
            present.discard(line["name"])
            absent.discard(line["name"])
        if "done" in line:
            (present if line["exists"] else absent).add(line["name"])
    return present, absent


def work_until_killed(world: World, rng: Random, points: int, tell: Tell, before: int | None = None) -> None:
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    before = rng.randint(0, _MOST_BEFORE) if before is None else before
    for number in count():
        if number == before:
            arm(world, points, lambda where: tell(killed=where))
        # Creating more often than the rest, so that there is something to lose.
        kind, name = rng.choice([*OPERATIONS, "create", "create"]), rng.choice(_NAMES)
        if number < before:
            kind, name = "create", _NAMES[number]
        tell(begin=kind, name=name)
        try:
            OPERATIONS[kind](world, manager, name, rng)
        except (Conflict, NotFound, NoRoom):
            pass  # honest answers
        except OrchestratorError as error:
            tell(fault=f"{kind} {name}: {type(error).__name__}: {error}")
        claim = ledger.find(name)
        tell(done=kind, name=name, exists=claim is not None and claim.state != GuestState.WIPING)


def _recover_until_killed(world: World, points: int, tell: Tell) -> None:
    manager, ledger = world.open_manager()
    arm(world, points, lambda where: tell(killed=where))
    manager.reconciler.recover()
    os.kill(os.getpid(), signal.SIGKILL)


def _check_recovery(
    world: World,
    running: frozenset[Life],
    expected: tuple[set[str], set[str]],
    original: dict[str, str],
    tell: Tell,
) -> None:
    began = time.perf_counter()
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    recovery = time.perf_counter() - began
    wait_wiped(ledger)
    manager.close()  # guests that are to be started again stay as they are while we look
    faults = [*_check_claims(world, ledger, running, expected)]
    before = (world.host.tree(), [(claim.plan, claim.state) for claim in ledger.read().claims])
    again, ledger_again = world.open_manager()
    again.reconciler.recover()
    again.close()
    after = (world.host.tree(), [(claim.plan, claim.state) for claim in ledger_again.read().claims])
    if before != after:
        faults.append(f"a second recovery changed something: {_differ(before[0], after[0])}, claims {before[1]} -> {after[1]}")
    faults += _go_on(again, ledger_again)
    last, ledger_last = world.open_manager()  # the others wipe no disks: they are closed
    for claim in ledger_last.read().claims:
        last.delete(OPERATOR, claim.plan.name)
    wait_wiped(ledger_last)
    if differ := _differ(original, world.host.tree()):
        faults.append(f"after all guests were deleted the host is not as before: {differ}")
    if world.secrets.exists() and (files := sorted(os.listdir(world.secrets))):
        faults.append(f"files of deleted guests are left: {files}")
    if dirty := nvme.find_dirty(world.host):
        faults.append(f"after all guests were deleted disks hold data: {dirty}")
    if count := world.count_undo_records():
        faults.append(f"{count} records are left in the undo journal")
    if left := [claim.plan.name for claim in ledger_last.read().claims]:
        faults.append(f"guests cannot be deleted: {left}")
    if violations := world.host.violations():
        faults.append(f"done, but allowed to nobody ({len(violations)} things): {'; '.join(violations[:4])}")
    tell(recovery=recovery, faults=faults)


def wait_wiped(ledger: Ledger) -> None:
    """Until no guest's disks are wiped any more."""
    deadline = time.monotonic() + 60
    while any(claim.state == GuestState.WIPING for claim in ledger.read().claims):
        assert time.monotonic() < deadline, "wiping does not end"
        time.sleep(0.005)


def check_lives(before: frozenset[Life], after: frozenset[Life]) -> list[str]:
    """A recovery ends no guest that runs, and starts none: not even one whose end had been asked for is ended and begun anew."""
    names, names_after = ({life.name for life in lives} for lives in (before, after))
    if names != names_after:
        return [f"guests that ran: {sorted(names)}, after the recovery: {sorted(names_after)}"]
    if before != after:
        return [f"guests that ran were ended and started again: {sorted(life.name for life in before - after)}"]
    return []


def _check_claims(world: World, ledger: Ledger, lives: frozenset[Life], expected: tuple[set[str], set[str]]) -> list[str]:
    claims = {claim.plan.name: claim for claim in ledger.read().claims}
    faults, running = check_lives(lives, world.hypervisor.lives()), {life.name for life in lives}
    states = {name: claim.state for name, claim in claims.items()}
    if unsettled := {name: str(state) for name, state in states.items() if state not in SETTLED}:
        faults.append(f"the recovery left guests half-way: {unsettled}")
    if paused := world.hypervisor.paused():
        faults.append(f"the recovery left guests paused: {sorted(paused)}")
    if quarantined := [(one.name, one.reasons) for one in ledger.quarantined()]:
        faults.append(f"in quarantine, though nothing failed: {quarantined}")
    known = {name for name, state in states.items() if state == GuestState.RUNNING}
    if known != running:
        faults.append(f"running by the ledger: {sorted(known)}, in truth: {sorted(running)}")
    faults += _check_secrets(world, claims.values())
    present, absent = expected
    if lost := present - claims.keys():
        faults.append(f"guests that were promised are lost: {sorted(lost)}")
    if found := absent & claims.keys():
        faults.append(f"guests that were deleted, or never made, are there: {sorted(found)}")
    return faults


def _check_secrets(world: World, claims: Collection[Claim]) -> list[str]:
    """The files with user data are those of the claims with user data, and initrds those of guests that run."""
    secret = [claim for claim in claims if claim.request.secrets and claim.state != GuestState.WIPING]
    texts = {f"{claim.plan.uuid}.json": claim for claim in secret}
    running = {f"{claim.plan.uuid}.initrd" for claim in claims
               if claim.state == GuestState.RUNNING and claim.request.image == CLOUD_IMAGE}  # fmt: skip
    found = set(os.listdir(world.secrets)) if world.secrets.exists() else set()
    faults = (
        [f"files of guests that need none: {sorted(found - texts.keys() - running)}"] if found - texts.keys() - running else []
    )
    # The deletion of a guest that is not verified clean has removed its file.
    unneeded = {f"{claim.plan.uuid}.json" for claim in secret if claim.state == GuestState.QUARANTINED}
    if missing := (texts.keys() | running) - found - unneeded:
        faults.append(f"files of guests are lost: {sorted(missing)}")
    for name in texts.keys() & found:
        stored = json.loads((world.secrets / name).read_text())
        if {field: Secret.of(text) for field, text in stored.items()} != texts[name].request.secrets:
            faults.append(f"another text in {name} than was claimed")
    return faults


def _go_on(manager: GuestService, ledger: Ledger) -> list[str]:
    """Whoever has a claim can start the guest, and whoever asks for a guest gets one, or an honest answer."""
    faults = []
    for claim in ledger.read().claims:
        try:
            manager.start(OPERATOR, claim.plan.name)
        except OrchestratorError as error:
            faults.append(f"guest {claim.plan.name}, which was {claim.state}, cannot be started: {error}")
    try:
        manager.create(OPERATOR, GuestRequest(name="one-more", memory="64M", image=IMAGE))
    except NoRoom:
        pass
    except OrchestratorError as error:
        faults.append(f"one more guest cannot be made: {error}")
    return faults


def _differ(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """What is different, but for the name of the boot: the host may have been rebooted."""
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and key != BOOT_ID)
    return {key: (before.get(key), after.get(key)) for key in keys[:8]}


def in_child(work: Callable[[Tell], None]) -> tuple[int, str]:
    """Does work in a new process; returns its exit status (negative: the signal that killed it), and what it has told.

    What was told before a SIGKILL is not lost: it went through a pipe.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            logging.disable()
            work(lambda **fields: os.write(writer, json.dumps(fields).encode() + b"\n"))
            status = 0
        except BaseException:
            os.write(writer, json.dumps({"fault": traceback.format_exc()}).encode() + b"\n")
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def build_request(rng: Random, name: str) -> GuestRequest:
    """A guest of a size that few or many fit beside."""
    fields: dict[str, object] = {
        "name": name,
        "cores": rng.choice((1, 1, 1, 2, 3)),
        "memory": rng.choice(("64M", "128M", "256M")),
        "image": IMAGE,
        "restart": rng.choice(("never", "never", "on-failure")),
    }
    if rng.random() < 0.5:
        fields |= {"image": CLOUD_IMAGE, "user_data": f"#cloud-config\nfqdn: {name}.example\n", "hostname": name}
    if rng.random() < 0.4:
        fields["disks"] = rng.choice(([{}], [{}, {}], [{"serial": "disk1"}]))
    if rng.random() < 0.3:
        fields["id"] = f"{name}.{fields['cores']}"
    return GuestRequest.model_validate(fields)


def _create(_world: World, manager: GuestService, name: str, rng: Random) -> None:
    manager.create(OPERATOR, build_request(rng, name))


def _stop(_world: World, manager: GuestService, name: str, rng: Random) -> None:
    manager.stop(OPERATOR, name, rng.choice((0, 5)))


def _end(world: World, manager: GuestService, name: str, rng: Random) -> None:
    """The guest ends by itself, or by somebody's hand; the manager may or may not be told."""
    if name in world.hypervisor.running_names():
        how = rng.choice([how for how in EndCause if how is not EndCause.UNKNOWN])
        uuid = world.hypervisor.end(name, how)
        if rng.random() < 0.7:
            manager.reconciler.on_guest_ended(uuid, how)


def _reset_pf(world: World, manager: GuestService, _name: str, rng: Random) -> None:
    """The PF is reset, after which igb switches inside the NIC again (igb_vmm_control()); the manager hears of it."""
    key = rng.choice(sorted(world.host.registers))
    if world.host.registers[key]:
        world.host.registers[key] |= LOOPBACK
    manager.reconciler.on_link_change()


OPERATIONS: dict[str, Callable[[World, GuestService, str, Random], object]] = {
    "create": _create,
    "start": lambda _w, manager, name, _r: manager.start(OPERATOR, name),
    "stop": _stop,
    "kill": lambda _w, manager, name, _r: manager.kill(OPERATOR, name),
    "restart": lambda _w, manager, name, _r: manager.restart(OPERATOR, name, 5),
    "delete": lambda _w, manager, name, _r: manager.delete(OPERATOR, name),
    "end": _end,
    "reset-pf": _reset_pf,
    "collect": lambda _w, manager, _n, _r: manager.reconciler.reconcile(),
    "check": lambda _w, manager, _n, _r: manager.reconciler.detect_drift(),
    "recover": lambda _w, manager, _n, _r: manager.reconciler.recover(),
}


def to_json(outcome: Outcome) -> str:
    """The outcome on one line."""
    return json.dumps(asdict(outcome))
