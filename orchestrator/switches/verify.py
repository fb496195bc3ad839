"""Checks whether a switch port serves a NoHype uplink. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from orchestrator.model.proof import Verdict
from orchestrator.model.switch import PortChannel, PortNeeds, SwitchCheck, SwitchPort, SwitchState
from orchestrator.switches.base import describe_channel

_FORWARDING = "forwarding"
_NO_NEEDS: Mapping[str, PortNeeds] = {}


def check_ports(
    name: str, state: SwitchState, mtus: dict[str, int], wanted: Sequence[str] | None = None,
    needs: Mapping[str, PortNeeds] = _NO_NEEDS,
) -> tuple[SwitchCheck, ...]:  # fmt: skip
    """Args:
    name: of the switch, for hints.
    mtus: MTU of the uplink by port; ports without an uplink are absent.
    wanted: the ports to check; a missing one is a failed check. None for all ports of ``state``.
    needs: of guests, by port; reflective relay for other ports.
    """
    known = {port.name: port for port in state.ports}
    checks: list[SwitchCheck] = []
    for one in known if wanted is None else wanted:
        if port := known.get(one):
            # Of a port without an uplink, such as another host's, it is not known which translations there should be.
            checks += _check_port(name, state, port, mtus.get(one), needs.get(one, PortNeeds(known=port.channels)))
        else:
            hint = f"check the cable, and `port` in [uplinks.NAME]; the ports: {', '.join(known) or 'none'}"
            checks.append(SwitchCheck("port", one, Verdict.FAIL, "the bridge has no port of this name", hint))
    return tuple(checks)


def find_strays(state: SwitchState, expected: Mapping[str, str]) -> dict[str, str]:
    """Addresses of guests that the switch has seen at another port: another station sends from them. Address → that port.

    ``expected``: the port of each address.
    """
    return {
        entry.mac: port.name
        for port in state.ports
        for entry in port.fdb
        if entry.mac in expected and port.name != expected[entry.mac]
    }


def describe_faults(checks: tuple[SwitchCheck, ...]) -> str:
    """Empty if no check failed."""
    return "; ".join(f"port {check.port}: {check.text}" for check in checks if check.verdict is Verdict.FAIL)


def _check_port(name: str, state: SwitchState, port: SwitchPort, mtu: int | None, needs: PortNeeds) -> Iterator[SwitchCheck]:
    turn_on = f"run `nohype switch hairpin {name} {port.name} on`"
    if needs.relay:
        text = "hairpin off: frames between guests do not return"
        yield _judge("hairpin", port, "hairpin on", text, turn_on, passed=port.hairpin)
    else:
        yield SwitchCheck("hairpin", port.name, Verdict.PASS, "not needed: each guest has a VLAN of its own")
    if not needs.relay or needs.known or port.channels:
        yield _check_channels(port, needs)
    problem = _find_link_problem(port)
    yield _judge("forwarding", port, "forwards", problem, "set the port up; check cable and spanning tree", passed=not problem)
    yield _check_isolated(port)
    yield _check_mtu(port, mtu)
    if state.vlan_filtering:
        has_pvid = any(vlan.pvid for vlan in port.vlans)
        text = "untagged frames of the host are dropped: the port has no PVID"
        hint = f"run `bridge vlan add dev {port.name} vid NUMBER pvid untagged` on the switch"
        yield _judge("vlan", port, "untagged frames have a VLAN", text, hint, passed=has_pvid)
        if needs.vlans:
            yield _check_networks(port, needs.vlans)
    if state.fail_mode is None or not (needs.relay or needs.channels):
        return
    yield from _check_flows(state, port, turn_on)


def _check_flows(state: SwitchState, port: SwitchPort, turn_on: str) -> Iterator[SwitchCheck]:
    """Of Open vSwitch."""
    text = f"fail-mode {state.fail_mode}: without its flows the switch forwards, but does not reflect"
    yield _judge("fail-mode", port, "fail-mode secure", text, turn_on, passed=state.fail_mode == "secure")
    if state.flows is not None:
        found = f"{state.flows} flows of the relay table"
        yield _judge("flows", port, found, "the relay table has no flows", turn_on, passed=state.flows > 0)
    if state.other_flows:
        text = f"{state.other_flows} flows that the manager did not create can bypass the relay table"
        yield _judge("other-flows", port, "", text, "use a bridge of its own for NoHype hosts", passed=False)


def _check_networks(port: SwitchPort, vlans: frozenset[int]) -> SwitchCheck:
    """A bridge that filters VLANs drops the frames of the others, also with hairpin on."""
    if missing := sorted(vlans - {vlan.id for vlan in port.vlans if not vlan.untagged}):
        text = f"the port does not carry VLAN {missing[0]} with its tag: frames between guests of that network are lost"
        hint = f"run `bridge vlan add dev {port.name} vid {missing[0]}` on the switch"
        return SwitchCheck("networks", port.name, Verdict.FAIL, text, hint)
    listed = ", ".join(map(str, sorted(vlans)))
    return SwitchCheck("networks", port.name, Verdict.PASS, f"carries the VLANs of guests' networks: {listed}")


def find_untranslated(port: SwitchPort, channels: Iterable[PortChannel]) -> list[str]:
    """One text per VLAN of a guest that the port does not translate, or not as it should."""
    actual = {one.vlan: one for one in port.channels}
    findings = []
    for one in channels:
        found = actual.get(one.vlan)
        if found is None:
            findings.append(f"VLAN {one.vlan} of {one.mac} is not translated: its frames reach no other guest")
        elif (found.switch_vlan, found.mac or one.mac) != (one.switch_vlan, one.mac):
            findings.append(f"the translation is {describe_channel(found)}, expected {describe_channel(one)}")
    return findings


def _check_channels(port: SwitchPort, needs: PortNeeds) -> SwitchCheck:
    findings = find_untranslated(port, needs.channels)
    known = {one.vlan for one in needs.known}
    findings += [f"{describe_channel(one)} is translated, but no guest has it" for one in port.channels if one.vlan not in known]
    good = "; ".join(map(describe_channel, port.channels)) or "no VLANs of guests"
    hint = "the manager sets lost translations of running guests again; for others, check who changes the switch"
    return _judge("channels", port, good, "; ".join(findings), hint, passed=not findings)


def _judge(name: str, port: SwitchPort, good: str, bad: str, hint: str, *, passed: bool) -> SwitchCheck:
    if passed:
        return SwitchCheck(name, port.name, Verdict.PASS, good)
    return SwitchCheck(name, port.name, Verdict.FAIL, bad, hint)


def _find_link_problem(port: SwitchPort) -> str:
    if not port.up:
        return "the port is down"
    if not port.carrier:
        return "the port has no carrier"
    return "" if port.state == _FORWARDING else f"spanning tree state {port.state}, expected {_FORWARDING}"


def _check_isolated(port: SwitchPort) -> SwitchCheck:
    if port.isolated is None:
        return SwitchCheck("isolated", port.name, Verdict.NOT_MEASURED, "the switch reports no isolation")
    # An isolated port sends nothing to an isolated port, itself included (net/bridge/br_forward.c).
    text = "isolated: the port does not reflect, and other isolated ports are not reached"
    hint = f"run `bridge link set dev {port.name} isolated off` on the switch"
    return _judge("isolated", port, "not isolated", text, hint, passed=not port.isolated)


def _check_mtu(port: SwitchPort, mtu: int | None) -> SwitchCheck:
    if port.mtu is None or mtu is None:
        missing = "switch port" if port.mtu is None else "uplink"
        return SwitchCheck("mtu", port.name, Verdict.NOT_MEASURED, f"the MTU of the {missing} is not known")
    text = f"MTU {port.mtu}, the uplink has {mtu}: longer frames are lost"
    hint = f"set the MTU of the port to at least {mtu}"
    return _judge("mtu", port, f"MTU {port.mtu}, uplink {mtu}", text, hint, passed=port.mtu >= mtu)
