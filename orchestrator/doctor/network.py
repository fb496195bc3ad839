"""Checks of the network: uplinks whose frames between guests leave the server."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.doctor.firmware import SRIOV
from orchestrator.errors import HostError
from orchestrator.host.edge import may_have_vepa
from orchestrator.host.interfaces import read_index
from orchestrator.host.link_files import is_wireless, list_missing_nodes
from orchestrator.host.link_owner import find_owner, shows_state
from orchestrator.host.vf_drivers import VfControls, find_controls
from orchestrator.model.topology import PhysicalFunction

_SOFTWARE = "without it, guests can get a software edge (--accept software-edge), whose frames the host's kernel forwards"

_CONTROLS = {"spoof_check": "no spoof check", "max_rate": "no maximum rate", "trust": "no trust setting"}


def _describe(pf: PhysicalFunction) -> str:
    return f"{pf.interface or pf.address} ({pf.driver or 'no driver'}, {pf.device})"


def _check_sriov(facts: Facts) -> Finding:
    pfs = facts.topology.pfs
    needed = f"a network card with SR-IOV; {_SOFTWARE}"
    if not pfs:
        return failed("no network function with SR-IOV", needed, f"{SRIOV}, or use another card")
    useless = [f"{_describe(pf)}: {reason}" for pf in pfs if (reason := pf.describe_uselessness())]
    if len(useless) == len(pfs):
        if all(pf.is_unknown for pf in pfs):
            return not_measured("; ".join(useless), needed, "use a kernel that shows the SR-IOV capability of cards")
        return failed("; ".join(useless), needed, f"bind the card's driver, and set its port up; if VFs are missing, {SRIOV}")
    parts = [f"{_describe(pf)}: up to {pf.total_vfs} VFs" for pf in pfs if not pf.describe_uselessness()]
    return passed("; ".join((*parts, *useless)))


def _list_useful(facts: Facts) -> list[PhysicalFunction]:
    return [pf for pf in facts.topology.pfs if not pf.describe_uselessness()]


def _check_link(facts: Facts) -> Finding:
    found = _list_useful(facts)
    needed = "an uplink with carrier, connected to the external switch"
    if not found:
        return not_measured("no network function with SR-IOV", needed)
    up = [_describe(pf) for pf in found if pf.up]
    down = [_describe(pf) for pf in found if not pf.up]
    if not up:
        return failed(
            f"without carrier: {', '.join(down)}",
            needed,
            f"run `ip link set {found[0].interface} up`, and check cable and switch port",
        )
    return passed(f"with carrier: {', '.join(up)}" + (f"; without: {', '.join(down)}" if down else ""))


def _check_vepa(facts: Facts) -> Finding:
    found = _list_useful(facts)
    needed = "a card and driver that can switch frames between VFs outside (VEPA)"
    if not found:
        return not_measured("no network function with SR-IOV", needed)
    able = [_describe(pf) for pf in found if may_have_vepa(pf)]
    if not able:
        remedy = 'set `edge = "channel"` for the uplink, which needs a switch that translates VLANs'
        return failed(f"not known to support VEPA: {', '.join(map(_describe, found))}", needed, remedy)
    return passed(
        f"known to support VEPA: {', '.join(able)}. Whether the switch sends frames back is measured by `nohype uplink prove`"
    )


def _check_controls(facts: Facts) -> Finding:
    found = _list_useful(facts)
    needed = "a driver that enforces the address, the trust and the rate of each VF"
    if not found:
        return not_measured("no network function with SR-IOV", needed)
    lacking, unknown = [], []
    for pf in found:
        controls = _find_controls(facts, pf)
        if controls is None:
            unknown.append(_describe(pf))
        elif missing := [text for name, text in _CONTROLS.items() if not getattr(controls, name)]:
            lacking.append(f"{_describe(pf)}: {', '.join(missing)}")
    if lacking:
        remedy = "use a card of another kind for guests that need it: the audit reports what it cannot enforce as weaker"
        return failed("; ".join(lacking), needed, remedy)
    if unknown:
        return not_measured(f"not known for {', '.join(unknown)}", needed, "create a VF, and look at `ip link show NAME`")
    return passed(f"spoof check, trust and rates can be set: {', '.join(map(_describe, found))}")


def _find_controls(facts: Facts, pf: PhysicalFunction) -> VfControls | None:
    """By its driver, corrected by what its VFs show, where there are any."""
    known = find_controls(pf)
    try:
        states = facts.host.net.read_vfs(pf.interface) if pf.vfs and pf.interface else ()
    except HostError:
        states = ()
    if not states:
        return known
    first = states[0]
    return VfControls(
        spoof_check=first.spoof_check is not None, max_rate=known is None or known.max_rate, trust=first.trust is not None
    )


def _check_nodes(facts: Facts) -> Finding:
    found = _list_useful(facts)
    if not found:
        return not_measured("no network function with SR-IOV", "a known NUMA node")
    unknown = [_describe(pf) for pf in found if pf.node is None]
    if unknown and len({core.node for core in facts.cores}) > 1:
        remedy = "enable NUMA in the firmware settings (not: node interleaving), and update the firmware"
        return failed(f"not known for {', '.join(unknown)}", "the NUMA node of each uplink, to choose cores near it", remedy)
    return passed(", ".join(f"{_describe(pf)} on node {pf.node if pf.node is not None else 0}" for pf in found))


def _check_owners(facts: Facts) -> Finding:
    names = [pf.interface for pf in _list_useful(facts) if pf.interface]
    managed, unseen = [], []
    for name in names:
        index = read_index(facts.host, name)
        owner = find_owner(facts.host, index) if index is not None else None
        managed += [f"{name} by {owner}"] if owner else []
        unseen += [name] if owner is None else []
    needed = "uplinks that only the manager configures"
    if not names:
        return not_measured("no network function with SR-IOV", needed)
    if not shows_state(facts.host):
        return not_measured("the state of systemd and NetworkManager is not visible in /run", needed)
    if managed:
        remedy = "run `nmcli device set NAME managed no`, or use Unmanaged=yes in a .network file of systemd-networkd"
        return failed(f"managed: {', '.join(managed)}", needed, remedy)
    if unseen:
        text = f"not visible for {', '.join(unseen)}: not in this network namespace, or systemd-networkd has not decided yet"
        return not_measured(text, needed)
    return passed("no other program configures an uplink")


def _check_software(facts: Facts) -> Finding:
    topology = facts.topology
    if any(pf.up for pf in _list_useful(facts)):
        return passed("none is needed: an uplink has VFs")
    if problem := next((text for text in topology.problems if "network interfaces" in text), ""):
        return not_measured(
            problem, "an interface that can be the uplink of a software edge", "run `apt install python3-pyroute2`"
        )
    ports = {pf.interface for pf in topology.pfs}
    found = [one.name for one in topology.interfaces if one.up and not one.kind and not one.master and one.name not in ports]
    found = [name for name in found if not is_wireless(facts.host, name)]  # which sends only frames of its own address
    if not found:
        return failed(
            "no other interface with a carrier",
            "an interface for guests that accept a software edge",
            "none is needed if all guests get VFs",
        )
    if missing := list_missing_nodes(facts.host):
        text = f"{', '.join(found)}: possible uplinks, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        return failed(text, "devices for the interfaces of guests (tun, vhost)", "run `modprobe tun`, and `modprobe vhost_net`")
    return passed(f"{', '.join(found)}: possible uplinks for guests that accept a software edge")


_N = Principle.NETWORK
CHECKS = (
    Check("sr-iov", _N, "a network card has virtual functions", "sriov_totalvfs of PCI functions", _check_sriov),
    Check("uplink-link", _N, "an uplink has a carrier", "state of network interfaces", _check_link),
    # A card without it can have the edge mode `channel`.
    Check("vepa", _N, "the card can send frames between guests to the switch", "chip and driver", _check_vepa, required=False),
    Check(
        "vf-controls",
        _N,
        "the card's driver enforces settings of VFs",
        "driver, settings of existing VFs",
        _check_controls,
        required=False,
    ),
    Check(
        "uplink-node",
        _N,
        "the NUMA node of each uplink is known",
        "numa_node of PCI functions",
        _check_nodes,
        required=False,
    ),
    Check(
        "software-edge", _N, "there is an uplink for guests without VFs", "network interfaces", _check_software, required=False
    ),
    Check(
        "uplink-owner",
        _N,
        "no other program configures uplinks",
        "state files of NetworkManager and systemd-networkd",
        _check_owners,
        required=False,
    ),
)
