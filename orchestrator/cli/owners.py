"""Finds who owns a thing of the host: a CPU, PCI function, address, interface or disk. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_interface
from typing import Any

from orchestrator.client import shapes
from orchestrator.errors import OrchestratorError
from orchestrator.values import CpuSet, MacAddress, PciAddress

HOUSEKEEPING, HOST, FREE, OFFLINE = "housekeeping", "host", "free", "offline"
UNUSABLE = "unusable"


class Owner(dict[str, Any]):
    """What the thing is, its owner ("guest" or a constant of this module), and more detail.

    Of a guest also its state and tenant, since when it owns the thing (UTC, ISO 8601), and who created it; empty if not known.
    """

    def __str__(self) -> str:
        tenant = f" of tenant {self['tenant']}" if self["tenant"] else ""
        since = f", since {self['since'][:16].replace('T', ' ')} UTC" if self["since"] else ""
        by = f", created by {self['by']}" if self["by"] else ""
        owner = f"guest {self['guest']} ({self['state']}){tenant}{since}{by}" if self["guest"] else self["owner"]
        return f"{self['what']}: {owner}" + (f"; {self['detail']}" if self["detail"] else "")


def find_owners(thing: str, guests: Sequence[shapes.Guest], survey: shapes.Survey | None) -> tuple[Owner, ...]:
    """Empty if nothing of the host has this name. ``survey`` is None for a caller who may not read it."""
    word = _normalise(thing)
    found = [owner for guest in guests for owner in _search_guest(word, guest)]
    if not found and survey is not None:
        found = list(_search_host(word, survey))
    return tuple(found)


def _normalise(thing: str) -> str:
    """In the notation of the manager."""
    for parse in (PciAddress.parse, MacAddress.parse):
        try:
            return str(parse(thing))
        except OrchestratorError:
            continue
    try:
        return str(ip_interface(thing.strip()).ip)
    except ValueError:
        return thing.strip()


def _search_guest(word: str, guest: shapes.Guest) -> Iterator[Owner]:
    def own(what: str, detail: str = "") -> Owner:
        return Owner(
            what=what, owner="guest", guest=guest["name"], tenant=guest["owner"], state=guest["state"],
            since=guest["created"] or "", by=guest["creator"] or "", detail=detail,
        )  # fmt: skip

    cpu = parse_cpu(word)
    if cpu is not None and any(cpu in CpuSet.parse(core).ids for core in guest["cores"]):
        yield own(f"CPU {cpu}", f"cores {', '.join(guest['cores'])} on node {guest['node']}")
    for number, nic in enumerate(guest["nics"]):
        where = f"NIC {number} on {nic['interface']}, {nic['mac']}, edge mode {nic['edge']}"
        for name, what in (("address", "PCI function"), ("mac", "MAC address"), ("tap", "interface")):
            if word and word == nic[name]:  # type: ignore[literal-required]
                yield own(f"{what} {word}", where)
    for disk in guest["disks"]:
        place = disk["serial"] or disk["file"] or disk["target"]
        if word in (disk["serial"], disk["address"], disk["file"], disk["target"]) and word:
            yield own(f"disk {word}", f"disk {place}" if place != word else "")
    if word in {address.partition("/")[0] for address in guest["addresses"]}:
        yield own(f"IP address {word}", "as requested; a guest can use others")
    if word in (guest["name"], guest["id"]):
        yield own(f"guest {guest['name']}" if word == guest["name"] else f"request {word}", f"CPUs {', '.join(guest['cores'])}")


def _search_host(word: str, survey: shapes.Survey) -> Iterator[Owner]:
    def own(what: str, owner: str, detail: str = "") -> Owner:
        return Owner(what=what, owner=owner, guest="", tenant="", state="", since="", by="", detail=detail)

    cpu = parse_cpu(word)
    for core in survey["cores"]:
        if cpu is not None and cpu in CpuSet.parse(core["cpus"]).ids:
            where = f"core {core['cpus']} on node {core['node']}"
            isolated = CpuSet.parse(survey["isolated"])
            if cpu in CpuSet.parse(survey.get("housekeeping", "")).ids:
                yield own(f"CPU {cpu}", HOUSEKEEPING, where)
            elif isolated and not CpuSet.parse(core["cpus"]) <= isolated:
                yield own(f"CPU {cpu}", UNUSABLE, f"{where}; it is not isolated, so guests cannot have it")
            else:
                yield own(f"CPU {cpu}", FREE, where)
    online = {other for core in survey["cores"] for other in CpuSet.parse(core["cpus"]).ids}
    if cpu is not None and cpu in CpuSet.parse(survey["possible"]).ids - online:
        yield own(f"CPU {cpu}", OFFLINE)
    for pf in survey["pfs"]:
        if word and word in (pf["address"], pf["interface"], pf["mac"]):
            yield own(f"PF {pf['address']}", HOST, f"{pf['interface'] or 'no interface'}, {pf['total_vfs']} VFs possible")
        for vf in pf["vfs"]:
            if word == vf["address"]:
                yield own(
                    f"VF {word}",
                    HOST if vf["use"] else FREE,
                    vf["use"] or f"number {vf['index']} of {pf['interface'] or pf['address']}",
                )
    for disk in survey["controllers"]:
        if word and word in (disk["serial"], disk["address"], disk["name"]):
            uses = [*disk["uses"], *disk["signatures"], *filter(None, [disk["fault"]])]
            yield own(f"NVMe controller {word}", HOST if uses else FREE, "; ".join(uses))
    for interface in survey["interfaces"]:
        if word in (interface["name"], interface["mac"]) and not any(
            pf["interface"] == interface["name"] for pf in survey["pfs"]
        ):
            yield own(f"interface {interface['name']}", HOST, f"port of {interface['master']}" if interface["master"] else "")


def parse_cpu(word: str) -> int | None:
    """The number of a CPU, written as 7 or cpu7; None for another word."""
    digits = word.lower().removeprefix("cpu")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 6 else None
