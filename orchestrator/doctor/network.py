"""Checks of the network: uplinks whose frames between guests leave the server."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.host.edge import may_have_vepa
from orchestrator.host.interfaces import read_index
from orchestrator.host.link_owner import find_owner
from orchestrator.model.topology import PhysicalFunction

_SOFTWARE = "without it, guests can get a software edge (--accept software-edge), whose frames the host's kernel forwards"


def _describe(pf: PhysicalFunction) -> str:
    return f"{pf.interface or pf.address} ({pf.driver or 'no driver'}, {pf.device})"


def _check_sriov(facts: Facts) -> Finding:
    pfs = facts.topology.pfs
    needed = f"a network card with SR-IOV; {_SOFTWARE}"
    if not pfs:
        return failed(
            "no network function with SR-IOV", needed, "enable SR-IOV in the settings of firmware and card, or use another card"
        )
    useless = [f"{_describe(pf)}: {reason}" for pf in pfs if (reason := pf.describe_uselessness())]
    if len(useless) == len(pfs):
        return failed("; ".join(useless), needed, "see the reasons")
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


def _check_nodes(facts: Facts) -> Finding:
    found = _list_useful(facts)
    if not found:
        return not_measured("no network function with SR-IOV", "a known NUMA node")
    unknown = [_describe(pf) for pf in found if pf.node is None]
    if unknown and len(facts.topology.nodes) > 1:
        remedy = "enable NUMA in the firmware settings (not: node interleaving), and update the firmware"
        return failed(f"not known for {', '.join(unknown)}", "the NUMA node of each uplink, to choose cores near it", remedy)
    return passed(", ".join(f"{_describe(pf)} on node {pf.node if pf.node is not None else 0}" for pf in found))


def _check_owners(facts: Facts) -> Finding:
    names = [pf.interface for pf in _list_useful(facts) if pf.interface]
    managed = []
    for name in names:
        index = read_index(facts.host, name)
        owner = find_owner(facts.host, index) if index is not None else ""
        managed += [f"{name} by {owner}"] if owner else []
    if managed:
        remedy = "run `nmcli device set NAME managed no`, or use Unmanaged=yes in a .network file of systemd-networkd"
        return failed(f"managed: {', '.join(managed)}", "uplinks that only the manager configures", remedy)
    return passed("no other program configures an uplink" if names else "the server has no uplink with SR-IOV")


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
    if not found:
        return failed(
            "no other interface with a carrier",
            "an interface for guests that accept a software edge",
            "none is needed if all guests get VFs",
        )
    return passed(f"{', '.join(found)}: possible uplinks for guests that accept a software edge")


_N = Principle.NETWORK
CHECKS = (
    Check("sr-iov", _N, "a network card has virtual functions", "sriov_totalvfs of PCI functions", _check_sriov),
    Check("uplink-link", _N, "an uplink has a carrier", "state of network interfaces", _check_link),
    # A card without it can have the edge mode `channel`.
    Check("vepa", _N, "the card can send frames between guests to the switch", "chip and driver", _check_vepa, required=False),
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
