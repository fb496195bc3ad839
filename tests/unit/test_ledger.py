"""The ledger on real files: nothing is promised twice, nothing that was written is lost, and trouble is told in one message."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.errors import Conflict, LedgerError, LostRace, NotFound
from orchestrator.ledger import Claim, Ledger, Quarantined, schema
from orchestrator.ledger.database import FSYNC
from orchestrator.ledger.loading import list_keys
from orchestrator.model.disk import DiskCheck
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plain import to_plain
from orchestrator.model.plan import DiskPlan, ImageRef, NicPlan, Plan, plan_from_json
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

PF = PciAddress.parse("0000:41:00.0")


def make_plan(number: int, **changes: object) -> Plan:
    """Guest gN with core N (CPUs 2N and 2N+1), VF N and a MAC address that ends in N."""
    vf = NicPlan(PF, "nic0", number, PF.offset(128 + 2 * number), MacAddress(f"02:4e:48:00:00:{number:02x}"))
    cores = (CpuSet.of((2 * number, 2 * number + 1)),)
    plan = Plan(f"g{number}", cores, 0, Size.parse("2M"), 128, (vf,), ImageRef("minimal"), "quiet 'ä\"")
    return replace(plan, **changes)  # type: ignore[arg-type]


def make_software_plan(number: int, **changes: object) -> Plan:
    """As ``make_plan``, with a NIC of a software edge."""
    plan = make_plan(number)
    nic = NicPlan(None, "nic0", None, None, plan.vf.mac, EdgeMode.MACVTAP_VEPA, tap=f"nh-{number}")
    return replace(plan, nics=(replace(nic, **changes),))


def store_as_before(plan: Plan, **changes: object) -> str:
    """A plan without a UUID, as earlier versions stored it: one VF, the image's name, the number that the UUID is computed of."""
    nic = plan.vf
    return json.dumps(
        {
            "name": plan.name, "cores": [str(core) for core in plan.cores], "node": plan.node,
            "page_size": str(plan.page_size), "pages": plan.pages, "housekeeping": "0-1",
            "vf": {
                "pf": str(nic.pf), "interface": nic.interface, "index": nic.index, "address": str(nic.address),
                "mac": str(nic.mac),
            },
            "image": plan.image.name, "cmdline": plan.cmdline, **changes,
        }
    )  # fmt: skip


OLD_UUIDS = {
    None: "f64abb56-b811-53db-a220-f48cce745777",
    0: "f64abb56-b811-53db-a220-f48cce745777",
    7: "b14cb9d9-7888-501d-987e-5ab04390f933",
}
"""Serial of make_plan(1) → its UUID, as earlier versions computed it: their guests may be running."""


def make_request(plan: Plan) -> GuestRequest:
    return GuestRequest(name=plan.name, memory=str(plan.memory), image=plan.image.name, id=f"job.{plan.name}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        yield opened


def take(ledger: Ledger, plan: Plan, generation: int) -> Claim:
    return ledger.claim(plan, generation, make_request(plan))


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    """What another program reads in the file."""
    other = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(other):
        return other.execute(statement).fetchall()


def claim(ledger: Ledger, *numbers: int) -> None:
    for number in numbers:
        take(ledger, make_plan(number), ledger.read().generation)


# Claims


def test_new_ledger_is_empty_and_private(ledger: Ledger, path: Path) -> None:
    assert ledger.read().claims == ()
    assert path.stat().st_mode & 0o077 == 0


def test_claims_are_read_back_as_they_were_made(ledger: Ledger, path: Path) -> None:
    claim(ledger, 2, 1)
    one, two = make_plan(1), make_plan(2)
    made = tuple(Claim(plan, GuestState.CREATING, make_request(plan), "", version) for plan, version in ((one, 3), (two, 2)))
    expected = tuple(replace(claim, created=found.created) for claim, found in zip(made, ledger.read().claims, strict=True))
    assert ledger.read().claims == expected
    assert all(abs(datetime.fromisoformat(claim.created) - datetime.now(UTC)) < timedelta(minutes=5) for claim in expected)
    ledger.close()
    with Ledger(path) as again:
        assert again.read().claims == expected


def test_generation_grows_with_each_claim(ledger: Ledger) -> None:
    first = ledger.read().generation
    assert take(ledger, make_plan(1), first) == ledger.find("g1")
    second = ledger.read().generation
    assert second > first
    ledger.release("g1")
    take(ledger, make_plan(2), second)  # a release takes no room from what was planned before it
    assert ledger.read().generation > second


def test_claim_that_was_planned_on_old_claims_is_refused(ledger: Ledger) -> None:
    before = ledger.read()
    claim(ledger, 1)
    with pytest.raises(
        LostRace, match=f"claims have changed while guest g2 was planned .generation {before.generation}"
    ) as caught:
        take(ledger, make_plan(2), before.generation)
    assert caught.value.code == "lost-race"
    assert [held.plan.name for held in ledger.read().claims] == ["g1"]


def test_name_can_be_claimed_once(ledger: Ledger) -> None:
    claim(ledger, 1)
    before = ledger.read()
    with pytest.raises(Conflict, match="guest named g1 already") as caught:
        take(ledger, make_plan(2, name="g1"), before.generation)
    assert not isinstance(caught.value, LostRace)
    assert ledger.read() == before


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (make_plan(2, cores=(CpuSet.parse("4,3"),)), "cannot claim CPU 3 for guest g2: another guest owns it"),
        (
            make_plan(2, nics=(replace(make_plan(2).vf, address=make_plan(1).vf.address),)),
            "VF 0000:41:10.2 .* another guest owns",
        ),
        (
            make_plan(2, nics=(make_plan(3).vf, replace(make_plan(2).vf, mac=make_plan(1).vf.mac))),
            "Ethernet address 02:4e:48:00:00:01 .* another guest owns it",
        ),
    ],
)
def test_second_claim_of_a_resource_is_refused(ledger: Ledger, second: Plan, says: str) -> None:
    claim(ledger, 1)
    before = ledger.read()
    with pytest.raises(Conflict, match=says):
        take(ledger, second, before.generation)
    assert ledger.read() == before, "all or nothing"
    take(ledger, make_plan(2), before.generation)


def test_tables_refuse_double_claims(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1, 2)
    with sqlite3.connect(path) as other:
        for kind, key in (("cpu", "2"), ("vf", "0000:41:10.2"), ("mac", "02:4e:48:00:00:01")):
            with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
                other.execute("INSERT INTO claim_key VALUES (?, ?, 'g2')", (kind, key))
    other.close()


def test_released_resources_can_be_claimed_again(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1)
    ledger.release("g1")
    claim(ledger, 1)
    ledger.release("g1")
    with sqlite3.connect(path) as other:
        for table in ("guest", "claim_key"):
            assert other.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
    other.close()


def test_release_of_an_unknown_guest_is_refused(ledger: Ledger) -> None:
    with pytest.raises(NotFound, match="g1"):
        ledger.release("g1")


def test_claim_stays_until_all_changes_are_undone(ledger: Ledger) -> None:
    claim(ledger, 1, 2)
    record = ledger.add_undo_record("g1", "move", {})
    with pytest.raises(Conflict, match="1 changes for guest g1 are not undone"):
        ledger.release("g1")
    ledger.release("g2")
    ledger.drop_undo_record(record)
    ledger.release("g1")


def test_state_survives_reopening(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1, 2)
    ledger.set_state("g1", GuestState.RUNNING)
    generation = ledger.read().generation
    with pytest.raises(Conflict):
        ledger.set_state("g1", GuestState.CREATING)
    with pytest.raises(NotFound):
        ledger.set_state("g3", GuestState.RUNNING)
    with Ledger(path) as other:
        assert [held.state for held in other.read().claims] == ["running", "creating"]
        assert other.read().generation == generation, "who owns what has not changed"


def test_concurrent_claims_get_different_resources(path: Path) -> None:
    """Each plans on what it read: the next free number. Without the generation, two would take the same."""
    lost: list[str] = []
    all_have_read = threading.Barrier(4, timeout=30)

    def work(worker: int) -> None:
        with Ledger(path) as own:
            reading, done = own.read(), 0
            all_have_read.wait()
            while done < 5:
                try:
                    take(own, make_plan(len(reading.claims), name=f"w{worker}-{done}"), reading.generation)
                    done += 1
                except LostRace as error:
                    lost.append(error.code)
                reading = own.read()

    Ledger(path).close()
    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Ledger(path) as ledger:
        claims = ledger.read().claims
        assert len(claims) == 20
        assert sorted(cpu for held in claims for cpu in held.plan.cpus) == list(range(40))
        assert ledger.read().generation == 20
    assert len(lost) >= 3, "of the first four, three must have lost"


def test_one_ledger_serves_many_threads(ledger: Ledger) -> None:
    def work(worker: int) -> None:
        for _ in range(20):
            ledger.drop_undo_record(ledger.add_undo_record(f"w{worker}", "move", {"worker": worker}))
            ledger.append_event("cleared", f"w{worker}", "")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.events()) == 80
    assert all(not ledger.undo_records(f"w{worker}") for worker in range(4))


# Undo journal


def test_journal_is_read_newest_first_and_by_owner(ledger: Ledger) -> None:
    first = ledger.add_undo_record("g1", "bind", {"address": "0000:41:10.0", "driver": None})
    ledger.add_undo_record("host", "numvfs", {"count": 0})
    last = ledger.add_undo_record("g1", "irq", {"number": 40, "cpus": "0-7"})
    assert [(record.id, record.owner, record.action, record.arguments) for record in ledger.undo_records("g1")] == [
        (last, "g1", "irq", {"number": 40, "cpus": "0-7"}),
        (first, "g1", "bind", {"address": "0000:41:10.0", "driver": None}),
    ]
    ledger.drop_undo_record(last)
    assert [record.id for record in ledger.undo_records("g1")] == [first]
    assert len(ledger.undo_records("host")) == 1


def test_durable_undo_record_waits_for_the_disk(path: Path) -> None:
    """A power cut does not undo what was written to a guest's disk."""
    statements: list[str] = []
    with Ledger(path, trace=statements.append) as ledger:
        statements.clear()
        ledger.add_undo_record("g1", "irq", {})
        assert FSYNC not in statements
        ledger.add_undo_record("g1", "disk-contents", {}, durable=True)
        assert statements.index(FSYNC) == len(statements) - 1


def test_guest_whose_disks_are_wiped_keeps_only_them(ledger: Ledger, path: Path) -> None:
    plan = make_plan(1, disks=(DiskPlan(Size(1 << 30), "serial0", PciAddress.parse("0000:44:00.0")),))
    take(ledger, plan, 0)
    ledger.set_state("g1", GuestState.DELETING)
    claim = ledger.keep_disks("g1")
    assert (claim.state, claim.plan) == (GuestState.WIPING, plan.only_disks())
    assert query(path, "SELECT kind, key FROM claim_key") == [("disk", "serial0")]
    with pytest.raises(Conflict, match="cannot claim disk serial0 for guest g2: another guest owns it"):
        take(ledger, replace(plan, name="g2"), 1)
    other = take(ledger, make_plan(1, name="g3"), 1)
    with Ledger(path) as again:
        assert again.read().claims == (claim, other)
    ledger.release("g1")
    assert take(ledger, make_plan(2, disks=plan.disks), 2)


def test_disk_checks_are_kept_until_the_claim_is_released(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1)
    check = DiskCheck("serial0", PciAddress.parse("0000:44:00.0"), "2026-11-26T10:00:00.000+00:00", "read", 1 << 30, 1 << 30)
    ledger.add_disk_check("g1", replace(check, method="format"))
    ledger.add_disk_check("g1", check)
    assert ledger.disk_checks("g1") == (check,)
    with Ledger(path) as again:
        assert again.disk_checks("g1") == (check,)
    ledger.set_state("g1", GuestState.DELETING)
    ledger.release("g1")
    assert ledger.disk_checks("g1") == ()


def test_undo_record_is_removed_once_and_its_id_is_not_reused(ledger: Ledger) -> None:
    old = ledger.add_undo_record("g1", "irq", {})
    ledger.drop_undo_record(old)
    assert ledger.add_undo_record("g1", "irq", {}) > old
    with pytest.raises(NotFound, match=f"no undo record {old}"):
        ledger.drop_undo_record(old)
    assert len(ledger.undo_records("g1")) == 1


# A stand-in for a manager: each change (a file) is recorded before, undone and forgotten later.
MANAGER = """
import sys
from pathlib import Path
from orchestrator.ledger import Ledger

ledger, changes = Ledger(Path(sys.argv[1])), Path(sys.argv[2])
for number in range(1 << 30):
    record = ledger.add_undo_record("g1", "make", {"name": str(number)})
    (changes / str(number)).touch()
    print(number, flush=True)
    if number % 3 == 0:
        (changes / str(number)).unlink()
        ledger.drop_undo_record(record)
"""


def test_journal_survives_kill(path: Path, tmp_path: Path) -> None:
    """Killed at any moment, the journal names every change that was made and not undone."""
    changes = tmp_path / "changes"
    changes.mkdir()
    for seed in range(6):
        manager = subprocess.Popen([sys.executable, "-c", MANAGER, path, changes], stdout=subprocess.PIPE)
        assert manager.stdout
        assert manager.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.05))
        manager.send_signal(signal.SIGKILL)
        manager.communicate()
        with Ledger(path) as ledger:
            recorded = {str(record.arguments["name"]) for record in ledger.undo_records("g1")}
            made = {change.name for change in changes.iterdir()}
            assert made <= recorded
            # Recorded and not made: at most the one that the kill cut short (before the change, or after it was undone).
            assert len(recorded - made) <= 1
            for record in ledger.undo_records("g1"):
                (changes / str(record.arguments["name"])).unlink(missing_ok=True)
                ledger.drop_undo_record(record.id)
        assert not list(changes.iterdir())


# Versions, quarantine


def test_version_is_never_reused(ledger: Ledger) -> None:
    claim(ledger, 1, 2)
    seen = [held.version for held in ledger.read().claims]
    seen.append(ledger.set_state("g1", GuestState.RUNNING).version)
    ledger.set_state("g2", GuestState.DELETING)
    ledger.release("g2")
    claim(ledger, 2)
    seen += [held.version for held in ledger.read().claims if held.plan.name == "g2"]
    assert len(set(seen)) == len(seen)
    assert ledger.read().claims[0].state == GuestState.RUNNING, "what was parsed before is not shown any more"


def test_restarts_are_counted(ledger: Ledger) -> None:
    claim(ledger, 1)
    ledger.set_state("g1", GuestState.RUNNING)
    assert ledger.set_state("g1", GuestState.STOPPING, restarts=3).restarts == 3
    assert ledger.set_state("g1", GuestState.STOPPED).restarts == 3


def test_quarantine_reasons_are_removed_with_the_state(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1, 2)
    with pytest.raises(Conflict, match="creating and can't become quarantined"):
        ledger.quarantine("g1", ["its VF is dirty"])
    for name in ("g1", "g2"):
        ledger.set_state(name, GuestState.DELETING)
        ledger.quarantine(name, ["its VF is dirty", "so are its pages"])
    with Ledger(path) as other:
        assert [found.name for found in other.quarantined()] == ["g1", "g2"]
        assert other.read().claims[0].state == GuestState.QUARANTINED
    ledger.set_state("g1", GuestState.DELETING)
    (found,) = ledger.quarantined()
    assert found == Quarantined("g2", found.since, ("its VF is dirty", "so are its pages"))


# Event log


def test_events_are_filtered_by_tenant(ledger: Ledger) -> None:
    ledger.append_event("claimed", "g1", "", who="alice", tenant="blue", took=0.5)
    second = ledger.append_event("claimed", "g2", "", tenant="red")
    assert ledger.events(tenant="red") == (second,)
    assert [(event.who, event.took) for event in ledger.events(tenant="blue")] == [("alice", 0.5)]
    assert len(ledger.events()) == 2
    assert ledger.last_event() == second.id


def test_events_are_announced_after_they_are_on_disk(ledger: Ledger, path: Path) -> None:
    told = []
    with Ledger(path) as other:
        ledger.subscribe(lambda event: told.append(event in other.events()))
        ledger.append_event("claimed", "g1", "")
    assert told == [True]


def test_events_are_read_in_order(ledger: Ledger) -> None:
    first = ledger.append_event("started", "g1", "on CPUs 2-3")
    second = ledger.append_event("ended", "g1", "")
    third = ledger.append_event("drifted", "host", "nic0 is back in VEPA mode")
    assert ledger.events() == (first, second, third)
    assert [event.kind for event in ledger.events(after=first.id)] == ["ended", "drifted"]
    assert ledger.events(limit=2) == (first, second)
    assert ledger.events(after=third.id) == ()
    event = ledger.events()[0]
    assert (event.subject, event.detail) == ("g1", "on CPUs 2-3")
    assert event.time.endswith("+00:00")


REWRITTEN = "INTO event (id, time, kind, subject, detail) VALUES (1, '', '', '', 'nothing happened')"


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM event", "UPDATE event SET detail = 'nothing happened'", "UPDATE OR REPLACE event SET id = 2 WHERE id = 1",
     f"REPLACE {REWRITTEN}", f"INSERT OR REPLACE {REWRITTEN}", f"INSERT {REWRITTEN}",
     f"INSERT {REWRITTEN} ON CONFLICT (id) DO UPDATE SET detail = excluded.detail"],
)  # fmt: skip
def test_events_cannot_be_changed(ledger: Ledger, path: Path, statement: str) -> None:
    events = (ledger.append_event("started", "g1", ""), ledger.append_event("ended", "g1", ""))
    with sqlite3.connect(path) as other, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute(statement)
    other.close()
    assert ledger.events() == events
    assert ledger.append_event("started", "g1", "").id == events[-1].id + 1


# Trouble


def fill(path: Path) -> None:
    """A ledger of many pages, all of them in the main file."""
    with Ledger(path) as ledger:
        claim(ledger, 1, 2)
        for number in range(200):
            ledger.append_event("stopped", "host", f"{number} " * 50)


@pytest.mark.parametrize("content", [b"this is no database at all\n" * 100, b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 4096])
def test_file_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=str(path)) as caught:
        Ledger(path)
    assert caught.value.hint
    assert path.read_bytes() == content, "what is not ours is not touched"


def test_damaged_file_is_refused(path: Path) -> None:
    fill(path)
    content = bytearray(path.read_bytes())
    assert len(content) > 10 * 4096
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = random.Random(page).randbytes(64)
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged|malformed") as caught:
        Ledger(path)
    assert str(path) in caught.value.message
    assert "move the file away" in caught.value.hint
    assert "\n" not in caught.value.message


def test_truncated_file_is_refused(path: Path) -> None:
    fill(path)
    path.write_bytes(path.read_bytes()[: 3 * 4096])
    with pytest.raises(LedgerError, match="damaged|malformed"):
        Ledger(path)


def read_roots(path: Path) -> dict[str, int]:
    """Where the first page of each table and index is in the file."""
    with sqlite3.connect(path) as other:
        rows = other.execute("SELECT name, rootpage FROM sqlite_schema WHERE rootpage").fetchall()
    other.close()
    return dict(rows)


def damage(path: Path, page: int) -> None:
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(content)


def test_damage_outside_the_event_log_is_detected_at_start(path: Path, tmp_path: Path) -> None:
    fill(path)
    roots = read_roots(path)
    checked = roots.keys() - {"event", "event_of_tenant", "event_by_age"}
    assert {"guest", "generation", "claim_key", "claim_key_of_guest", "undo", "undo_of_owner", "quarantine"} < checked
    for name in checked:
        copy = tmp_path / f"{name}.sqlite"
        copy.write_bytes(path.read_bytes())
        damage(copy, roots[name])
        before = copy.read_bytes()
        with pytest.raises(LedgerError, match="damaged|malformed") as caught:
            Ledger(copy)
        assert "move the file away" in caught.value.hint
        assert copy.read_bytes() == before, "what is damaged is not touched"


def test_start_does_not_read_the_event_log(path: Path) -> None:
    """It only grows. Damage in it is found when it is read."""
    fill(path)
    content = path.read_bytes()
    damage(path, content.index(b"100 100 100") // 4096 + 1)
    with Ledger(path) as ledger:
        assert len(ledger.read().claims) == 2
        assert len(ledger.events(limit=50)) == 50
        with pytest.raises(LedgerError, match=f"cannot read the ledger {path}: .*malformed") as caught:
            ledger.events()
        assert "move the file away" in caught.value.hint
        ledger.append_event("cleared", "g1", "")
        assert ledger.events(after=None, limit=1)[0].kind == "cleared"


# Ends with a WAL that nobody has moved into the file, as a kill leaves it.
LEFT = """
import os, sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("PRAGMA wal_autocheckpoint = 0")
for statement in sys.argv[2:]:
    other.execute(statement)
os._exit(0)
"""


def leave(path: Path, *statements: str) -> None:
    subprocess.run([sys.executable, "-c", LEFT, path, *statements], check=True)


@pytest.mark.parametrize("refused", ["newer", "damaged", "foreign"])
def test_refused_file_and_its_wal_stay_unchanged(path: Path, refused: str) -> None:
    fill(path)
    more = {"newer": "PRAGMA user_version = 99", "foreign": "PRAGMA application_id = 7", "damaged": "DELETE FROM undo"}
    leave(path, "INSERT INTO event (time, kind, subject, detail) VALUES ('', '', '', '')", more[refused])
    if refused == "damaged":
        damage(path, read_roots_beside(path)["claim_key"])
    wal = path.with_name(path.name + "-wal")
    before = path.read_bytes(), wal.read_bytes()
    assert before[1]
    with pytest.raises(LedgerError, match="newer version|damaged|malformed|not a ledger"):
        Ledger(path)
    assert (path.read_bytes(), wal.read_bytes()) == before


def read_roots_beside(path: Path) -> dict[str, int]:
    """As ``read_roots``, of a copy: who opens and closes a file moves its WAL into it."""
    copy = path.with_name("copy.sqlite")
    copy.write_bytes(path.read_bytes())
    return read_roots(copy)


def test_remaining_wal_is_read(path: Path) -> None:
    fill(path)
    leave(path, "UPDATE guest SET state = 'deleting' WHERE name = 'g1'")
    with Ledger(path) as ledger:
        assert [held.state for held in ledger.read().claims] == ["deleting", "creating"]


@pytest.mark.parametrize("name", ["with space?&#%41.sqlite", "ä.sqlite"])
def test_path_with_special_characters_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Ledger(Path(name)).close()
    assert {found.name for found in tmp_path.iterdir()} == {name, f"{name}.reserve"}


# A power cut while the file is made: half of a change is in it, and the journal that takes it back is beside it.
HALF_MADE = """
import os, sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in ("PRAGMA cache_size = 1", "BEGIN", "CREATE TABLE half (x)"):
    other.execute(statement)
for _ in range(50):
    other.execute("INSERT INTO half VALUES (?)", ("x" * 4000,))
os._exit(0)
"""


def test_file_of_an_interrupted_creation_is_completed(path: Path) -> None:
    path.parent.mkdir()
    subprocess.run([sys.executable, "-c", HALF_MADE, path], check=True)
    assert path.stat().st_size
    assert path.with_name(path.name + "-journal").stat().st_size
    with Ledger(path) as ledger:
        claim(ledger, 1)


def test_empty_file_becomes_a_new_ledger(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with Ledger(path) as ledger:
        claim(ledger, 1)


def test_unreadable_claim_is_refused(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1)
    with sqlite3.connect(path) as other:
        other.execute("UPDATE guest SET plan = '{}'")
    other.close()
    with pytest.raises(LedgerError, match="holds an unreadable claim"):
        Ledger(path)


@pytest.mark.parametrize(
    "changes", [{"tap": ""}, {"edge": EdgeMode.VEPA}, {"index": -1}, {"vlan": -1}, {"rate": -1}, {"switch_vlan": -1}]
)
def test_nic_that_is_no_vf_and_of_no_software_edge_is_refused(ledger: Ledger, path: Path, changes: dict[str, object]) -> None:
    take(ledger, make_software_plan(1), 0)
    ledger.close()
    Ledger(path).close()
    bad = make_software_plan(1, **changes)
    with sqlite3.connect(path) as other:
        other.execute("UPDATE guest SET plan = ?", (json.dumps(to_plain(bad)),))
    other.close()
    with pytest.raises(LedgerError, match="g1"):
        Ledger(path)


def test_nic_of_a_software_edge_owns_its_address(ledger: Ledger) -> None:
    take(ledger, make_software_plan(1), 0)
    same = make_software_plan(2, mac=make_plan(1).vf.mac)
    with pytest.raises(Conflict, match="Ethernet address"):
        take(ledger, same, 1)


def test_database_of_another_program_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE guest (name)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger(path)
    assert path.read_bytes() == before


def test_ledger_of_a_newer_version_is_refused(path: Path) -> None:
    fill(path)
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=f"newer version .schema 99, this one knows {len(schema.MIGRATIONS)}.") as caught:
        Ledger(path)
    assert caught.value.hint
    assert path.read_bytes() == before


def test_migration_keeps_the_content(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)

    def more(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE more (x INTEGER) STRICT")
        db.execute("INSERT INTO more VALUES (1)")

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, more))
    for _ in range(2):
        with Ledger(path) as ledger:
            assert [held.plan for held in ledger.read().claims] == [make_plan(1), make_plan(2)]
            assert query(path, "SELECT x FROM more") == [(1,)]


def test_failed_migration_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)

    def bad(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE more (x INTEGER) STRICT")
        db.execute("CREATE TABLE guest (x)")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, bad))
        with pytest.raises(LedgerError, match="guest already exists"):
            Ledger(path)
    with Ledger(path) as ledger:
        assert len(ledger.read().claims) == 2
        assert not query(path, "SELECT 1 FROM sqlite_schema WHERE name = 'more'")


def own(other: sqlite3.Connection, plan: Plan) -> None:
    """Notes what a plan claims, as schemas 1 to 4 do."""
    other.executemany("INSERT INTO claim_cpu VALUES (?, ?)", [(cpu, plan.name) for cpu in plan.cpus])
    other.execute("INSERT INTO claim_vf VALUES (?, ?)", (str(plan.vf.address), plan.name))
    other.execute("INSERT INTO claim_mac VALUES (?, ?)", (str(plan.vf.mac), plan.name))


@contextlib.contextmanager
def old_ledger(path: Path, version: int) -> Iterator[sqlite3.Connection]:
    """A file as a manager of that schema has made it."""
    path.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        schema.migrate(other, version)
        yield other


def test_ledger_of_the_first_schema_is_migrated(path: Path) -> None:
    plan = make_plan(1)
    with old_ledger(path, 1) as other:
        other.execute("INSERT INTO guest VALUES ('g1', 'stopping', ?)", (store_as_before(plan),))
        own(other, plan)
        other.execute("INSERT INTO event VALUES (7, '2026-11-22T00:00:00.000+00:00', 'created', 'g1', '')")
    with Ledger(path) as ledger:
        (held,) = ledger.read().claims
        assert held.plan == replace(plan, uuid=UUID(OLD_UUIDS[None]))
        assert (held.plan.name, held.state, held.request.size, held.owner) == (plan.name, GuestState.DELETING, plan.memory, "")
        assert ledger.events()[0].who == ""
        keys = [("cpu", "2", "g1"), ("cpu", "3", "g1"), ("mac", "02:4e:48:00:00:01", "g1"), ("vf", "0000:41:10.2", "g1")]
        assert query(path, "SELECT * FROM claim_key ORDER BY kind, key") == keys
        ledger.release("g1")
        assert query(path, "SELECT * FROM claim_key") == [], "the keys still go with their guest"


@pytest.mark.parametrize("version", [2, 3, 4])
def test_ledger_of_an_earlier_schema_is_migrated(path: Path, version: int) -> None:
    plan = make_plan(1)
    with old_ledger(path, version) as other:
        text = store_as_before(plan, serial=7, cpu_features=[])
        row = ("g1", "running", text, make_request(plan).model_dump_json(exclude_unset=True), "acme", 5, 1)
        other.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        own(other, plan)
        columns = "(id, time, kind, subject, detail, who, tenant, took)"
        values = "(7, '2026-11-22T00:00:00.000+00:00', 'started', 'g1', '', 'alice', 'acme', 0.5)"
        other.execute(f"INSERT INTO event {columns} VALUES {values}")
    for _ in range(2):
        with Ledger(path) as ledger:
            plan = replace(plan, uuid=UUID(OLD_UUIDS[7]))
            assert ledger.read().claims == (Claim(plan, GuestState.RUNNING, make_request(plan), "acme", 5, 1),)
            assert [(event.id, event.who, event.took) for event in ledger.events(limit=1)] == [(7, "alice", 0.5)]
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                query(path, "REPLACE INTO event (id, time, kind, subject, detail) VALUES (7, '', '', '', '')")
            assert ledger.append_event("cleared", "g1", "").id > 7
            with pytest.raises(Conflict, match="cannot claim CPU 3"):
                take(ledger, make_plan(2, cores=(CpuSet.parse("3-4"),)), ledger.read().generation)
    assert {name for (name,) in query(path, "SELECT name FROM sqlite_schema WHERE name LIKE 'claim%'")} == {
        "claim_key", "claim_key_of_guest",
    }  # fmt: skip


def test_creator_of_an_older_guest_is_that_of_its_last_claim(path: Path) -> None:
    with old_ledger(path, 13) as other:
        for number in (1, 2):
            plan = make_plan(number, cores=(CpuSet.parse(f"{2 * number}-{2 * number + 1}"),))
            row = (
                f"g{number}",
                "stopped",
                json.dumps(to_plain(plan)),
                make_request(plan).model_dump_json(exclude_unset=True),
                "",
                number,
                0,
            )
            other.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            other.executemany("INSERT INTO claim_key VALUES (?, ?, ?)", [(*key, plan.name) for key in list_keys(plan)])
        events = [
            ("2026-01-01", "claimed", "g1", "bob"),
            ("2026-02-01", "claimed", "g1", "alice"),
            ("2026-03-01", "started", "g1", "eve"),
        ]
        other.executemany("INSERT INTO event (time, kind, subject, who, detail) VALUES (?, ?, ?, ?, '')", events)
    for _ in range(2):
        with Ledger(path) as ledger:
            found = {claim.plan.name: (claim.created, claim.creator) for claim in ledger.read().claims}
            assert found == {"g1": ("2026-02-01", "alice"), "g2": ("", "")}, "g2 is older than the log"


def test_keys_that_an_earlier_schema_does_not_have_are_refused(path: Path) -> None:
    """Loading stays strict: a claim without its keys is not repaired by a migration."""
    plan = make_plan(1)
    with old_ledger(path, 4) as other:
        row = ("g1", "running", store_as_before(plan), make_request(plan).model_dump_json(exclude_unset=True), "", 5, 1)
        other.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        own(other, plan)
        other.execute("DELETE FROM claim_cpu WHERE cpu = 3")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="its plan and the table claim_key differ in cpu 3"):
        Ledger(path)
    assert path.read_bytes() == before


def test_file_in_place_of_the_folder_is_refused(path: Path) -> None:
    path.parent.touch()
    with pytest.raises(LedgerError, match=f"cannot open the ledger {path}") as caught:
        Ledger(path)
    assert caught.value.hint


def test_folder_in_place_of_the_file_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(LedgerError, match=f"cannot open the ledger {path}"):
        Ledger(path)


def test_ledger_locked_by_another_program_is_refused(path: Path) -> None:
    with Ledger(path, busy=0.1) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="cannot record move in the ledger .*locked") as caught:
            ledger.add_undo_record("g1", "move", {})
        assert "only one manager" in caught.value.hint
        assert ledger.read().claims == (), "reading goes on"
        other.execute("ROLLBACK")
        other.close()
        ledger.add_undo_record("g1", "move", {})


# The file may grow no more (RLIMIT_FSIZE): what a full disk does to it, without filling one.
FULL_DISK = """
import resource, sys
from pathlib import Path
from orchestrator.errors import LedgerError
from orchestrator.ledger import Ledger

path = Path(sys.argv[1])
with Ledger(path) as ledger:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    written = 0
    try:
        for _ in range(10_000):
            ledger.append_event("stopped", "host", "x" * 500)
            written += 1
    except LedgerError as error:
        print(error.code, error.message, error.hint, sep="|")
    print(len(ledger.events(limit=100_000)) == written)
    try:
        ledger.append_event("stopped", "host", "x" * 500)
    except LedgerError as error:
        print(error.code)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger.append_event("cleared", "host", "")
    print(written > 0, len(ledger.events(limit=100_000)) == written + 1)
"""


def test_full_disk_is_one_error_and_loses_nothing(path: Path) -> None:
    manager = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    lines = manager.stdout.splitlines()
    code, message, hint = lines[0].split("|")
    assert code == "ledger"
    assert message.startswith(f"cannot log to the ledger {path}: ")
    assert "full" in hint
    assert lines[1:] == ["True", "ledger", "True True"], "what was written is there, and work goes on when there is space"


def test_commit_of_claims_is_synced_and_of_events_is_not(path: Path) -> None:
    """An fsync after the commit of what must outlive a power cut. The log costs none of its own: several lines per request."""
    done: list[str] = []
    with Ledger(path, trace=lambda statement: done.append(statement.split()[0])) as ledger:

        def traced(change: Callable[[], object]) -> list[str]:
            done.clear()
            change()
            return [*done]

        assert traced(lambda: claim(ledger, 1))[-2:] == ["COMMIT", FSYNC]
        assert traced(lambda: ledger.set_state("g1", GuestState.RUNNING)) == ["UPDATE", FSYNC]
        assert traced(lambda: ledger.set_state("g1", GuestState.DELETING)) == ["UPDATE"], "on the way: no caller was answered yet"
        assert traced(lambda: ledger.quarantine("g1", ["why"]))[-2:] == ["COMMIT", FSYNC]
        # A set: SQLite names a statement again for each of its triggers.
        assert set(traced(lambda: ledger.drop_undo_record(ledger.add_undo_record("g1", "vf-mac", {})))) == {"INSERT", "DELETE"}
        assert set(traced(lambda: ledger.append_event("cleared", "g1", ""))) == {"INSERT"}
        assert traced(lambda: ledger.release("g1"))[-2:] == ["COMMIT", FSYNC]


def test_readers_do_not_wait_for_writers(path: Path) -> None:
    seen: list[int] = []

    def read() -> None:
        seen.extend(map(len, (ledger.read().claims, ledger.events(), ledger.quarantined(), ledger.undo_records("g1"))))

    def trace(statement: str) -> None:
        if statement == "COMMIT" and ledger.find("g1"):
            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            reader.join(30)

    with Ledger(path, trace=trace) as ledger:
        claim(ledger, 1)
        ledger.append_event("cleared", "g1", "")
        ledger.release("g1")
        assert seen == [1, 1, 0, 0], "what is not committed is not seen either"
        assert ledger.read().claims == ()


def test_failed_write_leaves_claims_unchanged(ledger: Ledger, path: Path) -> None:
    claim(ledger, 1)
    before = ledger.read()
    with sqlite3.connect(path) as other:
        for change in ("UPDATE", "INSERT", "DELETE"):
            other.execute(f"CREATE TRIGGER no_{change} BEFORE {change} ON guest BEGIN SELECT RAISE(ABORT, 'not now'); END")
    for try_to in (lambda: ledger.set_state("g1", GuestState.RUNNING), lambda: claim(ledger, 2), lambda: ledger.release("g1")):
        with pytest.raises(LedgerError, match="not now"):
            try_to()
        assert ledger.read() == before
    with sqlite3.connect(path) as other:
        for change in ("UPDATE", "INSERT", "DELETE"):
            other.execute(f"DROP TRIGGER no_{change}")
    other.close()
    assert ledger.set_state("g1", GuestState.RUNNING).version > before.claims[0].version
    claim(ledger, 2)


@pytest.mark.parametrize("change", ["set_state", "release", "quarantine"])
def test_changes_by_another_program_are_detected(ledger: Ledger, path: Path, change: str) -> None:
    claim(ledger, 1, 2)
    ledger.set_state("g1", GuestState.DELETING)
    changes = {
        "set_state": lambda: ledger.set_state("g1", GuestState.DELETING),
        "release": lambda: ledger.release("g1"),
        "quarantine": lambda: ledger.quarantine("g1", ["why"]),
    }
    with Ledger(path) as other:
        theirs = other.set_state("g1", GuestState.DELETING)
        other.release("g2")
    with pytest.raises(LostRace, match="guest g1 was changed by another program"):
        changes[change]()
    assert ledger.read().claims == (theirs,)
    changes[change]()


STORED = (
    '{"name": "g1", "cores": ["2-3"], "node": 0, "page_size": 2097152, "pages": 128, "nics": [{"pf": "0000:41:00.0", '
    '"interface": "nic0", "index": 1, "address": "0000:41:10.2", "mac": "02:4e:48:00:00:01", "edge": "vepa", "network": "", '
    '"vlan": 0, "rate": 0, "tap": "", "switch_vlan": 0}], "image": {"name": "minimal", '
    '"hash": "abc"}, "cmdline": "quiet", "cpu_features": ["topoext"], "uuid": "0b0b0b0b-0000-4000-8000-000000000000", '
    '"disks": [], "iommu": true, "caches": null}'
)


def test_stored_plan_of_this_version_is_read() -> None:
    """The format of ledgers in use: it must stay readable."""
    expected = make_plan(
        1, image=ImageRef("minimal", "abc"), cmdline="quiet", cpu_features=("topoext",),
        uuid=UUID("0b0b0b0b-0000-4000-8000-000000000000"),
    )  # fmt: skip
    assert plan_from_json(json.loads(STORED)) == expected
    assert json.loads(STORED) == to_plain(expected)


def test_stored_plan_of_a_version_with_vfs_only_is_read() -> None:
    fields = json.loads(STORED)
    del fields["iommu"]
    fields["nics"] = [{name: nic[name] for name in ("pf", "interface", "index", "address", "mac")} for nic in fields["nics"]]
    assert plan_from_json(fields) == plan_from_json(json.loads(STORED))


@pytest.mark.parametrize("serial", OLD_UUIDS)
def test_stored_plan_of_earlier_versions_is_read(serial: int | None) -> None:
    fields = json.loads(store_as_before(make_plan(1), **({} if serial is None else {"serial": serial})))
    assert plan_from_json(fields) == make_plan(1, uuid=UUID(OLD_UUIDS[serial]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vf": {}}, "nics.0.pf: missing"),
        ({"vf": None}, "nics.0: not an object"),
        ({"serial": "1"}, "serial: not of type int"),
        ({"image": 3}, "image.name: not of type str"),
        ({"more": 1}, "more: unknown field"),
    ],
)
def test_damaged_plan_of_earlier_versions_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_from_json(json.loads(store_as_before(make_plan(1), **change)))
