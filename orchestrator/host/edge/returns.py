"""Counts the frames between guests of software edges on one uplink: those that left, which the external switch must send back,
and those that came back.

Two chains of nftables on the uplink have the same conditions, on its egress hook (Linux 5.16) and on its ingress hook, before the
rules that take frames to guests. A frame counts if a guest of this host sends it to another one, or to all stations. Others do
not tell: a switch sends frames to stations elsewhere on, may keep multicasts from a port without receivers, and drops frames to
their own sender.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from orchestrator.host.edge.base import ether, match
from orchestrator.host.root import Chain, HostRoot, Rule
from orchestrator.model.uplink import ReturnCounts
from orchestrator.values import MacAddress

_OUT, _BACK = "must-return", "returned"
_PRIORITY = -10  # before the chains of the edge mode nft-vepa
_ALL = "ff:ff:ff:ff:ff:ff"


def count_returns(host: HostRoot, uplink: str, macs: Collection[MacAddress]) -> None:
    """``macs``: of the guests; nothing is counted without any. Counts from zero. Raises HostError as ``replace_table``."""
    if macs:
        host.net.replace_table(_name_table(uplink), *_build_chains(uplink, macs))
    else:
        stop_counting(host, uplink)


def stop_counting(host: HostRoot, uplink: str) -> None:
    """No-op if nothing is counted."""
    host.net.delete_table(_name_table(uplink))


def is_counting(host: HostRoot, uplink: str, macs: Collection[MacAddress]) -> bool:
    """Whether exactly the frames between these guests are counted. Raises HostError if the rules cannot be read."""
    return host.net.read_table(_name_table(uplink)) == (_build_chains(uplink, macs) if macs else None)


def read_returns(host: HostRoot, uplink: str) -> ReturnCounts | None:
    """None if nothing is counted. ``returned`` is read with the other counter, so frames on their way are missing in it."""
    found = host.net.count_packets(_name_table(uplink))
    return ReturnCounts(found[_OUT], found[_BACK]) if found and _OUT in found and _BACK in found else None


def _name_table(uplink: str) -> str:
    # Names of interfaces may have any character but a slash, those of tables only these (nft(8), identifiers).
    return f"nohype-returns-{re.sub('[^A-Za-z0-9_.-]', lambda odd: f'/{ord(odd[0]):x}', uplink)}"


def _build_chains(uplink: str, macs: Collection[MacAddress]) -> tuple[Chain, Chain]:
    own = sorted(str(mac) for mac in macs)
    # In the order of the header: nft prints them so.
    itself: list[Rule] = [[match(ether("daddr"), mac), match(ether("saddr"), mac), {"accept": None}] for mac in own]
    between = [match(ether("daddr"), _any_of([*own, _ALL])), match(ether("saddr"), _any_of(own)), {"counter": None}]
    return (
        Chain(_OUT, "egress", uplink, [*itself, between], priority=_PRIORITY),
        Chain(_BACK, "ingress", uplink, [*itself, between], priority=_PRIORITY),
    )


def _any_of(macs: list[str]) -> str | dict[str, Any]:
    """As nft prints it: sorted, and a set of one as its element."""
    return {"set": macs} if len(macs) > 1 else macs[0]
