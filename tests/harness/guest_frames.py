"""Frames that guests of the image `frames` send, and where each of them went: through the switch ports, and to which NIC."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orchestrator.lab.switch import LabPort
from orchestrator.waiting import wait_until
from tests.harness.attack_frames import ALL, VLAN, end_of, ether, finish, tagged
from tests.harness.netns import Watch

OUTSIDE = "02:00:00:00:00:50"
"""A station that does not exist: the switch floods what is sent to it."""
OUT_AND_BACK = Counter({"out": 1, "back": 1})
_LINE = 512  # characters of a command (docs/api.md)
_HEAD = len("frames send 02:00:00:00:00:50 99999 99999")

Key = TypeVar("Key")
Tell = Callable[[str, str], str]
"""Sends a command to a guest; returns the guest's answer."""


@dataclass(frozen=True)
class Nic:
    guest: str
    name: str  # in the guest
    mac: str
    vlan: int  # 0: in no network

    @property
    def place(self) -> Counter[str]:
        """What `trace` returns for a frame that only this NIC received."""
        return Counter([f"{self.guest}/{self.name}"])


@dataclass
class Wire:
    """The guests, and the ports of the switch that all of their frames pass: one per host."""

    tell: Tell
    ports: Sequence[LabPort]
    nics: list[Nic] = field(default_factory=list)
    _watches: list[Watch] = field(default_factory=list, init=False)
    _seen: Counter[tuple[str, bytes]] = field(default_factory=Counter, init=False)
    _number: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        for port in self.ports:
            self._watches.append(Watch(port.netns, port.interface, buffer=64 << 20))

    @classmethod
    @contextmanager
    def watched(cls, tell: Tell, ports: Sequence[LabPort], guests: Iterable[Mapping[str, Any]]) -> Iterator[Wire]:
        """``guests``: as the manager shows them. They count frames until they end."""
        wire = cls(tell, ports)
        try:
            for guest in guests:
                name = guest["name"]
                names = dict(word.split("=") for word in wire.command(name, "nics").split())
                for nic in guest["nics"]:
                    wire.nics.append(Nic(name, names[nic["mac"]], nic["mac"], nic["vlan"] or 0))
                    tell(name, f"shell ip link set {names[nic['mac']]} up")
                wire.command(name, "watch")
            yield wire
        finally:
            wire.close()

    def find(self, guest: str, vlan: int) -> Nic:
        return next(nic for nic in self.nics if (nic.guest, nic.vlan) == (guest, vlan))

    def places(self, vlan: int) -> Counter[str]:
        """Of the NICs of this network."""
        return sum((nic.place for nic in self.nics if nic.vlan == vlan), Counter[str]())

    def close(self) -> None:
        for watch in self._watches:
            watch.close()

    def _send(self, frame: bytes) -> None:
        """To each host."""
        for watch in self._watches:
            watch.send(frame)

    def command(self, guest: str, words: str) -> str:
        """The words after `nohype: done frames`."""
        answer = self.tell(guest, f"frames {words}")
        assert answer.startswith("nohype: done frames"), answer
        return answer.removeprefix("nohype: done frames").strip()

    def trace(self, sender: Nic, frames: Mapping[str, bytes], count: int = 1) -> dict[str, Counter[str]]:
        """Where each frame went: "out" into the switch, "back" out of a port, or GUEST/NIC. ``count``: how often it is sent."""
        return self.trace_all({sender: frames}, count)[sender]

    def trace_all(self, frames: Mapping[Nic, Mapping[str, bytes]], count: int = 1) -> dict[Nic, dict[str, Counter[str]]]:
        """As ``trace``, by sender: the guests are asked once for all frames."""
        numbers = {(sender, name): self.take_number() for sender, named in frames.items() for name in named}
        for sender, named in frames.items():
            for first, batch in _divide(list(named.values()), min(numbers[sender, name] for name in named)):
                answer = self.command(
                    sender.guest, f"send {sender.mac} {first} {count} {' '.join(frame.hex() for frame in batch)}"
                )
                assert answer == f"sent={len(batch) * count} failed=0"
        self.settle(*frames)
        found = self.counts(numbers)
        return {sender: {name: found[sender, name] for name in named} for sender, named in frames.items()}

    def send_from_outside(self, frames: Mapping[str, bytes]) -> dict[str, Counter[str]]:
        """The NICs that received each frame of the switch."""
        numbers = {name: self.take_number() for name in frames}
        for name, frame in frames.items():
            self._send(finish(frame, numbers[name]))
        self.settle()
        return self.counts(numbers)

    def take_number(self) -> int:
        self._number += 1
        return self._number - 1

    def settle(self, *senders: Nic) -> None:
        """Waits until what was sent before has arrived: by frames that take the same way, later."""
        for sender in senders:
            number = self.take_number()
            self.command(sender.guest, f"send {sender.mac} {number} 1 {ether(OUTSIDE, sender.mac).hex()}")
            assert wait_until(lambda number=number: self.at_port(number)["out"], timeout=60, interval=0.01)
        vlans = sorted({nic.vlan for nic in self.nics})
        markers = {vlan: self.take_number() for vlan in vlans}
        for vlan, number in markers.items():
            tags = [(VLAN, vlan)] if vlan else []
            self._send(finish(tagged(ALL, OUTSIDE, *tags), number))

        def have_arrived() -> bool:
            found = self.at_guests(min(markers.values()), max(markers.values()))
            return all(nic.place <= found[markers[nic.vlan]] for nic in self.nics)

        assert wait_until(have_arrived, timeout=60, interval=0.05)

    def counts(self, numbers: Mapping[Key, int]) -> dict[Key, Counter[str]]:
        at_guests = self.at_guests(min(numbers.values()), max(numbers.values()))
        return {name: self.at_port(number) + at_guests[number] for name, number in numbers.items()}

    def at_port(self, number: int) -> Counter[str]:
        self._seen.update((way, frame[-8:]) for watch in self._watches for way, frame in watch.take())
        end = end_of(number)
        return +Counter({"out": self._seen["in", end], "back": self._seen["out", end]})

    def at_guests(self, first: int, last: int) -> dict[int, Counter[str]]:
        found: dict[int, Counter[str]] = {number: Counter() for number in range(first, last + 1)}
        for guest in sorted({nic.guest for nic in self.nics}):
            for number, name, count in re.findall(r"(\d+)/(\S+)=(\d+)", self.command(guest, f"counts {first} {last}")):
                found[int(number)][f"{guest}/{name}"] += int(count)
        return found


def _divide(frames: Sequence[bytes], first: int) -> list[tuple[int, list[bytes]]]:
    """The frames in as many commands as needed, each with the number of its first."""
    batches: list[tuple[int, list[bytes]]] = []
    free = 0
    for number, frame in enumerate(frames, first):
        length = 2 * len(frame) + 1
        if length > free:
            batches.append((number, []))
            free = _LINE - _HEAD
        batches[-1][1].append(frame)
        free -= length
    return batches
