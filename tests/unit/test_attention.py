"""What of a host needs a person, and the verdicts of guests in a few words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.guests.attention import format_age, list_attention, list_lights
from orchestrator.model.claim import Quarantined
from orchestrator.model.guest_view import GuestView
from orchestrator.model.host_view import Drift, LastAudit, LastProof
from orchestrator.model.proof import Verdict
from orchestrator.planning.host_check import HostFinding, Severity


def guest(name: str, state: str = "running") -> GuestView:
    return cast("GuestView", SimpleNamespace(plan=SimpleNamespace(name=name), state=state))


def audited(*proofs: tuple[str, bool], ages: tuple[float, ...] = ()) -> LastAudit:
    found = (
        LastProof(f"p{number}", "web", Verdict(verdict), 0, "", "x", outdated, ages[number] if ages else 90.0)
        for number, (verdict, outdated) in enumerate(proofs)
    )
    return LastAudit(1.0, tuple(found))


@pytest.mark.parametrize(
    ("audit", "text", "verdict"),
    [
        (None, "not audited", "not measured"),
        (audited(), "not audited", "not measured"),
        (audited(("pass", False), ("pass", False)), "2 pass, 1 min ago", "pass"),
        (audited(("pass", False), ("pass", False), ages=(1.0, 7200.0)), "2 pass, 2 h ago", "pass"),
        (audited(("pass", False), ("not measured", False)), "1 pass, 1 not measured, 1 min ago", "not measured"),
        (audited(("pass", True), ("not measured", False)), "outdated: changed since", "not measured"),
        (audited(("pass", True), ("pass", False)), "outdated: changed since", "not measured"),
        (audited(("pass", True), ("fail", True)), "FAIL p1, 1 min ago", "fail"),
    ],
)
def test_only_a_complete_audit_passes(audit: LastAudit | None, text: str, verdict: str) -> None:
    lights = {light.subject: light for light in list_lights(audit, [guest("web"), guest("db")])}
    assert (lights["web"].text, lights["web"].verdict) == (text, verdict)
    assert {lights[name].text for name in ("host", "db")} == {"not audited"}


def test_oldest_comes_first() -> None:
    found: tuple[Any, ...] = list_attention(
        [guest("c", "ended"), guest("d")],
        [Quarantined("b", "2026-02-01T00:00:00", ("r",))],
        [Drift("host", "2026-01-01T00:00:00", ("f",)), Drift("d", "2026-03-01T00:00:00", ("f",))],
        ["nic0"],
        audited(("fail", False), ("fail", True)),
        [HostFinding(Severity.WARNING, "t", "h")],
    )
    assert [one.command for one in found] == [
        "nohype events", "nohype quarantine clear b", "nohype events --guest d", "nohype guest start c",
        "nohype uplink prove nic0", "nohype audit", "h",
    ]  # fmt: skip


def test_ages() -> None:
    assert [format_age(seconds) for seconds in (0, 59.9, 60, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
