"""The pages of `nohype top`: lines of text with their colours. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from orchestrator.cli.host_rates import OtherRate, VcpuRates
from orchestrator.cli.lights import find_lights
from orchestrator.cli.map import draw
from orchestrator.cli.output import format_size
from orchestrator.client.host_shapes import Host, VfSettings
from orchestrator.client.shapes import Guest
from orchestrator.values import CpuSet

Line = tuple[str, str]
"""A line and its colour, empty for none. No colour is needed to read it."""

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = {"pass": "", "not measured": "yellow", "fail": "red"}
_NOT_REPORTED: VfSettings = {
    "address": "", "guest": "", "mac": None, "vlan": None, "min_rate": None, "max_rate": None, "spoof_check": None, "trust": None,
    "link_state": None, "differences": [], "why": "this version of the manager does not report its settings",
}  # fmt: skip
_MOST_THREADS = 5
_WAIT_LIMIT = 0.001
"""Seconds per second: more than a timer interrupt takes of a core."""


class PlanResult(TypedDict):
    """Whether a guest of the request could be created now. ``reasons``: why each candidate was refused."""

    fits: bool
    text: str
    reasons: Sequence[str]


@dataclass(frozen=True)
class Reading:
    """``plan``: None without a request.

    ``history``: VM exits per second of each vCPU (guest, index) in the last minute, oldest first. ``others``: by guest, threads
    of others that ran on its cores; None for a guest if not measured.
    """

    host: Host
    rates: Mapping[str, tuple[VcpuRates, ...]]
    history: Mapping[tuple[str, int], Sequence[float]]
    plan: PlanResult | None = None
    others: Mapping[str, tuple[OtherRate, ...] | None] = field(default_factory=dict)


def show_head(reading: Reading) -> Iterator[Line]:
    """State of the host in one line, then what needs a person."""
    host = reading.host
    running = sum(guest["state"] == "running" for guest in host["guests"])
    free = sum(core["use"] == "free" for core in host["cores"])
    light = find_lights(host)["host"]
    words = [host["time"][11:19] + " UTC", f"{len(host['guests'])} guests, {running} running"]
    words += [f"{free} of {len(host['cores'])} cores free", f"proofs of the host: {light['text']}"]
    yield "   ".join(words), ""
    for one in host["attention"]:
        since = f"since {one['since'][:16].replace('T', ' ')} " if one["since"] else ""
        yield f"! {since}{one['text']} -> {one['command']}", "red"
    if plan := reading.plan:
        yield plan["text"], "" if plan["fits"] else "red"
        yield from ((f"  {reason}", "") for reason in plan["reasons"])
    yield "", ""


def show_guests(reading: Reading) -> Iterator[Line]:
    heading = ("GUEST", "STATE", "CPUS", "BUSY", "WAIT", "EXITS/S", "MOST", "PROOFS")
    rows: list[tuple[str, ...]] = [heading]
    colours = [""]
    lights = find_lights(reading.host)
    for guest in reading.host["guests"]:
        vcpus = reading.rates.get(guest["name"], ())
        light = lights[guest["name"]]
        cpus = str(CpuSet.of(guest["cpus"])) if guest["cpus"] else "-"
        rows.append((guest["name"], guest["state"], cpus, *_show_use(vcpus), *_show_exits(vcpus), light["text"]))
        colours.append(_COLOURS[light["verdict"]])
    yield from zip(_align(rows), colours, strict=True)
    yield from _explain_waits(reading)
    for one in reading.host["activity"]:
        if one["why"]:
            yield f"not measured, guest {one['guest']}: {one['why']}", "yellow"


def _explain_waits(reading: Reading) -> Iterator[Line]:
    """Which threads took the time of guests whose vCPUs had to wait."""
    for guest, vcpus in reading.rates.items():
        if _is_waiting(vcpus):
            others = reading.others.get(guest)
            names = [str(other) for other in (others or ())[:_MOST_THREADS]]
            names += [f"{len(others) - len(names)} more"] if others and len(others) > len(names) else []
            found = "not measured" if others is None else ", ".join(names) or "none"
            yield f"! guest {guest} waited; other threads on its cores, in time slices per second: {found}", "red"


def show_vcpus(reading: Reading) -> Iterator[Line]:
    """With the limits of the guest's exit policy."""
    rows: list[tuple[str, ...]] = [("GUEST", "VCPU", "CPU", "BUSY", "WAIT", "EXITS/S", "LIMITS/S", "LAST MINUTE", "CLASSES")]
    colours = [""]
    for guest in reading.host["guests"]:
        for index, vcpu in enumerate(reading.rates.get(guest["name"], ())):
            limits = _find_limits(guest, index)
            found = {"all": vcpu.exits or 0.0, **(vcpu.reasons or {}), **(vcpu.classes or {})}
            spark = draw_spark(reading.history.get((guest["name"], index), ()))
            classes = sorted((vcpu.classes or {}).items(), key=lambda item: -item[1])
            rows.append((
                guest["name"] if not index else "", str(index), str(vcpu.cpu), *_show_use((vcpu,)), _number(vcpu.exits),
                ", ".join(f"{name} {limit}" for name, limit in limits.items()) or "-", spark,
                ", ".join(f"{name} {rate:.1f}" for name, rate in classes if rate),
            ))  # fmt: skip
            colours.append("red" if any(found.get(name, 0.0) > limit for name, limit in limits.items()) else "")
    yield from zip(_align(rows), colours, strict=True)


def show_vfs(reading: Reading) -> Iterator[Line]:
    """All virtual functions, with addresses in full and the settings that the NIC enforces; red if they are not as required."""
    edges = {nic["address"]: nic["edge"] for guest in reading.host["guests"] for nic in guest["nics"] if nic["address"]}
    settings = {vf["address"]: vf for vf in reading.host["vfs"]}
    rows: list[tuple[str, ...]] = [
        ("UPLINK", "VF", "ADDRESS", "NODE", "DRIVER", "MAC", "VLAN", "RATE", "SPOOF CHECK", "TRUST", "EDGE", "OWNER")
    ]
    colours, notes = [""], []
    for pf in reading.host["survey"]["pfs"]:
        for vf in pf["vfs"]:
            now = settings.get(vf["address"], _NOT_REPORTED)
            owner = now["guest"] or (f"host: {vf['use']}" if vf["use"] else "free")
            different = bool(now["differences"])
            rows.append((
                pf["interface"] or pf["address"], str(vf["index"]), vf["address"], _text(pf["node"]), vf["driver"] or "-",
                now["mac"] or "-", _number_or_none(now["vlan"]), _number_or_none(now["max_rate"]), _switch(now["spoof_check"]),
                _switch(now["trust"]), edges.get(vf["address"], "-"), f"{owner} !" if different else owner,
            ))  # fmt: skip
            colours.append("red" if different else "")
            notes += [(f"! VF {vf['address']}: {'; '.join(now['differences'])}", "red")] if different else []
            notes += [(f"not measured, VF {vf['address']}: {now['why']}", "yellow")] if now["why"] else []
    yield from zip(_align(rows), colours, strict=True)
    yield from notes
    for uplink in reading.host["uplinks"]:
        state = "up" if uplink["up"] else "down"
        yield f"uplink {uplink['name']}: {state}, edge mode {uplink['edge'] or 'none'}" + _because(uplink["why"]), ""


def show_nodes(reading: Reading) -> Iterator[Line]:
    """What a new guest can get from each node, and who has the huge pages."""
    host = reading.host
    owned = {nic["address"] for guest in host["guests"] for nic in guest["nics"]}
    rows: list[tuple[str, ...]] = [
        (
            "NODE",
            "FREE CORES",
            "PAGES",
            "FREE",
            "OF GUESTS",
            "QUARANTINED",
            "RESERVED",
            "OTHER PROGRAMS",
            "FREE VFS",
            "LARGEST GUEST",
        )
    ]
    for pool in host["survey"]["pools"]:
        if not pool["total"]:
            continue
        node, size = pool["node"], pool["page_size"]
        uses = {one["use"]: one["count"] for one in host["pages"] if (one["node"], one["page_size"]) == (node, size)}
        cores = [core for core in host["cores"] if core["node"] == node]
        vfs = [vf for pf in host["survey"]["pfs"] if pf["node"] == node for vf in pf["vfs"]]
        free = sum(core["use"] == "free" for core in cores)
        counts = (format_size(size * uses.get(use, 0)) for use in ("free", "claimed", "quarantined", "housekeeping", "foreign"))
        free_vfs = sum(not vf["use"] and vf["address"] not in owned for vf in vfs)
        room = size * uses.get("free", 0)
        largest = f"{free} cores, {format_size(room)}" if free and room else "none"
        rows.append((str(node), f"{free} of {len(cores)}", format_size(size), *counts, f"{free_vfs} of {len(vfs)}", largest))
    yield from ((line, "") for line in _align(rows))
    yield "a guest gets its cores and its pages from one node, and a VF of that node if there is one", ""


def show_cores(reading: Reading, width: int) -> Iterator[Line]:
    yield from ((line, "") for line in draw(reading.host, width))


PAGES: Mapping[str, tuple[str, Callable[[Reading, int], Iterator[Line]]]] = {
    "1": ("cores", show_cores),
    "2": ("guests", lambda reading, _width: show_guests(reading)),
    "3": ("VFs", lambda reading, _width: show_vfs(reading)),
    "4": ("nodes", lambda reading, _width: show_nodes(reading)),
    "5": ("vCPUs", lambda reading, _width: show_vcpus(reading)),
}
"""By key: the name of the page, and its lines at a width."""


def draw_spark(values: Sequence[float]) -> str:
    """One character per value, relative to the largest."""
    most = max(values, default=0)
    return "".join(_BARS[round(value / most * (len(_BARS) - 1)) if most else 0] for value in values)


def _show_use(vcpus: Sequence[VcpuRates]) -> tuple[str, str]:
    """The busiest vCPU, and the longest wait in ms per second."""
    ran = [vcpu.ran for vcpu in vcpus if vcpu.ran is not None]
    waited = [vcpu.waited for vcpu in vcpus if vcpu.waited is not None]
    mark = "!" if _is_waiting(vcpus) else ""
    return f"{max(ran):.0%}" if ran else "-", f"{max(waited) * 1000:.1f}{mark}" if waited else "-"


def _is_waiting(vcpus: Sequence[VcpuRates]) -> bool:
    return any(vcpu.waited is not None and vcpu.waited > _WAIT_LIMIT for vcpu in vcpus)


def _show_exits(vcpus: Sequence[VcpuRates]) -> tuple[str, str]:
    """All exits of the guest per second, and the class with the most."""
    classes: dict[str, float] = {}
    for vcpu in vcpus:
        for name, rate in (vcpu.classes or {}).items():
            classes[name] = classes.get(name, 0) + rate
    if not vcpus or any(vcpu.exits is None for vcpu in vcpus):
        return "-", "-"
    name = max(classes, key=lambda one: classes[one], default="")
    return _number(sum(classes.values())), f"{name} {classes[name]:.1f}" if name and classes[name] else "-"


def _find_limits(guest: Guest, vcpu: int) -> dict[str, int]:
    """Exits per second that the guest's policy allows this vCPU, by class or reason, or "all"."""
    policy = guest["exit_policy"]
    if policy is None:
        return {}
    housekeeping = CpuSet.parse(guest["housekeeping_vcpus"] or "").ids
    budgets = policy["housekeeping"] if vcpu in housekeeping else policy["application"]
    return {name: budget["second"] for name, budget in budgets.items() if budget["second"] is not None}


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _number_or_none(value: int | None) -> str:
    return str(value) if value else "-"


def _switch(value: bool | None) -> str:  # noqa: FBT001
    return "-" if value is None else "on" if value else "off"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _because(why: str) -> str:
    return f" ({why})" if why else ""
