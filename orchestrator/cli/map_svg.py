"""The host as one SVG file: no scripts, text that can be selected, light and dark. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from orchestrator.cli.lights import find_lights
from orchestrator.cli.map import (
    SHARED,
    UNMANAGED,
    choose_letters,
    describe_unmanaged,
    explain_unmanaged,
    find_unmanaged_cpus,
)
from orchestrator.cli.output import format_size
from orchestrator.cli.svg import (
    CELL,
    COLOURS,
    GAP,
    LABEL,
    LINE,
    MARGIN,
    WIDTH,
    Part,
    draw_cell,
    draw_page,
    draw_text,
    escape_text,
)
from orchestrator.client.host_shapes import CoreUse, Host
from orchestrator.client.shapes import Controller, Pf
from orchestrator.values import CpuSet

_THREAD = 8
"""Pixels of a character."""
_PAGE_USES = ("claimed", "quarantined", "housekeeping", "foreign", "free")


def draw_svg(host: Host) -> Iterator[str]:
    """The parts of the file."""
    parts = (_draw_title, _draw_cores, _draw_memory, _draw_uplinks, _draw_disks, _draw_guests)
    yield from draw_page("NoHype host", (part(host) for part in parts))


def _draw_title(host: Host) -> Part:
    lights = find_lights(host)
    free = sum(core["use"] == "free" for core in host["cores"])
    words = f"{len(host['guests'])} guests, {free} of {len(host['cores'])} cores free"
    yield LINE + 4, draw_text(0, 12, f"Host at {host['time'][:16].replace('T', ' ')} UTC: {words}", "title")
    yield LINE, draw_text(0, 12, f"proofs of the host: {lights['host']['text']}", _CLASSES[lights["host"]["verdict"]])
    for one in host["attention"]:
        yield LINE, draw_text(0, 12, f"{one['text']} -> {one['command']}", "bad")
    yield 8, ""


def _draw_cores(host: Host) -> Part:
    letters = choose_letters(host["guests"])
    numbers = {guest["name"]: number for number, guest in enumerate(host["guests"])}
    stopped = {guest["name"] for guest in host["guests"] if guest["state"] == "stopped"}
    threads = {core["cpus"]: len(CpuSet.parse(core["cpus"]).ids) for core in host["cores"]}
    unmanaged = find_unmanaged_cpus(host)
    step = CELL - _THREAD + _THREAD * max(threads.values(), default=1) + GAP
    columns = max(1, (WIDTH - 2 * MARGIN - LABEL) // step)
    for node in sorted({core["node"] for core in host["cores"]}):
        cores = [core for core in host["cores"] if core["node"] == node]
        for begin in range(0, len(cores), columns):
            cells = []
            for column, core in enumerate(cores[begin : begin + columns]):
                guest, others = core["guest"], _find_others(core, unmanaged)
                mark = letters[guest] if guest in letters else {"housekeeping": "·", "unusable": "×"}.get(core["use"], "")
                marks = "".join(mark if not other else SHARED if guest else UNMANAGED for other in others)
                kind = f"g{numbers[guest] % COLOURS}" if guest in numbers and core["use"] == "claimed" else core["use"]
                kind += (" stopped" if guest in stopped else "") + (" unmanaged" if any(others) else "")
                title = f"core with CPUs {core['cpus']}, socket {core['socket']}: {core['use']}{f' by {guest}' if guest else ''}"
                names = sorted({name for other in others for name in other})
                title += f"; unmanaged guest {', '.join(names)}" if names else ""
                cells.append(draw_cell(LABEL + column * step, step - GAP, kind, marks, title))
            label = draw_text(0, 13, f"node {node} cores") if not begin else ""
            yield CELL + GAP, label + "".join(cells)
        yield 8, ""
    online = {cpu for core in host["cores"] for cpu in CpuSet.parse(core["cpus"]).ids}
    if offline := CpuSet.of(set(CpuSet.parse(host["survey"]["possible"]).ids) - online):
        yield LINE, draw_text(0, 13, "offline") + draw_text(LABEL, 13, f"CPUs {offline}", "quiet")


def _find_others(core: CoreUse, unmanaged: Mapping[int, list[str]]) -> list[list[str]]:
    """The unmanaged guests on each CPU of a core."""
    return [unmanaged.get(cpu, []) for cpu in CpuSet.parse(core["cpus"])]


def _draw_memory(host: Host) -> Part:
    wide = WIDTH - 2 * MARGIN - LABEL - 420
    for pool in host["survey"]["pools"]:
        if not pool["total"]:
            continue
        size, x, parts, words = pool["page_size"], float(LABEL), [], []
        counts = {one["use"]: one["count"] for one in host["pages"] if (one["node"], one["page_size"]) == (pool["node"], size)}
        for use in _PAGE_USES:
            if count := counts.get(use, 0):
                length = wide * count / pool["total"]
                parts.append(f'<rect class="bar {use}" x="{x:.1f}" y="0" width="{length:.1f}" height="{CELL}"/>')
                words.append(f"{use} {format_size(count * size)}")
                x += length
        text = draw_text(LABEL + wide + 10, 13, f"pages of {format_size(size)}: {', '.join(words)}", "quiet")
        yield LINE, draw_text(0, 13, f"node {pool['node']} memory") + "".join(parts) + text
    yield 8, ""


def _draw_uplinks(host: Host) -> Part:
    letters = choose_letters(host["guests"])
    owners = {nic["address"]: guest["name"] for guest in host["guests"] for nic in guest["nics"] if nic["address"]}
    numbers = {guest["name"]: number for number, guest in enumerate(host["guests"])}
    edges = {uplink["name"]: uplink["edge"] or "no edge mode" for uplink in host["uplinks"]}
    for pf in host["survey"]["pfs"]:
        yield LINE, draw_text(0, 13, pf["interface"] or pf["address"]) + draw_text(LABEL, 13, _describe_pf(pf, edges), "quiet")
        columns = (WIDTH - 2 * MARGIN - LABEL) // (CELL + GAP)
        for begin in range(0, len(pf["vfs"]), columns):
            cells = []
            for column, vf in enumerate(pf["vfs"][begin : begin + columns]):
                guest = owners.get(vf["address"], "")
                kind = f"g{numbers[guest] % COLOURS}" if guest else "host" if vf["use"] else "free"
                title = f"VF {vf['index']} {vf['address']}: {guest or vf['use'] or 'free'}"
                cells.append(draw_cell(LABEL + column * (CELL + GAP), CELL, kind, letters.get(guest, ""), title))
            yield CELL + GAP, "".join(cells)
        yield 6, ""
    for name in sorted({nic["interface"] for guest in host["guests"] for nic in guest["nics"] if nic["tap"]}):
        users = ", ".join(guest["name"] for guest in host["guests"] if any(nic["interface"] == name for nic in guest["nics"]))
        yield LINE, draw_text(0, 13, name) + draw_text(LABEL, 13, f"software edge {edges.get(name, '')}: {users}", "quiet")


def _describe_pf(pf: Pf, edges: Mapping[str, str]) -> str:
    node = "node unknown" if pf["node"] is None else f"node {pf['node']}"
    words = [f"PF {pf['address']}", pf["driver"] or "no driver", node, "link up" if pf["up"] else "link down"]
    words += [edges[pf["interface"]]] if pf["interface"] and pf["interface"] in edges else []
    return ", ".join([*words, f"{len(pf['vfs'])} of {pf['total_vfs']} VFs", *filter(None, [pf["fault"]])])


def _draw_disks(host: Host) -> Part:
    # No driver but nvme shows the serial number, so those of guests come from their plans.
    owners = {disk["address"]: (guest["name"], disk["serial"]) for guest in host["guests"] for disk in guest["disks"]}
    for disk in host["survey"]["controllers"]:
        owner, serial = owners.get(disk["address"], ("", disk["serial"]))
        yield LINE, draw_text(0, 13, "disk") + draw_text(LABEL, 13, _describe_disk(disk, owner, serial), "quiet")
    yield 8, ""


def _describe_disk(disk: Controller, owner: str, serial: str | None) -> str:
    size = sum(namespace["size"] for namespace in disk["namespaces"])
    used = [*disk["uses"], *disk["signatures"], *filter(None, [disk["fault"]])]
    state = f"guest {owner}" if owner else "; ".join(used) or "free"
    return f"{serial or disk['address']}{f', {format_size(size)}' if size else ''}: {state}"


def _draw_guests(host: Host) -> Part:
    letters = choose_letters(host["guests"])
    lights = find_lights(host)
    for number, guest in enumerate(host["guests"]):
        light = lights[guest["name"]]
        words = [guest["name"], guest["state"], f"CPUs {_join_cpus(guest['cores'])}", format_size(guest["memory"])]
        words += [f"tenant {guest['owner']}"] if guest["owner"] else []
        cell = draw_cell(0, CELL, f"g{number % COLOURS}", letters[guest["name"]], guest["name"])
        text = "   ".join(words)
        shown = text if len(text) <= _GUEST_CHARACTERS else f"{text[: _GUEST_CHARACTERS - 1]}…"
        line = f"<g><title>{escape_text(text)}</title>{draw_text(CELL + 8, 13, shown)}</g>"
        yield LINE, cell + line + draw_text(640, 13, light["text"], _CLASSES[light["verdict"]])
    for line in describe_unmanaged(host):
        yield LINE, draw_cell(0, CELL, "unmanaged", UNMANAGED, line) + draw_text(CELL + 8, 13, line)
    if why := explain_unmanaged(host):
        yield LINE, draw_text(0, 13, why, "open")
    legend = "one character is a thread of a core   · housekeeping   × not isolated   pale: of a stopped guest"
    legend += f"   {UNMANAGED} unmanaged guest   {SHARED} unmanaged guest on a guest's core"
    yield LINE, draw_text(0, 13, f"{legend}   empty: free; other programs may use it", "quiet")


_GUEST_CHARACTERS = 80
"""Which fit before the verdicts."""


def _join_cpus(cores: Iterable[str]) -> str:
    return str(CpuSet.parse(",".join(cores)))


_CLASSES = {"pass": "good", "not measured": "open", "fail": "bad"}
