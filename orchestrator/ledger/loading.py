"""Reads the ledger's file. A file is accepted whole or refused: resources of a lost claim could be allocated twice."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import LedgerError, NotFound
from orchestrator.ledger.schema import DAMAGED, check_file
from orchestrator.model.claim import Claim
from orchestrator.model.core_start import CoreStart
from orchestrator.model.disengagement import Disengagement
from orchestrator.model.disk import DiskCheck
from orchestrator.model.network import MAX_VLAN, MIN_VLAN, Network, check_network_name, check_owner
from orchestrator.model.plain import from_plain
from orchestrator.model.plan import DiskPlan, Plan, plan_from_json
from orchestrator.model.request import parse_stored_request
from orchestrator.model.state import GuestState
from orchestrator.model.switch import Switch

# Far below SQLite's maximum (2^63 - 1): each change adds one.
_HIGHEST = 1 << 62

_MAY_BE_REDUCED = (GuestState.WIPING, GuestState.DELETING, GuestState.QUARANTINED)
_UNREADABLE = "an unreadable claim of guest"
_Record = TypeVar("_Record")


@dataclass
class Cache:
    """The claims and networks, by name in its order, and the two counters in the file.

    Attributes:
        version: grows with each change of any guest, so a new guest never has a version of an older guest with the same name.
    """

    generation: int  # grows with each claim
    version: int
    claims: dict[str, Claim]
    networks: dict[str, Network]

    def get(self, name: str) -> Claim:
        if name not in self.claims:
            raise NotFound(f"there is no claim of a guest named {name}", "`nohype guest list` shows all")
        return self.claims[name]


def read_claims(path: Path, *, busy: float = 10.0) -> tuple[Claim, ...]:
    """The claims in a ledger that a manager may have open, or that an earlier version wrote. Writes no claim.

    Raises LedgerError if the file cannot be read, or is not accepted as a whole; ``busy`` as of `check_file`.
    """
    claims: list[Claim] = []
    try:
        check_file(path, busy, lambda copy: claims.extend(load(copy, path).claims.values()))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise LedgerError(f"cannot read the ledger {path}: {text}", "run as root, and check the path") from None
    return tuple(claims)


def load(db: sqlite3.Connection, path: Path) -> Cache:
    """Reads and compares everything except the events. ``path`` is for error messages.

    Raises:
        LedgerError: a value cannot be parsed, or contradicts another part of the file.
        sqlite3.Error: the file cannot be read.
    """
    try:
        return _load(db)
    except ValueError as error:
        raise LedgerError(f"the ledger {path} holds {error}", DAMAGED) from None


def _load(db: sqlite3.Connection) -> Cache:
    counters = read_rows(db, "SELECT number, version FROM generation")
    if len(counters) != 1:
        raise ValueError(f"{len(counters)} rows in the table generation, expected 1")
    ((generation, version),) = counters
    _check_number(generation, "the generation")
    _check_number(version, "the version")
    claims = {}
    keys: dict[str, str] = dict(read_rows(db, "SELECT guest, key FROM host_key"))
    ends = {name: _parse_disengagement(name, text) for name, text in read_rows(db, "SELECT guest, record FROM disengagement")}
    columns = "name, plan, state, request, owner, version, restarts, created, creator"
    for name, *fields in read_rows(db, f"SELECT {columns} FROM guest ORDER BY name"):
        claims[name] = replace(_parse_claim(name, *fields), host_key=keys.get(name, ""), disengaged=ends.get(name))
    _check_keys(db, claims)
    networks = {name: _parse_network(name, *rest) for name, *rest in read_rows(db, "SELECT name, vlan, owner FROM network")}
    _check_networks(claims, networks)
    for name, text in read_rows(db, "SELECT name, reasons FROM quarantine"):
        parse_reasons(name, text)
    for guest, text in read_rows(db, "SELECT guest, record FROM disk_check"):
        parse_check(guest, text)
    for guest, text in read_rows(db, "SELECT guest, record FROM core_start"):
        parse_core_start(guest, text)
    for name, text in read_rows(db, "SELECT name, record FROM switch"):
        parse_switch(name, text)
    for owner, text in read_rows(db, "SELECT owner, arguments FROM undo"):
        parse_arguments(owner, text)
    return Cache(generation, max((version, *(claim.version for claim in claims.values()))), claims, networks)


def parse_reasons(name: str, text: str) -> tuple[str, ...]:
    reasons = _parse_json(text, f"reasons of {name}'s quarantine")
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise ValueError(f"reasons of {name}'s quarantine that are not a list of texts")
    return tuple(reasons)


def parse_check(guest: str, text: str) -> DiskCheck:
    return _parse_record(DiskCheck, f"disk check of {guest}", text)


def parse_core_start(guest: str, text: str) -> CoreStart:
    return _parse_record(CoreStart, f"count of the cores of {guest}", text)


def _parse_disengagement(guest: str, text: str) -> Disengagement:
    return _parse_record(Disengagement, f"disengagement of {guest}", text)


def parse_switch(name: str, text: str) -> Switch:
    switch = _parse_record(Switch, f"switch {name}", text)
    if switch.name != name:
        raise ValueError(f"an unreadable switch {name}: its record names {switch.name!r}")
    return switch


def _parse_record(kind: type[_Record], what: str, text: str) -> _Record:
    fields = _parse_json(text, f"the {what}")
    try:
        return from_plain(kind, fields)
    except ValueError as error:
        raise ValueError(f"an unreadable {what}: {error}") from None


def parse_arguments(owner: str, text: str) -> dict[str, object]:
    arguments = _parse_json(text, f"an undo record of {owner}")
    if not isinstance(arguments, dict):
        raise ValueError(f"an undo record of {owner} whose arguments are not a JSON object")
    return arguments


def read_rows(db: sqlite3.Connection, statement: str, *values: object) -> Sequence[Any]:
    """All rows in one call, so that readers do not hold up writers."""
    return db.execute(statement, values).fetchall()


def _parse_claim(
    name: str, plan_text: str, state: str, request: str, owner: str, version: int, restarts: int, created: str, creator: str
) -> Claim:
    try:
        parsed = parse_stored_request(request)
        plan = plan_from_json(_parse_json(plan_text, "a plan"))
        claim = Claim(plan, GuestState(state), parsed, owner, version, restarts, created=created, creator=creator)
    except ValueError as error:
        raise ValueError(f"{_UNREADABLE} {name}: {' '.join(str(error).split())}") from None
    for what, other in (("plan", plan.name), ("request", parsed.name)):
        if other != name:
            raise ValueError(f"{_UNREADABLE} {name}: its {what} names guest {other!r}")
    reduced = claim.state in _MAY_BE_REDUCED and plan.disks and plan == plan.only_disks()
    numbers = [number for nic in plan.nics for number in (nic.index or 0, nic.vlan, nic.switch_vlan, nic.rate)]
    sizes = [disk.size.bytes - (not disk.target) for disk in plan.disks]  # that of a target is unknown
    negative = min(plan.node, *numbers, *sizes, 0) < 0
    if negative or not reduced and (not all(plan.cores) or not plan.cores or plan.pages <= 0 or not plan.nics):
        raise ValueError(f"{_UNREADABLE} {name}: its plan has no cores, no pages, or a negative number")
    kinds = [bool(disk.file) + bool(disk.address) + bool(disk.target) for disk in plan.disks]
    if any(kind != 1 for kind in kinds) or not all(_read_key(name, disk) for disk in plan.disks):
        raise ValueError(f"{_UNREADABLE} {name}: its plan has a disk that is neither a controller nor a file nor a target")
    if any(bool(nic.vf) == nic.edge.is_software or bool(nic.vf) == bool(nic.tap) for nic in plan.nics):
        raise ValueError(f"{_UNREADABLE} {name}: its plan has a NIC that is neither a VF nor one of a software edge")
    _check_number(version, f"the version of guest {name}:")
    _check_number(restarts, f"the count of restarts of guest {name}:")
    return claim


def _read_key(name: str, disk: DiskPlan) -> str:
    try:
        return disk.key
    except ValueError as error:
        raise ValueError(f"{_UNREADABLE} {name}: {error}") from None


def list_keys(plan: Plan) -> list[tuple[str, str]]:
    """Rows of the table claim_key: (kind, key) of each resource that exists once."""
    vfs, macs = [str(vf.address) for vf in plan.vfs], [str(nic.mac) for nic in plan.nics]
    named = {"cpu": [str(cpu) for cpu in plan.cpus], "vf": vfs, "mac": macs, "disk": [disk.key for disk in plan.disks]}
    named["cache"] = list(plan.caches.keys) if plan.caches else []
    named["channel"] = [f"{pf} {vlan}" for pf, vlan in plan.channels]
    return [(kind, key) for kind, keys in named.items() for key in keys]


def _check_keys(db: sqlite3.Connection, claims: dict[str, Claim]) -> None:
    """The keys in the file must be exactly the keys of the plans."""
    rows: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for kind, key, guest in read_rows(db, "SELECT kind, key, guest FROM claim_key"):
        rows[guest].add((kind, key))
    for name in sorted(rows.keys() | claims.keys()):
        planned = set(list_keys(claims[name].plan)) if name in claims else set()
        if rows[name] != planned:
            named = ", ".join(" ".join(pair) for pair in sorted(rows[name] ^ planned)[:8])
            raise ValueError(f"{_UNREADABLE} {name}: its plan and the table claim_key differ in {named}")


def _parse_network(name: str, vlan: int, owner: str) -> Network:
    if not MIN_VLAN <= vlan <= MAX_VLAN:
        raise ValueError(f"VLAN {vlan} of network {name}, expected {MIN_VLAN} to {MAX_VLAN}")
    return Network(check_network_name(name), vlan, check_owner(owner))


def _check_networks(claims: dict[str, Claim], networks: dict[str, Network]) -> None:
    for name, claim in claims.items():
        if missing := find_changed_networks(claim.plan, networks):
            raise ValueError(f"{_UNREADABLE} {name}: its plan has {missing[0]}, but the table network does not")


def find_changed_networks(plan: Plan, networks: Mapping[str, Network], tenant: str = "") -> list[str]:
    """One text per network of the plan that does not exist, or not with this VLAN. ``tenant``: only its networks count."""
    named = {(nic.network, nic.network_vlan) for nic in plan.nics if nic.network or nic.network_vlan}
    known = {(network.name, network.vlan) for network in networks.values() if tenant in ("", network.owner)}
    return [f"network {name} with VLAN {vlan}" for name, vlan in sorted(named - known)]


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{what}, nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what}, not JSON: {error}") from None


def _check_number(number: object, what: str) -> None:
    if not isinstance(number, int) or not 0 <= number <= _HIGHEST:
        raise ValueError(f"{what} {number}, expected 0 to {_HIGHEST}")
