"""What of a host needs a person, with the command to do it; and the verdicts of a guest's proofs in a few words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.client.host_shapes import Host, LastAudit

_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"))


class Attention(NamedTuple):
    """``since`` is UTC in ISO 8601, empty if not known."""

    since: str
    text: str
    command: str


class Light(NamedTuple):
    """The verdicts of the last audit about a guest; ``colour`` is green only if all of them passed and none is outdated."""

    text: str
    colour: str


def list_attention(host: Host) -> list[Attention]:
    """Oldest first, then what has no time."""
    found = [*_list_dated(host), *_list_undated(host)]
    return sorted(found, key=lambda one: (not one.since, one.since))


def show_light(host: Host, subject: str) -> Light:
    """Of a guest, or of "host"."""
    audit = host["audit"]
    proofs = [proof for proof in audit["proofs"] if proof["subject"] == subject] if audit else []
    if not audit or not proofs:
        return Light("not audited", "yellow")
    age = f"{format_age(audit['age'])} ago"
    if failed := [proof["name"] for proof in proofs if proof["verdict"] == "fail"]:
        return Light(f"FAIL {', '.join(failed)}, {age}", "red")
    if any(proof["outdated"] for proof in proofs):
        return Light("outdated: changed since", "yellow")
    passed = sum(proof["verdict"] == "pass" for proof in proofs)
    if missing := len(proofs) - passed:
        return Light(f"{passed} pass, {missing} not measured, {age}", "yellow")
    return Light(f"{passed} pass, {age}", "green")


def format_age(seconds: float) -> str:
    """In the largest unit of which there is at least one."""
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _list_dated(host: Host) -> Iterator[Attention]:
    for guest in host["quarantine"]:
        text = f"guest {guest['name']} is in quarantine: {'; '.join(guest['reasons'])}"
        yield Attention(guest["since"], text, f"nohype quarantine clear {guest['name']}")
    for drift in host["drift"]:
        text = f"{drift['subject']} differs from its claim: {'; '.join(drift['findings'])}"
        yield Attention(
            drift["since"], text, "nohype events" + ("" if drift["subject"] == "host" else f" --guest {drift['subject']}")
        )


def _list_undated(host: Host) -> Iterator[Attention]:
    for guest in host["guests"]:
        if guest["state"] == "ended":
            yield Attention("", f"guest {guest['name']} has ended, but should run", f"nohype guest start {guest['name']}")
    for name in host["lost"]:
        yield Attention("", f"frames between guests do not return to uplink {name}", f"nohype uplink prove {name}")
    yield from _list_failed(host["audit"])
    for finding in host["survey"]["findings"]:
        yield Attention("", finding["text"], finding["hint"])


def _list_failed(audit: LastAudit | None) -> Iterator[Attention]:
    for proof in audit["proofs"] if audit else ():
        if proof["verdict"] == "fail" and not proof["outdated"]:
            yield Attention("", f"proof {proof['name']} of {proof['subject']} failed: {proof['finding']}", "nohype audit")
