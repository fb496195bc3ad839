"""A ledger that is not whole is refused with one message, and neither it nor what a kill left beside it is touched."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, LedgerError
from orchestrator.guests.recovery import check_housekeeping
from orchestrator.ledger import Claim, Ledger, schema
from orchestrator.model.plain import to_plain
from orchestrator.model.state import GuestState
from orchestrator.values import CpuSet
from tests.unit.test_ledger import claim, leave, make_plan

DEEP = "[" * 20_000 + "]" * 20_000
DEEP_OBJECT = '{"a":' * 10_000
MOST = 2**63 - 1
DIFFER = "its plan and the table claim_key differ in"


def set_plan(**fields: object) -> str:
    """Changes g1's plan, in SQL."""
    text = json.dumps({**to_plain(make_plan(1)), **fields}).replace("'", "''")
    return f"UPDATE guest SET plan = '{text}' WHERE name = 'g1'"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "ledger.sqlite"
    with Ledger(file) as ledger:
        claim(ledger, 1, 2)
        ledger.set_state("g2", GuestState.DELETING)
        ledger.quarantine("g2", ["it is dirty"])
        ledger.add_undo_record("g1", "move", {"x": 1})
    return file


def read_all(path: Path) -> list[bytes]:
    return [path.read_bytes(), path.with_name(f"{path.name}-wal").read_bytes()]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (f"UPDATE guest SET plan = '{DEEP}' WHERE name = 'g1'", "of guest g1: a plan, nested too deeply"),
        (f"UPDATE guest SET plan = '{DEEP_OBJECT}' WHERE name = 'g1'", "of guest g1: a plan, nested too deeply"),
        (f"UPDATE guest SET request = '{DEEP}' WHERE name = 'g1'", "of guest g1: "),
        ("UPDATE guest SET plan = 'x' WHERE name = 'g1'", "of guest g1: a plan, not JSON"),
        (f"UPDATE guest SET plan = '{'9' * 5000}' WHERE name = 'g1'", "of guest g1: a plan, not JSON"),
        ("UPDATE guest SET plan = '[]' WHERE name = 'g1'", "of guest g1: "),
        (f"UPDATE guest SET version = {MOST} WHERE name = 'g1'", f"the version of guest g1: {MOST}"),
        ("UPDATE guest SET version = -1 WHERE name = 'g1'", "the version of guest g1: -1"),
        (f"UPDATE guest SET restarts = {MOST} WHERE name = 'g1'", "the count of restarts of guest g1"),
        ("INSERT INTO core_start VALUES ('g1', '{}')", "an unreadable count of the cores of g1: boot: missing"),
        (f"INSERT INTO core_start VALUES ('g1', '{DEEP}')", "count of the cores of g1, nested too deeply"),
        (f"UPDATE generation SET number = {MOST}", f"the generation {MOST}"),
        (f"UPDATE generation SET version = {MOST}", f"the version {MOST}"),
        ("DELETE FROM generation", "0 rows in the table generation"),
        (set_plan(name="g2"), "of guest g1: its plan names guest 'g2'"),
        (set_plan(name="keep"), "of guest g1: its plan names guest 'keep'"),
        ("UPDATE guest SET request = replace(request, '\"g1\"', '\"g3\"') WHERE name = 'g1'", "its request names guest 'g3'"),
        (set_plan(pages=0), "its plan has no cores, no pages, or a negative number"),
        (set_plan(node=-1), "its plan has no cores"),
        (set_plan(cores=[]), "its plan has no cores"),
        (set_plan(cores=["2-3,8"]), f"of guest g1: {DIFFER} cpu 8"),
        ("DELETE FROM claim_key WHERE key = '3'", f"of guest g1: {DIFFER} cpu 3"),
        ("UPDATE claim_key SET guest = 'g2' WHERE key = '3'", f"of guest g1: {DIFFER} cpu 3"),
        ("INSERT INTO claim_key VALUES ('cpu', '40', 'ghost')", f"of guest ghost: {DIFFER} cpu 40"),
        ("INSERT INTO claim_key VALUES ('disk', 'nvme1n1', 'g1')", f"of guest g1: {DIFFER} disk nvme"),
        ("DELETE FROM claim_key WHERE guest = 'g2' AND kind = 'vf'", f"of guest g2: {DIFFER} vf 0000:41:10.4"),
        ("UPDATE claim_key SET key = 'x' WHERE guest = 'g1' AND kind = 'mac'", f"of guest g1: {DIFFER} mac 02"),
        (f"UPDATE quarantine SET reasons = '{DEEP}'", "reasons of g2's quarantine, nested too deeply"),
        ("UPDATE quarantine SET reasons = '{}'", "reasons of g2's quarantine that are not a list of texts"),
        ("UPDATE quarantine SET reasons = '[1]'", "reasons of g2's quarantine that are not a list of texts"),
        (f"UPDATE undo SET arguments = '{DEEP}'", "an undo record of g1, nested too deeply"),
        ("UPDATE undo SET arguments = '[]'", "an undo record of g1 whose arguments are not a JSON object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inconsistent_ledger_is_refused(path: Path, statement: str, said: str, *, checkpointed: bool) -> None:
    """Whether it is in the file, or in the WAL that a kill has left."""
    if checkpointed:
        with sqlite3.connect(path) as other:
            other.execute(statement)
        other.close()
        leave(path, "UPDATE undo SET owner = owner")
    else:
        leave(path, statement)
    before = read_all(path)
    assert before[1]
    for _ in range(2):
        with pytest.raises(LedgerError) as caught:
            Ledger(path)
        assert said in caught.value.message
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 2000
        assert "move the file away" in caught.value.hint
        assert read_all(path) == before


def refuse(path: Path, said: str) -> None:
    before = path.read_bytes()
    with pytest.raises(LedgerError) as caught:
        Ledger(path)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert "move the file away" in caught.value.hint
    assert path.read_bytes() == before


def test_schema_that_is_not_text_is_refused(path: Path) -> None:
    """SQLite's message quotes it."""
    content = path.read_bytes()
    assert content.count(b"CREATE TABLE claim_key (kind TEXT") == 1
    path.write_bytes(content.replace(b"CREATE TABLE claim_key (kind TEXT", b"CREATE TABLE claim_key (kind \xff\xffXT"))
    refuse(path, "its schema is not in UTF-8")


def test_unknown_state_is_refused(path: Path) -> None:
    """SQLite quotes the constraint, which has several lines."""
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA ignore_check_constraints = 1")
        other.execute("UPDATE guest SET state = 'x' WHERE name = 'g1'")
    other.close()
    refuse(path, "CHECK constraint failed: state IN ('creating', ")


def test_claims_that_the_configuration_forbids_are_refused(path: Path) -> None:
    """Housekeeping CPUs that are a guest's, as the daemon finds out: put back, it starts with what was there."""
    leave(path, "UPDATE guest SET restarts = 3 WHERE name = 'g1'")
    before = read_all(path)

    def accept(claims: Sequence[Claim]) -> None:
        assert [(one.plan.name, one.restarts) for one in claims] == [("g1", 3), ("g2", 0)]
        check_housekeeping(claims, CpuSet.parse("0-2"))

    with pytest.raises(Conflict, match="CPUs 2 are owned by guest g1"):
        Ledger(path, accept=accept)
    assert read_all(path) == before
    with Ledger(path, accept=lambda claims: check_housekeeping(claims, CpuSet.parse("0-1"))) as ledger:
        assert len(ledger.read().claims) == 2


def test_ledger_that_cannot_be_migrated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as other:
        schema.migrate(other, 1)
        other.execute("INSERT INTO guest VALUES ('g1', 'running', ?)", (DEEP,))
    other.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="cannot migrate the ledger .* from schema 1"):
        Ledger(path)
    assert path.read_bytes() == before


def test_start_writes_nothing(path: Path) -> None:
    """So it needs no space, and wears out no disk."""
    before = path.read_bytes()
    for _ in range(2):
        with Ledger(path) as ledger:
            assert path.with_name(f"{path.name}-wal").stat().st_size == 0
            assert len(ledger.read().claims) == 2
        assert path.read_bytes() == before
