"""The LLDP neighbour of a port, as lldpd(8) on the switch or on this host received it.

lldpd does not know the EVB TLV (IEEE 802.1Qbg: OUI 00-80-C2, subtype 13) and lists it among the unknown ones. The TLV is a claim
of the neighbour. Whether a port reflects frames is decided by its hairpin flag and by counted frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from orchestrator.errors import SwitchError
from orchestrator.model.switch import Neighbour, SwitchPort
from orchestrator.switches.commands import Commands, parsed, read_json

_EVB = ("00,80,C2", "13")
# Byte 0 is the bridge's status, byte 1 the station's (IEEE 802.1Qbg D.2.13).
_CLAIMS = ((0, 0x02, "reflective relay possible"), (0, 0x01, "reflective relay on"), (1, 0x04, "reflective relay requested"))


def read_neighbour(commands: Commands, port: SwitchPort) -> SwitchPort:
    """The port with its neighbour, or with the reason in ``gaps``."""
    try:
        found = find_neighbour(commands, port.name)
    except SwitchError as error:
        return replace(port, gaps=(*port.gaps, f"neighbour: not measured, because {error.message}"))
    if found is None:
        return replace(port, gaps=(*port.gaps, "neighbour: none announces itself by LLDP"))
    return replace(port, neighbour=found)


def find_neighbour(commands: Commands, interface: str) -> Neighbour | None:
    """None without a neighbour. Raises SwitchError if no LLDP daemon runs."""
    # json0: each element is a list, also if it has one entry.
    document = read_json(commands, ["lldpcli", "-f", "json0", "show", "neighbors", "details", "ports", interface])
    neighbour: Neighbour | None = parsed(commands, "the output of lldpcli", lambda: _parse(document, interface))
    return neighbour


def _parse(document: Any, interface: str) -> Neighbour | None:
    for top in document["lldp"]:
        for found in top.get("interface", ()):
            if found["name"] == interface:
                chassis, port = found["chassis"][0], found["port"][0]
                names = [*chassis.get("name", ()), *chassis.get("id", ())]
                ports = [*port.get("descr", ()), *port.get("id", ())]
                return Neighbour(_clean(names), _clean(ports), _describe_evb(found))
    return None


def _clean(values: list[Any]) -> str:
    """The first value, which any station on the wire chooses."""
    text = str(values[0]["value"]) if values else ""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:128])


def _describe_evb(found: Any) -> str:
    for value in _find_evb(found):
        parts = [int(part, 16) for part in value.split(",")]
        claims = [text for byte, bit, text in _CLAIMS if byte < len(parts) and parts[byte] & bit]
        return ", ".join(claims) or "no reflective relay"
    return ""


def _find_evb(found: Any) -> Iterator[str]:
    for group in found.get("unknown-tlvs", ()):
        for tlv in group.get("unknown-tlv", ()):
            if (tlv["oui"].upper(), tlv["subtype"]) == _EVB:
                yield tlv["value"]
