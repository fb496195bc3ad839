"""Sends counted frames from guest to guest and watches for them: inside the host, and at the external switch's port."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address

from orchestrator.audit.vepa import SwitchCount, Traffic
from orchestrator.errors import GuestError
from orchestrator.host.frames import EchoFilter, FrameCounter
from orchestrator.host.processes import read_arguments
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest

SIZE = 248
"""Bytes of ICMP data in a counted frame. No ping program uses it unasked, so warm-up and other pings are not counted."""

Tell = Callable[[str, str, float], str]
"""Types a line (second) on a guest's console (first), waits that many seconds at most, and gives the answer."""

_ADDRESS = re.compile(r"(?:^|\s)nohype\.address=([0-9.]+)/\d+(?:\s|$)", re.ASCII)
_FIGURE = re.compile(r"\b(sent|received|duplicates)=(\d+)", re.ASCII)


def find_guest_address(host: HostRoot, guest: RunningGuest) -> IPv4Address | None:
    """The address that the guest was told to take, from the command line of its running QEMU; None if it was told none."""
    match = next((match for word in read_arguments(host, guest.pid) if (match := _ADDRESS.search(word))), None)
    return IPv4Address(match[1]) if match else None


def measure_traffic(tell: Tell, source: tuple[str, IPv4Address], target: tuple[str, IPv4Address], count: int) -> Traffic:
    """Lets one guest send echo requests to another, and counts those that the host's network stack gets to see.

    The host's interfaces are watched as they are, not promiscuously: a promiscuous PF would make the NIC copy frames to the host.

    Args:
        source, target: name and address of the guests.
        count: how many requests.

    Raises:
        GuestError: the guest does not answer, or can't send.
        HostError: no right to watch the interfaces.
    """
    # Uncounted: it resolves the addresses, so that no counted frame is lost for want of an ARP answer.
    _ask(tell, source[0], f"ping {target[1]} 2", 60.0)
    asked = EchoFilter(source[1], target[1], size=SIZE)
    answered = EchoFilter(target[1], source[1], reply=True, size=SIZE)
    with FrameCounter(asked) as requests, FrameCounter(answered) as replies:
        figures = _ask(tell, source[0], f"flood {target[1]} {count} {SIZE}", 60.0 + 4 * count)
    seen: Counter[str] = Counter()
    for counter in (requests, replies):
        seen.update(counter.count().incoming)
        seen.update(counter.count().outgoing)
    dropped = requests.count().dropped + replies.count().dropped
    return Traffic(source[0], target[0], SIZE, figures["sent"], figures["received"], figures["duplicates"], dict(seen), dropped)


def watch_switch(port: str, netns: str | None = None) -> FrameCounter:
    """Counts the same requests at a port of the external switch; use it in a ``with`` around the host's audit.

    Args:
        port: the switch's interface towards the host.
        netns: the network namespace that the switch is in.
    """
    return FrameCounter(EchoFilter(size=SIZE), port, netns, promiscuous=True)


def count_at_switch(counter: FrameCounter) -> SwitchCount:
    """What ``watch_switch`` counted, seen from the switch."""
    count = counter.count()
    return SwitchCount(counter.interface or "", sum(count.incoming.values()), sum(count.outgoing.values()), count.dropped)


def parse_ping(answer: str) -> dict[str, int]:
    """The figures of the guest's last answer: ``nohype: done flood sent=20 received=20 duplicates=0 ...``.

    Raises:
        GuestError: there is no such answer, or one of the three figures is missing.
    """
    lines = [line for line in answer.splitlines() if line.startswith("nohype: ")]
    figures = {key: int(value) for key, value in _FIGURE.findall(lines[-1] if lines else "")}
    if not lines or not lines[-1].startswith("nohype: done ") or figures.keys() != {"sent", "received", "duplicates"}:
        raise GuestError(f"the guest could not ping: {lines[-1] if lines else answer.strip()[-200:] or 'no answer'}")
    return figures


def _ask(tell: Tell, guest: str, line: str, timeout: float) -> dict[str, int]:
    return parse_ping(tell(guest, line, timeout))
