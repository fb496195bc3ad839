"""Claims of guests and their states, with a copy in memory.

A claim, or a state of ``SETTLED``, is on the disk when the method returns. Other states may be lost in a power cut: no caller has
received a reply yet, and a power cut ends all guests.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.errors import Conflict, LedgerError, LostRace
from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import Cache, find_changed_networks, list_keys, load, parse_check, parse_reasons, read_rows
from orchestrator.model.claim import Claim, ClaimSnapshot, Quarantined
from orchestrator.model.disengagement import Disengagement
from orchestrator.model.disk import DiskCheck
from orchestrator.model.event import utc_now
from orchestrator.model.network import Network
from orchestrator.model.plain import to_plain
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import SETTLED, GuestState, check_transition

_log = logging.getLogger(__name__)

T = TypeVar("T")

_KEY_NAMES = {"cpu": "CPU", "vf": "VF", "mac": "Ethernet address", "disk": "disk", "channel": "VLAN", "cache": "cache way"}


@dataclass(frozen=True)
class PendingClaim:
    """A claim that is written but not yet on the disk: do nothing for its guest before `wait` has returned."""

    claim: Claim
    _number: int
    _claims: Claims

    def wait(self) -> Claim:
        """Returns when the claim is on the disk. Raises LedgerError if the fsync failed; the claim is withdrawn then."""
        return self._claims.wait_claimed(self.claim, self._number)

    def withdraw(self) -> None:
        """For a claim that cannot be used. No-op if it is withdrawn. Does not raise: see `Claims.withdraw`."""
        self._claims.withdraw(self.claim)


class Claims:
    def __init__(self, database: Database) -> None:
        self._database = database
        with database.writing("read", starts_work=False) as db:
            self._cache = self._load(db)

    def read(self) -> ClaimSnapshot:
        cache = self._cache  # read once: writers replace it
        return ClaimSnapshot(cache.generation, tuple(cache.claims.values()))

    def find(self, name: str) -> Claim | None:
        return self._cache.claims.get(name)

    def begin_claim(self, plan: Plan, generation: int, request: GuestRequest, owner: str = "", creator: str = "") -> PendingClaim:
        """Claims everything that the plan names, or nothing. Readers see the claim immediately, in the state CREATING.

        Args:
            generation: from the `read` on which the plan is based.
            owner: the tenant, empty for the host's own guests.
            creator: the name of the caller.

        Raises:
            LostRace: claims have changed since; read again, plan again.
            Conflict: the name is taken, or a key (CPU, VF, MAC address) belongs to another guest.
        """
        name, created = plan.name, utc_now()
        texts = (json.dumps(to_plain(plan)), request.model_dump_json(exclude_unset=True))

        def work(db: sqlite3.Connection, cache: Cache) -> Claim:
            if name in cache.claims:
                raise Conflict(f"there is a guest named {name} already", "choose another name, or delete that guest first")
            if changed := find_changed_networks(plan, cache.networks, owner):
                raise LostRace(f"{changed[0]} has changed while guest {name} was planned", "try again")
            statement = "UPDATE generation SET number = ?1 + 1, version = max(version, ?2) WHERE number = ?1"
            if not db.execute(statement, (generation, cache.version)).rowcount:
                raise LostRace(f"claims have changed while guest {name} was planned (generation {generation})", "try again")
            values = (name, GuestState.CREATING, *texts, owner, cache.version, 0, created, creator)
            db.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            _insert_keys(db, plan)
            claim = Claim(plan, GuestState.CREATING, request, owner, cache.version, created=created, creator=creator)
            cache.generation, cache.claims = generation + 1, dict(sorted({**cache.claims, name: claim}.items()))
            return claim

        claim, number = self._change(f"write the claim of {name} to", work, starts_work=True)
        return PendingClaim(claim, number, self)

    def wait_claimed(self, claim: Claim, number: int) -> Claim:
        try:
            self._database.wait_synced(number)
        except LedgerError:
            self.withdraw(claim)
            raise
        return claim

    def release(self, name: str) -> None:
        """Keeps the generation: plans that were made before can still be claimed. Raises Conflict while undo records exist."""

        def work(db: sqlite3.Connection, cache: Cache) -> None:
            ((records,),) = read_rows(db, "SELECT count(*) FROM undo WHERE owner = ?", name)
            if records:
                raise Conflict(f"{records} changes for guest {name} are not undone yet", "repeat the guest's cleanup")
            _delete(db, cache, cache.get(name))

        _, number = self._change(f"release the claim of {name} in", work)
        self._database.wait_synced(number)

    def set_state(self, name: str, state: GuestState, *, restarts: int | None = None) -> Claim:
        """Raises NotFound without a claim, Conflict as `check_transition`. ``restarts``: None keeps the count.

        A power cut may revert a state that is not in ``SETTLED``.
        """

        def work(db: sqlite3.Connection, cache: Cache) -> Claim:
            return _set_state(db, cache, name, state, restarts)

        # Only STARTING starts new work; the other states belong to a stop, or report what has happened.
        what = f"write the state {state} of {name} to"
        starts = state == GuestState.STARTING  # more statements: host key and disengagement belong to the last start
        claim, number = self._change(what, work, starts_work=starts, one_statement=not starts)
        if state in SETTLED:
            self._database.wait_synced(number)
        return claim

    def record_host_key(self, claim: Claim, key: str) -> None:
        """Stores the SSH host key that a guest has reported, until its next start; nothing if its state has changed since.

        Not a change of the guest: the version stays.
        """

        def work(db: sqlite3.Connection, cache: Cache) -> None:
            now = cache.claims.get(claim.plan.name)
            if now and (now.plan.uuid, now.version) == (claim.plan.uuid, claim.version):
                db.execute("INSERT OR REPLACE INTO host_key VALUES (?, ?)", (claim.plan.name, key))
                cache.claims[claim.plan.name] = replace(now, host_key=key)

        self._change(f"write the host key of {claim.plan.name} to", work, starts_work=True, one_statement=True)

    def record_disengagement(self, claim: Claim, end: Disengagement) -> Claim | None:
        """Stores the end of a guest's boot, until its next start; None if its state has changed since, or it is stored already.

        Not a change of the guest: the version stays.
        """

        def work(db: sqlite3.Connection, cache: Cache) -> Claim | None:
            now = cache.claims.get(claim.plan.name)
            if not now or (now.plan.uuid, now.version) != (claim.plan.uuid, claim.version) or now.disengaged:
                return None
            db.execute("INSERT OR REPLACE INTO disengagement VALUES (?, ?)", (claim.plan.name, json.dumps(to_plain(end))))
            after = cache.claims[claim.plan.name] = replace(now, disengaged=end)
            return after

        return self._change(f"write the disengagement of {claim.plan.name} to", work, one_statement=True)[0]

    def keep_disks(self, name: str) -> Claim:
        """Sets the state WIPING, and releases everything except the disks that the host wipes."""

        def work(db: sqlite3.Connection, cache: Cache) -> Claim:
            claim = _set_state(db, cache, name, GuestState.WIPING)
            after = replace(claim, plan=claim.plan.only_disks())
            db.execute("UPDATE guest SET plan = ? WHERE name = ?", (json.dumps(to_plain(after.plan)), name))
            gone = set(list_keys(claim.plan)) - set(list_keys(after.plan))
            db.executemany("DELETE FROM claim_key WHERE guest = ? AND kind = ? AND key = ?", [(name, *key) for key in gone])
            cache.claims[name] = after
            return after

        return self._change(f"release all but the disks of {name} in", work)[0]

    def networks(self) -> Mapping[str, Network]:
        """By name."""
        return self._cache.networks

    def create_network(self, choose: Callable[[Mapping[str, Network]], Network]) -> tuple[Network, bool]:
        """Adds the network that ``choose`` returns for the existing ones; False if it is one of them.

        Raises Conflict if its VLAN is taken, and what ``choose`` raises.
        """

        def work(db: sqlite3.Connection, cache: Cache) -> tuple[Network, bool]:
            network = choose(cache.networks)
            if cache.networks.get(network.name) == network:
                return network, False
            try:
                db.execute("INSERT INTO network VALUES (?, ?, ?)", (network.name, network.vlan, network.owner))
            except sqlite3.IntegrityError:
                what = f"cannot create network {network.name}: its name or VLAN {network.vlan} is taken"
                raise Conflict(what, "choose another") from None
            cache.networks = dict(sorted({**cache.networks, network.name: network}.items()))
            return network, True

        result, number = self._change("add a network to", work, starts_work=True)
        self._database.wait_synced(number)
        return result

    def delete_network(self, network: Network, check: Callable[[Sequence[str]], object]) -> None:
        """``check`` gets the names of the guests that own a NIC in the network, and raises to keep it.

        Raises LostRace if the network has changed.
        """

        def work(db: sqlite3.Connection, cache: Cache) -> None:
            check([name for name, claim in cache.claims.items() if any(nic.network == network.name for nic in claim.plan.nics)])
            statement = "DELETE FROM network WHERE name = ? AND vlan = ? AND owner = ?"
            if not db.execute(statement, (network.name, network.vlan, network.owner)).rowcount:
                raise LostRace(f"network {network.name} was changed meanwhile", "try again")
            cache.networks = {name: kept for name, kept in cache.networks.items() if name != network.name}

        _, number = self._change(f"delete network {network.name} from", work)
        self._database.wait_synced(number)

    def add_disk_check(self, name: str, check: DiskCheck) -> None:
        statement = "INSERT OR REPLACE INTO disk_check VALUES (?, ?, ?)"
        self._database.write(f"record a disk check of {name} in", statement, name, check.disk, json.dumps(to_plain(check)))

    def disk_checks(self, name: str) -> tuple[DiskCheck, ...]:
        """How the guest's disks were verified before it got them."""
        with self._database.reading() as db:
            rows = read_rows(db, "SELECT record FROM disk_check WHERE guest = ? ORDER BY disk", name)
            return tuple(parse_check(name, text) for (text,) in rows)

    def quarantine(self, name: str, reasons: Sequence[str]) -> None:
        def work(db: sqlite3.Connection, cache: Cache) -> None:
            _set_state(db, cache, name, GuestState.QUARANTINED)
            values = (name, utc_now(), json.dumps(list(reasons)))
            db.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)", values)

        _, number = self._change(f"put {name} into quarantine in", work)
        self._database.wait_synced(number)

    def quarantined(self) -> tuple[Quarantined, ...]:
        with self._database.reading() as db:
            # The reasons of an earlier quarantine stay in the table.
            tables = "quarantine JOIN guest USING (name) WHERE state = 'quarantined'"
            rows = read_rows(db, f"SELECT name, since, reasons FROM {tables} ORDER BY name")
            return tuple(Quarantined(name, since, parse_reasons(name, reasons)) for name, since, reasons in rows)

    def _change(
        self,
        what: str,
        work: Callable[[sqlite3.Connection, Cache], T],
        *,
        starts_work: bool = False,
        one_statement: bool = False,
    ) -> tuple[T, int]:
        """One transaction, in the file and in memory; also returns its number for `Database.wait_synced`.

        ``one_statement``: SQLite executes a single statement as a transaction.
        """

        def attempt() -> tuple[Cache, T]:
            cache = Cache(self._cache.generation, self._cache.version + 1, dict(self._cache.claims), self._cache.networks)
            try:
                with nullcontext() if one_statement else self._database.transaction():
                    return cache, work(db, cache)
            except LostRace:
                # Another program has changed the file.
                self._cache = self._load(db)
                raise

        with self._database.writing(what, starts_work=starts_work) as db:
            cache, result = attempt() if starts_work else self._database.with_reserve(attempt)
            # Checked again: a change is lost if the file was deleted meanwhile.
            self._database.check_files()
            self._cache = cache
            return result, self._database.note_written()

    def _load(self, db: sqlite3.Connection) -> Cache:
        # In one transaction: another program may commit between two statements.
        db.execute("BEGIN")
        try:
            return load(db, self._database.path)
        finally:
            db.execute("COMMIT")

    def withdraw(self, claim: Claim) -> None:
        """If this fails, the claim stays in CREATING, and the next reconciliation undoes it."""

        def work(db: sqlite3.Connection, cache: Cache) -> None:
            if cache.claims.get(claim.plan.name) == claim:
                _delete(db, cache, claim)

        try:
            self._change(f"withdraw the claim of {claim.plan.name} in", work)
        except LedgerError as error:
            _log.error("%s", error)


def _delete(db: sqlite3.Connection, cache: Cache, claim: Claim) -> None:
    name = claim.plan.name
    _check_found(db.execute("DELETE FROM guest WHERE name = ? AND version = ?", (name, claim.version)), name)
    db.execute("UPDATE generation SET version = max(version, ?)", (cache.version,))
    del cache.claims[name]


def _set_state(db: sqlite3.Connection, cache: Cache, name: str, state: GuestState, restarts: int | None = None) -> Claim:
    before = cache.get(name)
    check_transition(name, before.state, state)
    count = before.restarts if restarts is None else restarts
    after = replace(before, state=state, restarts=count, version=cache.version, previous=before.version)
    statement = "UPDATE guest SET state = ?, restarts = ?, version = ? WHERE name = ? AND version = ?"
    values = (after.state, after.restarts, after.version, name, before.version)
    _check_found(db.execute(statement, values), name)
    if state == GuestState.STARTING:
        if after.host_key:
            db.execute("DELETE FROM host_key WHERE guest = ?", (name,))
        if after.disengaged:
            db.execute("DELETE FROM disengagement WHERE guest = ?", (name,))
        after = replace(after, host_key="", disengaged=None)
    cache.claims[name] = after
    return after


def _insert_keys(db: sqlite3.Connection, plan: Plan) -> None:
    """One statement: after each statement the thread may wait for the interpreter's lock."""
    text = json.dumps(list_keys(plan))
    columns = "json_extract(value, '$[0]') AS kind, json_extract(value, '$[1]') AS key"
    try:
        db.execute(f"INSERT INTO claim_key SELECT {columns}, ? FROM json_each(?)", (plan.name, text))
    except sqlite3.IntegrityError:
        wanted = f"(SELECT {columns} FROM json_each(?))"
        taken = read_rows(db, f"SELECT kind, key FROM claim_key JOIN {wanted} USING (kind, key)", text)
        if not taken:
            raise
        kind, key = taken[0]
        # The owner is not named: it may be another tenant's guest.
        what = f"{_KEY_NAMES.get(kind, kind)} {key}"
        raise Conflict(f"cannot claim {what} for guest {plan.name}: another guest owns it") from None


def _check_found(cursor: sqlite3.Cursor, name: str) -> None:
    if not cursor.rowcount:
        raise LostRace(f"guest {name} was changed by another program", "try again")
