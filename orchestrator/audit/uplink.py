"""vepa: frames between guests leave the host and return, each once.

The manager measures the host's half, and the other half through the driver of the external switch, if one is configured. An
observer at the switch can complete the proof too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from ipaddress import IPv4Address

from orchestrator.audit.edge import EDGE_WEAKER, check_edges, check_uplinks, describe_uplinks
from orchestrator.errors import GuestError
from orchestrator.host.frames import EchoFilter, FrameCounter
from orchestrator.host.processes import read_arguments
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Measurement, Proof, Verdict, not_measured
from orchestrator.model.uplink import CountWay, EdgeReading, Traffic, VepaReadings
from orchestrator.model.uplink import SwitchCount as SwitchCount
from orchestrator.switches.linux_bridge import LinuxBridge

SIZE = 248
"""Bytes of ICMP data in a counted frame. No ping program has this default, so the warm-up is not counted."""

AskGuest = Callable[[str, str, float], str]
"""(guest name, line, timeout in seconds) → the reply to the line on the guest's console."""

_ADDRESS = re.compile(r"(?:^|\s)nohype\.address=([0-9.]+)/\d+(?:\s|$)", re.ASCII)
_COUNT = re.compile(r"\b(sent|received|duplicates)=(\d+)", re.ASCII)


def prove_vepa(readings: VepaReadings, switch: SwitchCount | None) -> Measurement:
    """Passes only if every frame was seen exactly once in each direction at the switch port, and never in the host.

    ``switch`` is the count of an observer at the switch, if there is one: it must agree with that of the switch's driver.
    """
    counts = [count for count in (readings.switch, switch) if count]
    edges, traffic = readings.edges, readings.traffic
    findings = [f"{edge.interface} switches locally between VFs (VEB): {edge.text}" for edge in edges if edge.mode == "veb"]
    findings += check_edges(edges)
    findings += [f"{one.invariant}: {one.text}" for one in readings.invariants if one.holds is False]
    unknown = [f"{edge.interface}: edge mode unknown: {edge.text}" for edge in edges if edge.mode is None]
    missing = [*readings.gaps, *unknown]
    if not edges:
        missing.append("no guest has a VF of a known PF, or a NIC of a software edge")
    findings += _check_traffic(traffic, missing) if traffic else []
    if not traffic:
        missing.append("no frames were sent from guest to guest")
    elif not counts:
        why = f": {readings.switch_gap}" if readings.switch_gap else ""
        missing.append(f"the frames were not counted at the external switch{why}")
    findings += [finding for count in counts if traffic for finding in _check_switch(traffic, count, missing)]
    verdict = Verdict.FAIL if findings else Verdict.NOT_MEASURED if missing else Verdict.PASS
    measured = traffic and counts and verdict != Verdict.NOT_MEASURED
    figure = max(_count_misrouted(traffic, count) for count in counts) if traffic and measured else None
    if verdict == Verdict.FAIL and not figure:
        figure = None  # no counted frame was misrouted: the finding is about something else
    evidence = [edge.text for edge in edges if edge.mode]
    evidence += [_describe_traffic(traffic)] if traffic else []
    evidence += [describe_uplinks(traffic)] if traffic and (traffic.source_edge or traffic.target_edge) else []
    evidence += [line for count in counts for line in _describe_count(count)]
    evidence += [f"{one.invariant}: {one.text}" for one in readings.invariants if one.holds is not False]
    evidence += [EDGE_WEAKER] if any(edge.uplink for edge in edges) else []
    return Measurement(verdict, figure, (*findings, *missing, *evidence), readings)


def complete_vepa(proof: Proof, switch: SwitchCount) -> Proof:
    """Repeats the proof with the count at the switch."""
    if proof.readings is None:
        return proof.measured_as(not_measured("; ".join(proof.evidence) or "the host measured nothing"))
    return proof.measured_as(prove_vepa(proof.readings, switch))


def find_guest_address(host: HostRoot, guest: RunningGuest) -> IPv4Address | None:
    """The address on the command line of the running QEMU; None without one."""
    match = next((match for word in read_arguments(host, guest.pid) if (match := _ADDRESS.search(word))), None)
    return IPv4Address(match[1]) if match else None


def measure_traffic(
    ask: AskGuest, source: tuple[str, IPv4Address], target: tuple[str, IPv4Address], count: int,
    edges: Sequence[EdgeReading] = (), *, outside: Collection[str] = (), during: AbstractContextManager[object] | None = None,
) -> Traffic:  # fmt: skip
    """Sends `count` echo requests between two guests, and counts the frames that the host's network stack receives.

    The host's interfaces are not set promiscuous: the NIC would copy frames to the host.

    Args:
        edges: the software edges of source and target.
        outside: interfaces where the frames are expected too: those below a stacked uplink, and switch ports on this host.
        during: entered after the uncounted frames, and left after the counted ones.

    Raises GuestError if a guest does not respond or cannot send, HostError without permission to watch the interfaces.
    """
    # Uncounted: it resolves the addresses, so that no counted frame is lost while ARP is unanswered.
    _ping(ask, source[0], f"ping {target[1]} 2", 60.0)
    request_filter = EchoFilter(source[1], target[1], size=SIZE)
    reply_filter = EchoFilter(target[1], source[1], reply=True, size=SIZE)
    with during or nullcontext(), FrameCounter(request_filter) as requests, FrameCounter(reply_filter) as replies:
        counts = _ping(ask, source[0], f"flood {target[1]} {count} {SIZE}", 60.0 + 4 * count)
    asked, answered = requests.count(), replies.count()
    incoming = Counter(asked.incoming) + Counter(answered.incoming)
    outgoing = Counter(asked.outgoing) + Counter(answered.outgoing)
    uplinks, taps = {edge.uplink for edge in edges}, {edge.interface for edge in edges}
    expected = uplinks | taps | set(outside)
    in_host = {name: number for name, number in (incoming + outgoing).items() if name not in expected}
    return Traffic(
        source=source[0],
        target=target[0],
        size=SIZE,
        sent=counts["sent"],
        received=counts["received"],
        duplicates=counts["duplicates"],
        in_host=in_host,
        dropped=asked.dropped + answered.dropped,
        uplink_out=sum(outgoing[name] for name in uplinks),
        uplink_in=sum(incoming[name] for name in uplinks),
    )


def watch_switch(switch: LinuxBridge, port: str) -> FrameCounter:
    """Counts requests at a port of the external switch; use it in a ``with`` around the host's audit."""
    return switch.count_frames(port, EchoFilter(size=SIZE))


def count_at_switch(counter: FrameCounter) -> SwitchCount:
    count = counter.count()
    return SwitchCount(counter.interface or "", sum(count.incoming.values()), sum(count.outgoing.values()), count.dropped)


def parse_ping(reply: str) -> dict[str, int]:
    """Reads the last line of a reply: ``nohype: done flood sent=20 received=20 duplicates=0``. Raises GuestError without it."""
    lines = [line for line in reply.splitlines() if line.startswith("nohype: ")]
    counts = {key: int(value) for key, value in _COUNT.findall(lines[-1] if lines else "")}
    if not lines or not lines[-1].startswith("nohype: done ") or counts.keys() != {"sent", "received", "duplicates"}:
        raise GuestError(f"the guest could not ping: {lines[-1] if lines else reply.strip()[-200:] or 'no reply'}")
    return counts


def _ping(ask: AskGuest, guest: str, line: str, timeout: float) -> dict[str, int]:
    return parse_ping(ask(guest, line, timeout))


def _check_traffic(traffic: Traffic, missing: list[str]) -> list[str]:
    findings = [f"{count} of the frames were seen inside the host, on {name}" for name, count in traffic.in_host.items() if count]
    if traffic.duplicates:
        findings.append(f"{traffic.duplicates} duplicate replies: frames took two paths")
    if not traffic.sent:
        missing.append(f"{traffic.source} sent no frame")
    elif not traffic.received:
        findings.append(f"{traffic.source} received no reply from {traffic.target} to {traffic.sent} requests")
    elif traffic.received < traffic.sent:
        missing.append(f"{traffic.sent - traffic.received} of {traffic.sent} replies were lost: measure again")
    if traffic.dropped:
        missing.append(f"the capture on the host lost {traffic.dropped} frames")
    elif traffic.received == traffic.sent:
        findings += check_uplinks(traffic)
    return findings


def _check_switch(traffic: Traffic, switch: SwitchCount, missing: list[str]) -> list[str]:
    if switch.dropped:
        # Counted frames may be among the lost frames: the count proves nothing.
        missing.append(f"the capture on {switch.port} lost {switch.dropped} frames")
        return []
    if switch.way is not CountWay.FRAMES:
        return _check_counters(traffic, switch, missing)
    findings = []
    if switch.into_switch < traffic.sent:
        lost = traffic.sent - switch.into_switch
        findings.append(f"{lost} of {traffic.sent} frames did not reach the switch port {switch.port}")
    if switch.into_switch > traffic.sent:
        findings.append(f"{switch.into_switch} frames reached the switch port {switch.port}, but only {traffic.sent} were sent")
    if switch.out_of_switch < switch.into_switch:
        lost = switch.into_switch - switch.out_of_switch
        hint = f"check that hairpin is enabled on {switch.port}"
        findings.append(f"the switch did not reflect {lost} of {switch.into_switch} frames: {hint}")
    if switch.out_of_switch > switch.into_switch:
        findings.append(f"{switch.into_switch} frames entered the switch, {switch.out_of_switch} left it")
    return findings


def _check_counters(traffic: Traffic, switch: SwitchCount, missing: list[str]) -> list[str]:
    """Counters include other frames: fewer frames than were sent are a finding, more are not."""
    expected = traffic.sent + traffic.received
    findings = []
    if switch.into_switch < expected:
        findings.append(f"{expected - switch.into_switch} of {expected} frames did not reach the switch port {switch.port}")
    elif switch.out_of_switch < expected:
        hint = f"check that hairpin is enabled on {switch.port}"
        findings.append(f"the switch did not reflect {expected - switch.out_of_switch} of {expected} frames: {hint}")
    others = max(switch.others, switch.into_switch - expected, switch.out_of_switch - expected)
    if not findings and 2 * others >= expected:
        # So many other frames could stand for frames that took another way.
        missing.append(
            f"{switch.port} counted {others} other frames beside {expected} test frames: measure again with more frames"
        )
    return findings


def _count_misrouted(traffic: Traffic, switch: SwitchCount) -> int:
    strayed = sum(traffic.in_host.values()) + traffic.duplicates
    unanswered = 0 if traffic.received else traffic.sent
    if switch.way is not CountWay.FRAMES:
        expected = traffic.sent + traffic.received
        return max(expected - switch.into_switch, expected - switch.out_of_switch, unanswered, 0) + strayed
    return max(abs(traffic.sent - switch.into_switch), abs(traffic.sent - switch.out_of_switch), unanswered) + strayed


def _describe_count(count: SwitchCount) -> list[str]:
    line = f"port {count.port}: {count.into_switch} in from the host, {count.out_of_switch} out to it"
    if count.way is CountWay.FRAMES:
        return [line]
    what = "other frames between the two guests" if count.way is CountWay.PAIRS else "all other frames of the port"
    weaker = f"{WEAKER}port {count.port} counts {what} too: {count.others} of them in a time without test frames"
    return [f"{line} ({count.way}: requests and replies)", weaker]


def _describe_traffic(traffic: Traffic) -> str:
    return (
        f"{traffic.source} → {traffic.target}: {traffic.sent} echo requests of {traffic.size} bytes, {traffic.received} replies;"
        f" the host's own network stack saw {sum(traffic.in_host.values())} of these frames (AF_PACKET on all interfaces)"
    )
