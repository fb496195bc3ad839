"""What the ledger's file holds, as values. A file is accepted whole or refused: what a lost claim names could be given twice."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import LedgerError, NotFound
from orchestrator.ledger.schema import DAMAGED
from orchestrator.model.claim import Claim
from orchestrator.model.plan import Plan, plan_from_json
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState

# Far from what SQLite can hold (2^63 - 1), as each change adds one.
_HIGHEST = 1 << 62

_UNREADABLE = "a claim that can't be read, of guest"


@dataclass
class Cache:
    """The claims and the two counters in the file.

    Attributes:
        generation: grows with each claim.
        version: of the guest that was changed last. Of all guests together, so that a new guest never has the version that was
            seen of an older one of its name.
        claims: by guest name, in its order.
    """

    generation: int
    version: int
    claims: dict[str, Claim]

    def get(self, name: str) -> Claim:
        if name not in self.claims:
            raise NotFound(f"there is no claim of a guest named {name}", "`nohype guest list` shows all")
        return self.claims[name]


def load(db: sqlite3.Connection, path: Path) -> Cache:
    """Reads and compares all but the events.

    Args:
        path: of the ledger, for error messages.

    Raises:
        LedgerError: something can't be read, or differs from another part of the file.
        sqlite3.Error: the file can't be read.
    """
    try:
        return _load(db)
    except ValueError as error:
        raise LedgerError(f"the ledger {path} holds {error}", DAMAGED) from None


def _load(db: sqlite3.Connection) -> Cache:
    counters = read_rows(db, "SELECT number, version FROM generation")
    if len(counters) != 1:
        raise ValueError(f"no counters of its claims: the table generation has {len(counters)} rows")
    ((generation, version),) = counters
    _check_number(generation, "a number of claims of")
    _check_number(version, "a number of changes of")
    claims = {}
    for name, *fields in read_rows(db, "SELECT name, plan, state, request, owner, version, restarts FROM guest ORDER BY name"):
        claims[name] = _parse_claim(name, *fields)
    _check_keys(db, claims)
    for name, text in read_rows(db, "SELECT name, reasons FROM quarantine"):
        parse_reasons(name, text)
    for owner, text in read_rows(db, "SELECT owner, arguments FROM undo"):
        parse_arguments(owner, text)
    return Cache(generation, max((version, *(claim.version for claim in claims.values()))), claims)


def parse_reasons(name: str, text: str) -> tuple[str, ...]:
    reasons = _parse_json(text, f"reasons of {name}'s quarantine")
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise ValueError(f"reasons of {name}'s quarantine that are not a list of sentences")
    return tuple(reasons)


def parse_arguments(owner: str, text: str) -> dict[str, object]:
    arguments = _parse_json(text, f"an undo record of {owner}")
    if not isinstance(arguments, dict):
        raise ValueError(f"an undo record of {owner} that does not name its arguments")
    return arguments


def read_rows(db: sqlite3.Connection, statement: str, *values: object) -> Sequence[Any]:
    """All rows at once: readers and writers do not wait for each other's loops."""
    return db.execute(statement, values).fetchall()


def _parse_claim(name: str, plan_text: str, state: str, request: str, owner: str, version: int, restarts: int) -> Claim:
    try:
        asked = GuestRequest.model_validate_json(request)
        plan = plan_from_json(_parse_json(plan_text, "a plan"))
        claim = Claim(plan, GuestState(state), asked, owner, version, restarts)
    except ValueError as error:
        raise ValueError(f"{_UNREADABLE} {name}: {' '.join(str(error).split())}") from None
    for what, other in (("plan", plan.name), ("request", asked.name)):
        if other != name:
            raise ValueError(f"{_UNREADABLE} {name}: its {what} is that of {other!r}")
    if not all(plan.cores) or not plan.cores or min(plan.pages, plan.node + 1, *(nic.index + 1 for nic in plan.nics)) <= 0:
        raise ValueError(f"{_UNREADABLE} {name}: its plan has no cores, no pages, or a number below 0")
    _check_number(version, f"for guest {name} the version")
    _check_number(restarts, f"for guest {name} the count of restarts")
    return claim


def list_keys(plan: Plan) -> list[tuple[str, str]]:
    """What a plan claims of things that exist once: (kind, key) of each row in the table claim_key."""
    vfs, macs = [str(nic.address) for nic in plan.nics], [str(nic.mac) for nic in plan.nics]
    named = {"cpu": [str(cpu) for cpu in plan.cpus], "vf": vfs, "mac": macs}
    return [(kind, key) for kind, keys in named.items() for key in keys]


def _check_keys(db: sqlite3.Connection, claims: dict[str, Claim]) -> None:
    """The rows that keep a thing from being claimed twice must be those of the plans."""
    rows: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for kind, key, guest in read_rows(db, "SELECT kind, key, guest FROM claim_key"):
        rows[guest].add((kind, key))
    for name in sorted(rows.keys() | claims.keys()):
        planned = set(list_keys(claims[name].plan)) if name in claims else set()
        if rows[name] != planned:
            named = ", ".join(" ".join(pair) for pair in sorted(rows[name] ^ planned)[:8])
            raise ValueError(f"{_UNREADABLE} {name}: its plan and the table claim_key differ in {named}")


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{what}, nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what}, not JSON: {error}") from None


def _check_number(number: object, what: str) -> None:
    if not isinstance(number, int) or not 0 <= number <= _HIGHEST:
        raise ValueError(f"{what} {number}, which is not from 0 to {_HIGHEST}")
