"""vepa: frames between guests leave the host and come back, each once. Pure judgement over what was measured in two places.

The host's side is measured by the host's own manager, the switch's side at the port of the external switch. The proof made on the
host carries its readings along, so that whoever watched the switch can complete it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.model.proof import Proof, Verdict, not_measured

VEPA = "vepa"
UNIT = "frames that did not go out and come back once"
_READINGS = "readings: "


@dataclass(frozen=True)
class EdgeReading:
    """A PF's edge mode: ``vepa``, ``veb``, or None if it can't be told; ``text`` says what was read to tell it, or why not."""

    interface: str
    mode: str | None
    text: str


@dataclass(frozen=True)
class Traffic:
    """Echo requests from one guest to another, as the host saw them.

    Attributes:
        source, target: names of the guests.
        size: bytes of ICMP data; only requests of this size are counted.
        sent, received, duplicates: what the sending guest counted: requests, replies, replies that came twice.
        in_host: requests and replies that the host's own network stack saw, an interface → frames.
        dropped: frames that the host's capture lost.
    """

    source: str
    target: str
    size: int
    sent: int
    received: int
    duplicates: int
    in_host: dict[str, int]
    dropped: int


@dataclass(frozen=True)
class SwitchCount:
    """The same requests at the external switch's port: in from the host, out to the host, and lost by the capture."""

    port: str
    into_switch: int
    out_of_switch: int
    dropped: int = 0


def judge_vepa(
    edges: tuple[EdgeReading, ...], traffic: Traffic | None, switch: SwitchCount | None, gaps: tuple[str, ...] = ()
) -> Proof:
    """The proof ``vepa`` of a host.

    Args:
        edges: the PFs whose VFs guests have.
        traffic: None if none was sent.
        switch: None until it was counted outside.
        gaps: why something could not be measured.

    Returns:
        A proof that fails if anything contradicts the claim, is not measured if a part is missing and nothing contradicts, and
        passes only if every frame was seen exactly twice at the port, once each way, and never in the host.
    """
    faults = [f"{edge.interface} switches between its VFs inside the NIC: {edge.text}" for edge in edges if edge.mode == "veb"]
    unknown = [
        f"{edge.interface}: its edge mode can't be told: {edge.text}" for edge in edges if edge.mode not in ("veb", "vepa")
    ]
    missing = [*gaps, *unknown]
    if not edges:
        missing.append("no guest has a virtual function of a known PF")
    faults += _check_traffic(traffic, missing) if traffic else []
    if not traffic:
        missing.append("no frames were sent from guest to guest")
    elif not switch:
        missing.append("the frames were not counted at the external switch")
    else:
        faults += _check_switch(traffic, switch, missing)
    verdict = Verdict.FAIL if faults else Verdict.NOT_MEASURED if missing else Verdict.PASS
    figure = _count_wrong(traffic, switch) if traffic and switch and verdict != Verdict.NOT_MEASURED else None
    if verdict == Verdict.FAIL and not figure:
        figure = None  # the frames that were counted behaved; what failed is no count
    evidence = [edge.text for edge in edges if edge.mode]
    evidence += [_describe_traffic(traffic)] if traffic else []
    evidence += [f"port {switch.port}: {switch.into_switch} in from the host, {switch.out_of_switch} out to it"] if switch else []
    readings = {"edges": [asdict(edge) for edge in edges], "traffic": traffic and asdict(traffic), "gaps": list(gaps)}
    return Proof(VEPA, "host", verdict, figure, UNIT, (*faults, *missing, *evidence, _READINGS + json.dumps(readings)))


def complete_vepa(proof: Proof, switch: SwitchCount) -> Proof:
    """The host's proof together with what was counted at the switch.

    Args:
        proof: as ``judge_vepa`` made it on the host, perhaps read back from JSON.
    """
    for line in proof.evidence:
        if line.startswith(_READINGS):
            readings: dict[str, Any] = json.loads(line.removeprefix(_READINGS))
            edges = tuple(EdgeReading(**edge) for edge in readings["edges"])
            traffic = Traffic(**readings["traffic"]) if readings["traffic"] else None
            return judge_vepa(edges, traffic, switch, tuple(readings["gaps"]))
    return not_measured(VEPA, proof.subject, UNIT, "; ".join(proof.evidence) or "the host measured nothing")


def _check_traffic(traffic: Traffic, missing: list[str]) -> list[str]:
    faults = [f"{count} of the frames were seen inside the host, on {name}" for name, count in traffic.in_host.items() if count]
    if traffic.duplicates:
        faults.append(f"{traffic.duplicates} replies came twice: frames took two ways")
    if not traffic.sent:
        missing.append(f"{traffic.source} sent no frame")
    elif not traffic.received:
        faults.append(f"{traffic.source} got no reply from {traffic.target} to {traffic.sent} requests")
    elif traffic.received < traffic.sent:
        missing.append(f"{traffic.sent - traffic.received} of {traffic.sent} replies were lost: measure again")
    if traffic.dropped:
        missing.append(f"the host's capture lost {traffic.dropped} frames")
    return faults


def _check_switch(traffic: Traffic, switch: SwitchCount, missing: list[str]) -> list[str]:
    if switch.dropped:
        # What was lost may have been these: neither a wrong nor a right count says anything.
        missing.append(f"the capture on {switch.port} lost {switch.dropped} frames")
        return []
    faults = []
    if switch.into_switch < traffic.sent:
        faults.append(f"{traffic.sent - switch.into_switch} of {traffic.sent} frames never came to the switch port {switch.port}")
    if switch.into_switch > traffic.sent:
        faults.append(f"{switch.into_switch} frames came to the switch port {switch.port}, but only {traffic.sent} were sent")
    if switch.out_of_switch < switch.into_switch:
        lost = switch.into_switch - switch.out_of_switch
        faults.append(f"the switch turned {lost} of {switch.into_switch} frames not around: is hairpin on at {switch.port}?")
    if switch.out_of_switch > switch.into_switch:
        faults.append(f"{switch.into_switch} frames came to the switch, {switch.out_of_switch} left it")
    return faults


def _count_wrong(traffic: Traffic, switch: SwitchCount) -> int:
    strayed = sum(traffic.in_host.values()) + traffic.duplicates
    unanswered = 0 if traffic.received else traffic.sent
    return max(abs(traffic.sent - switch.into_switch), abs(traffic.sent - switch.out_of_switch), unanswered) + strayed


def _describe_traffic(traffic: Traffic) -> str:
    return (
        f"{traffic.source} → {traffic.target}: {traffic.sent} echo requests of {traffic.size} bytes, {traffic.received} replies;"
        f" the host's own network stack saw {sum(traffic.in_host.values())} of these frames (AF_PACKET on all interfaces)"
    )
