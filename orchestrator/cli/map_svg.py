"""The host as one SVG file: no scripts, text that can be selected, light and dark. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape

from orchestrator.cli.lights import find_lights
from orchestrator.cli.map import (
    SHARED,
    UNMANAGED,
    choose_letters,
    describe_unmanaged,
    explain_unmanaged,
    find_unmanaged_cpus,
)
from orchestrator.cli.output import format_size, printable
from orchestrator.client.host_shapes import CoreUse, Host
from orchestrator.client.shapes import Controller, Pf
from orchestrator.values import CpuSet

_WIDTH, _MARGIN, _LABEL = 1120, 20, 110  # _LABEL: where the cells begin
_CELL, _THREAD, _GAP, _LINE = 18, 8, 3, 22  # _THREAD: the width of a character
_PAGE_USES = ("claimed", "quarantined", "housekeeping", "foreign", "free")
_COLOURS = 10  # of guests; letters tell them apart

_RULES = """
svg { font: 13px system-ui, sans-serif; }
text { white-space: pre; }
.cell text { font: 11px ui-monospace, monospace; text-anchor: middle; }
.title { font-size: 17px; font-weight: 600; }
.unusable rect { stroke-dasharray: 3 2; }
.stopped rect { fill-opacity: .35; }
.unmanaged rect { stroke-width: 2; }
.quarantined rect, .bar.quarantined { stroke-width: 2; }
"""
_FILLS = {
    ".page": ("#fff", "#14171a"), "text": ("#1b1f23", "#e6e8ea"), ".quiet": ("#57606a", "#9aa4ae"),
    ".bad": ("#b3261e", "#ff8a80"), ".good": ("#1a7f37", "#6fdd8b"), ".open": ("#8a5a00", "#f2c14e"),
    ".free rect, .bar.free": ("#fff", "#1d2126"), ".housekeeping rect, .bar.housekeeping, .host rect": ("#d0d7de", "#3a424b"),
    ".unusable rect": ("#eaeef2", "#262b31"), ".quarantined rect, .bar.quarantined": ("#ffc9c4", "#7a2620"),
    ".unmanaged rect": ("#ffdf9e", "#6b4d0f"),
    ".bar.claimed": ("#a5d6ff", "#1f4f7d"), ".bar.foreign": ("#ffdf9e", "#6b4d0f"),
    **{f".g{number} rect": (f"hsl({36 * number}, 75%, 84%)", f"hsl({36 * number}, 45%, 30%)") for number in range(_COLOURS)},
}  # fmt: skip
"""Selector → its colour on a light and on a dark page. Plain rules: many viewers know neither variables nor light-dark()."""


def _write_style() -> str:
    light, dark = ("\n".join(f"{name} {{ fill: {fills[index]}; }}" for name, fills in _FILLS.items()) for index in (0, 1))
    lines = ".cell rect, .bar {{ stroke: {}; stroke-width: 1; }}\n"
    shades = f"@media (prefers-color-scheme: dark) {{\n{lines.format('#6b7480')}{dark}\n}}\n"
    return f"<style>{lines.format('#8c959f')}{light}\n{shades}{_RULES}</style>\n"


def draw_svg(host: Host) -> Iterator[str]:
    """The parts of the file."""
    body, y = [], _MARGIN + 6
    for part in (
        _draw_title(host),
        _draw_cores(host),
        _draw_memory(host),
        _draw_uplinks(host),
        _draw_disks(host),
        _draw_guests(host),
    ):
        for height, text in part:
            body.append(f'<g transform="translate({_MARGIN} {y})">{text}</g>\n')
            y += height
    size = f'width="{_WIDTH}" height="{y + _MARGIN}" viewBox="0 0 {_WIDTH} {y + _MARGIN}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>NoHype host</title>\n'
    yield f'{_write_style()}<rect class="page" width="100%" height="100%"/>\n'
    yield from body
    yield "</svg>\n"


# Each part yields heights and elements, from the top down.
_Part = Iterator[tuple[int, str]]


def _draw_title(host: Host) -> _Part:
    lights = find_lights(host)
    free = sum(core["use"] == "free" for core in host["cores"])
    words = f"{len(host['guests'])} guests, {free} of {len(host['cores'])} cores free"
    yield _LINE + 4, _text(0, 12, f"Host at {host['time'][:16].replace('T', ' ')} UTC: {words}", "title")
    yield _LINE, _text(0, 12, f"proofs of the host: {lights['host']['text']}", _CLASSES[lights["host"]["verdict"]])
    for one in host["attention"]:
        yield _LINE, _text(0, 12, f"{one['text']} -> {one['command']}", "bad")
    yield 8, ""


def _draw_cores(host: Host) -> _Part:
    letters = choose_letters(host["guests"])
    numbers = {guest["name"]: number for number, guest in enumerate(host["guests"])}
    stopped = {guest["name"] for guest in host["guests"] if guest["state"] == "stopped"}
    threads = {core["cpus"]: len(CpuSet.parse(core["cpus"]).ids) for core in host["cores"]}
    unmanaged = find_unmanaged_cpus(host)
    step = _CELL - _THREAD + _THREAD * max(threads.values(), default=1) + _GAP
    columns = max(1, (_WIDTH - 2 * _MARGIN - _LABEL) // step)
    for node in sorted({core["node"] for core in host["cores"]}):
        cores = [core for core in host["cores"] if core["node"] == node]
        for begin in range(0, len(cores), columns):
            cells = []
            for column, core in enumerate(cores[begin : begin + columns]):
                guest, others = core["guest"], _find_others(core, unmanaged)
                mark = letters[guest] if guest in letters else {"housekeeping": "·", "unusable": "×"}.get(core["use"], "")
                marks = "".join(mark if not other else SHARED if guest else UNMANAGED for other in others)
                kind = f"g{numbers[guest] % _COLOURS}" if guest in numbers and core["use"] == "claimed" else core["use"]
                kind += (" stopped" if guest in stopped else "") + (" unmanaged" if any(others) else "")
                title = f"core with CPUs {core['cpus']}, socket {core['socket']}: {core['use']}{f' by {guest}' if guest else ''}"
                names = sorted({name for other in others for name in other})
                title += f"; unmanaged guest {', '.join(names)}" if names else ""
                cells.append(_cell(_LABEL + column * step, step - _GAP, kind, marks, title))
            label = _text(0, 13, f"node {node} cores") if not begin else ""
            yield _CELL + _GAP, label + "".join(cells)
        yield 8, ""
    online = {cpu for core in host["cores"] for cpu in CpuSet.parse(core["cpus"]).ids}
    if offline := CpuSet.of(set(CpuSet.parse(host["survey"]["possible"]).ids) - online):
        yield _LINE, _text(0, 13, "offline") + _text(_LABEL, 13, f"CPUs {offline}", "quiet")


def _find_others(core: CoreUse, unmanaged: Mapping[int, list[str]]) -> list[list[str]]:
    """The unmanaged guests on each CPU of a core."""
    return [unmanaged.get(cpu, []) for cpu in CpuSet.parse(core["cpus"])]


def _draw_memory(host: Host) -> _Part:
    wide = _WIDTH - 2 * _MARGIN - _LABEL - 420
    for pool in host["survey"]["pools"]:
        if not pool["total"]:
            continue
        size, x, parts, words = pool["page_size"], float(_LABEL), [], []
        counts = {one["use"]: one["count"] for one in host["pages"] if (one["node"], one["page_size"]) == (pool["node"], size)}
        for use in _PAGE_USES:
            if count := counts.get(use, 0):
                length = wide * count / pool["total"]
                parts.append(f'<rect class="bar {use}" x="{x:.1f}" y="0" width="{length:.1f}" height="{_CELL}"/>')
                words.append(f"{use} {format_size(count * size)}")
                x += length
        text = _text(_LABEL + wide + 10, 13, f"pages of {format_size(size)}: {', '.join(words)}", "quiet")
        yield _LINE, _text(0, 13, f"node {pool['node']} memory") + "".join(parts) + text
    yield 8, ""


def _draw_uplinks(host: Host) -> _Part:
    letters = choose_letters(host["guests"])
    owners = {nic["address"]: guest["name"] for guest in host["guests"] for nic in guest["nics"] if nic["address"]}
    numbers = {guest["name"]: number for number, guest in enumerate(host["guests"])}
    edges = {uplink["name"]: uplink["edge"] or "no edge mode" for uplink in host["uplinks"]}
    for pf in host["survey"]["pfs"]:
        yield _LINE, _text(0, 13, pf["interface"] or pf["address"]) + _text(_LABEL, 13, _describe_pf(pf, edges), "quiet")
        columns = (_WIDTH - 2 * _MARGIN - _LABEL) // (_CELL + _GAP)
        for begin in range(0, len(pf["vfs"]), columns):
            cells = []
            for column, vf in enumerate(pf["vfs"][begin : begin + columns]):
                guest = owners.get(vf["address"], "")
                kind = f"g{numbers[guest] % _COLOURS}" if guest else "host" if vf["use"] else "free"
                title = f"VF {vf['index']} {vf['address']}: {guest or vf['use'] or 'free'}"
                cells.append(_cell(_LABEL + column * (_CELL + _GAP), _CELL, kind, letters.get(guest, ""), title))
            yield _CELL + _GAP, "".join(cells)
        yield 6, ""
    for name in sorted({nic["interface"] for guest in host["guests"] for nic in guest["nics"] if nic["tap"]}):
        users = ", ".join(guest["name"] for guest in host["guests"] if any(nic["interface"] == name for nic in guest["nics"]))
        yield _LINE, _text(0, 13, name) + _text(_LABEL, 13, f"software edge {edges.get(name, '')}: {users}", "quiet")


def _describe_pf(pf: Pf, edges: Mapping[str, str]) -> str:
    node = "node unknown" if pf["node"] is None else f"node {pf['node']}"
    words = [f"PF {pf['address']}", pf["driver"] or "no driver", node, "link up" if pf["up"] else "link down"]
    words += [edges[pf["interface"]]] if pf["interface"] and pf["interface"] in edges else []
    return ", ".join([*words, f"{len(pf['vfs'])} of {pf['total_vfs']} VFs", *filter(None, [pf["fault"]])])


def _draw_disks(host: Host) -> _Part:
    # No driver but nvme shows the serial number, so those of guests come from their plans.
    owners = {disk["address"]: (guest["name"], disk["serial"]) for guest in host["guests"] for disk in guest["disks"]}
    for disk in host["survey"]["controllers"]:
        owner, serial = owners.get(disk["address"], ("", disk["serial"]))
        yield _LINE, _text(0, 13, "disk") + _text(_LABEL, 13, _describe_disk(disk, owner, serial), "quiet")
    yield 8, ""


def _describe_disk(disk: Controller, owner: str, serial: str | None) -> str:
    size = sum(namespace["size"] for namespace in disk["namespaces"])
    used = [*disk["uses"], *disk["signatures"], *filter(None, [disk["fault"]])]
    state = f"guest {owner}" if owner else "; ".join(used) or "free"
    return f"{serial or disk['address']}{f', {format_size(size)}' if size else ''}: {state}"


def _draw_guests(host: Host) -> _Part:
    letters = choose_letters(host["guests"])
    lights = find_lights(host)
    for number, guest in enumerate(host["guests"]):
        light = lights[guest["name"]]
        words = [guest["name"], guest["state"], f"CPUs {_join_cpus(guest['cores'])}", format_size(guest["memory"])]
        words += [f"tenant {guest['owner']}"] if guest["owner"] else []
        cell = _cell(0, _CELL, f"g{number % _COLOURS}", letters[guest["name"]], guest["name"])
        text = "   ".join(words)
        shown = text if len(text) <= _GUEST_CHARACTERS else f"{text[: _GUEST_CHARACTERS - 1]}…"
        line = f"<g><title>{_escape(text)}</title>{_text(_CELL + 8, 13, shown)}</g>"
        yield _LINE, cell + line + _text(640, 13, light["text"], _CLASSES[light["verdict"]])
    for line in describe_unmanaged(host):
        yield _LINE, _cell(0, _CELL, "unmanaged", UNMANAGED, line) + _text(_CELL + 8, 13, line)
    if why := explain_unmanaged(host):
        yield _LINE, _text(0, 13, why, "open")
    legend = "one character is a thread of a core   · housekeeping   × not isolated   pale: of a stopped guest"
    legend += f"   {UNMANAGED} unmanaged guest   {SHARED} unmanaged guest on a guest's core"
    yield _LINE, _text(0, 13, f"{legend}   empty: free; other programs may use it", "quiet")


_GUEST_CHARACTERS = 80
"""Which fit before the verdicts."""


def _join_cpus(cores: Iterable[str]) -> str:
    return str(CpuSet.parse(",".join(cores)))


_CLASSES = {"pass": "good", "not measured": "open", "fail": "bad"}


def _cell(x: float, width: int, kind: str, mark: str, title: str) -> str:
    box = f'<rect width="{width}" height="{_CELL}" rx="3"/>'
    text = f'<text x="{width / 2:g}" y="13">{_escape(mark)}</text>' if mark else ""
    return f'<g class="cell {kind}" transform="translate({x:g} 0)"><title>{_escape(title)}</title>{box}{text}</g>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    """Names come from the network. XML allows no control characters, not even as entities."""
    return escape(printable(text).replace("\n", " "))
