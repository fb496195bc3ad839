"""What of a host needs a person, with the command to do it; and the verdicts of proofs in a few words. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from orchestrator.guests.host_setup import HOST
from orchestrator.model.claim import Quarantined
from orchestrator.model.guest_view import GuestView
from orchestrator.model.host_view import Attention, Drift, LastAudit, LastProof, Light
from orchestrator.model.proof import Verdict
from orchestrator.planning.host_check import HostFinding

_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"))


def list_attention(
    guests: Iterable[GuestView], quarantine: Iterable[Quarantined], drift: Iterable[Drift], lost: Iterable[str],
    audit: LastAudit | None, findings: Iterable[HostFinding],
) -> tuple[Attention, ...]:  # fmt: skip
    """Oldest first, then what has no time. ``lost``: uplinks to which frames do not return."""
    found = [*_list_dated(quarantine, drift), *_list_undated(guests, lost), *_list_failed(audit)]
    found += [Attention("", finding.text, finding.hint) for finding in findings]
    return tuple(sorted(found, key=lambda one: (not one.since, one.since)))


def list_lights(audit: LastAudit | None, guests: Iterable[GuestView]) -> tuple[Light, ...]:
    """One for the host, and one per guest."""
    proofs = audit.proofs if audit else ()
    return tuple(
        _build_light(subject, [proof for proof in proofs if proof.subject == subject])
        for subject in (HOST, *(guest.plan.name for guest in guests))
    )


def format_age(seconds: float) -> str:
    """In the largest unit of which there is at least one."""
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _build_light(subject: str, proofs: Sequence[LastProof]) -> Light:
    if not proofs:
        return Light(subject, Verdict.NOT_MEASURED, "not audited")
    age = f"{format_age(max(proof.age for proof in proofs))} ago"
    if failed := [proof.name for proof in proofs if proof.verdict is Verdict.FAIL]:
        return Light(subject, Verdict.FAIL, f"FAIL {', '.join(failed)}, {age}")
    if any(proof.outdated for proof in proofs):
        return Light(subject, Verdict.NOT_MEASURED, "outdated: changed since")
    passed = sum(proof.verdict is Verdict.PASS for proof in proofs)
    if missing := len(proofs) - passed:
        return Light(subject, Verdict.NOT_MEASURED, f"{passed} pass, {missing} not measured, {age}")
    return Light(subject, Verdict.PASS, f"{passed} pass, {age}")


def _list_dated(quarantine: Iterable[Quarantined], drifts: Iterable[Drift]) -> Iterator[Attention]:
    for guest in quarantine:
        text = f"guest {guest.name} is in quarantine: {'; '.join(guest.reasons)}"
        yield Attention(guest.since, text, f"nohype quarantine clear {guest.name}")
    for drift in drifts:
        command = "nohype events" + ("" if drift.subject == HOST else f" --guest {drift.subject}")
        yield Attention(drift.since, f"{drift.subject} differs from its claim: {'; '.join(drift.findings)}", command)


def _list_undated(guests: Iterable[GuestView], lost: Iterable[str]) -> Iterator[Attention]:
    for guest in guests:
        if guest.state == "ended":
            name = guest.plan.name
            yield Attention("", f"guest {name} has ended, but should run", f"nohype guest start {name}")
    for name in lost:
        yield Attention("", f"frames between guests do not return to uplink {name}", f"nohype uplink prove {name}")


def _list_failed(audit: LastAudit | None) -> Iterator[Attention]:
    for proof in audit.proofs if audit else ():
        if proof.verdict is Verdict.FAIL and not proof.outdated:
            yield Attention("", f"proof {proof.name} of {proof.subject} failed: {proof.finding}", "nohype audit")
