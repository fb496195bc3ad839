"""`nohype map`: the host as a picture of characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from shutil import get_terminal_size
from string import ascii_lowercase, ascii_uppercase
from textwrap import wrap
from typing import TextIO

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import format_size, say
from orchestrator.client import Client, shapes
from orchestrator.client.host_shapes import Host
from orchestrator.values import CpuSet

_HOST, _FREE, _OFFLINE = ".", "-", "?"
NOT_ISOLATED, UNMANAGED, SHARED = "~", "@", "!"
_LETTERS = ascii_uppercase + ascii_lowercase
_MANY = "*"  # of all guests after the letters
_INDENT, _BAR = 10, 20


@click.command()
@click.option("--svg", "file", type=click.File("w", encoding="utf-8", lazy=True), metavar="FILE",
              help="Write a picture (SVG) to FILE, - for standard output, instead of text.")  # fmt: skip
@client_option
def map(*, file: TextIO | None, client: Client) -> None:  # noqa: A001
    """Draw the host, and which guest has what of it.

    Shows cores, huge pages, virtual functions and disks. One character is a CPU or a virtual function, and brackets hold the CPUs
    of a core. A letter is a guest, of which the last part has the names; a stopped guest keeps what it has. Cores that guests
    cannot have because they are not isolated are marked ~. CPUs on which unmanaged virtual machines run are marked @, or ! if a
    guest owns the CPU. What else no guest of the manager has is shown as free; other programs may use it.
    """
    host = client.host()
    if file is not None:
        from orchestrator.cli.map_svg import draw_svg

        file.write("".join(draw_svg(host)))
        return
    width = max(60, min(get_terminal_size((100, 24)).columns, 160))
    for line in draw(host, width):
        say(line)


def draw(host: Host, width: int = 100) -> Iterator[str]:
    """Lines of at most ``width`` characters, except for names that are longer. Pure."""
    guests, survey = host["guests"], host["survey"]
    letters = choose_letters(guests)
    marks = _mark_cpus(host, letters)
    yield from _draw_cores(marks, survey, width)
    yield from _draw_pages(survey)
    yield from _draw_uplinks(guests, letters, survey, width)
    yield from _draw_disks(guests, letters, survey)
    meanings = {NOT_ISOLATED: "not isolated", UNMANAGED: "unmanaged guest", SHARED: "unmanaged guest on a guest's CPU"}
    legend = [f"{mark} {text}" for mark, text in meanings.items() if mark in marks.values()]
    for line in wrap("   ".join((f"{_HOST} host", f"{_FREE} free", f"{_OFFLINE} offline", *legend)), width - _INDENT):
        yield f"{'':{_INDENT}}{line}"
    for guest in guests:
        yield _describe(letters[guest["name"]], guest)
    yield from (f"{UNMANAGED:>{_INDENT - 2}}  {line}" for line in describe_unmanaged(host))
    if why := explain_unmanaged(host):
        yield f"{'':{_INDENT}}{why}"


def describe_unmanaged(host: Host) -> Iterator[str]:
    """A line per virtual machine that the manager did not create."""
    for guest in host["unmanaged"] or ():
        process = "" if guest["pid"] is None else f", process {guest['pid']}"
        where = f"may run on CPUs {guest['cpus']}" if guest["confined"] else f"may run on all CPUs, last ran on {guest['cpus']}"
        yield f"{guest['name']} (unmanaged {guest['kind']}{process})  {guest['why'] or where}"


def explain_unmanaged(host: Host) -> str:
    """Which of those machines are not known, and why; empty if all are."""
    if host["unmanaged"] is None:
        return "not measured: unmanaged guests: this version of the manager does not report them"
    return f"not measured: {host['unmanaged_why']}" if host["unmanaged_why"] else ""


def find_unmanaged_cpus(host: Host) -> dict[int, list[str]]:
    """By CPU, without those for housekeeping, the names of the unmanaged guests that run on it."""
    found: dict[int, list[str]] = {}
    for guest in host["unmanaged"] or ():
        for cpu in CpuSet.parse(guest["cpus"]) - CpuSet.parse(host["survey"]["housekeeping"]):
            found.setdefault(cpu, []).append(guest["name"])
    return found


def _mark_cpus(host: Host, letters: Mapping[str, str]) -> dict[int, str]:
    marks: dict[int, str] = {}
    for core in host["cores"]:
        mark = letters.get(core["guest"]) or {"housekeeping": _HOST, "unusable": NOT_ISOLATED}.get(core["use"], _FREE)
        marks |= dict.fromkeys(CpuSet.parse(core["cpus"]).ids, mark)
    owned = {cpu for core in host["cores"] if core["guest"] for cpu in CpuSet.parse(core["cpus"]).ids}
    return marks | {cpu: SHARED if cpu in owned else UNMANAGED for cpu in find_unmanaged_cpus(host)}


def choose_letters(guests: Sequence[shapes.Guest]) -> dict[str, str]:
    """By the guest's name."""
    return {guest["name"]: _LETTERS[number] if number < len(_LETTERS) else _MANY for number, guest in enumerate(guests)}


def _draw_cores(marks: Mapping[int, str], survey: shapes.Survey, width: int) -> Iterator[str]:
    for node in sorted({core["node"] for core in survey["cores"]}):
        cores = [CpuSet.parse(core["cpus"]).ids for core in survey["cores"] if core["node"] == node]
        cells = [f"[{''.join(marks.get(cpu, _FREE) for cpu in sorted(core))}]" for core in cores]
        yield from _label(f"node {node}", _fill(cells, width - _INDENT))
    online = {cpu for core in survey["cores"] for cpu in CpuSet.parse(core["cpus"]).ids}
    if offline := CpuSet.of(set(CpuSet.parse(survey["possible"]).ids) - online):
        yield from _label("offline", [f"{_OFFLINE} CPUs {offline}"])


def _draw_pages(survey: shapes.Survey) -> Iterator[str]:
    for pool in survey["pools"]:
        if pool["total"]:
            used = pool["total"] - pool["free"]
            filled = -(-used * _BAR // pool["total"])
            bar = "#" * filled + _FREE * (_BAR - filled)
            size = format_size(pool["page_size"])
            yield from _label(f"memory {pool['node']}", [f"[{bar}] {used} of {pool['total']} pages of {size} used"])


def _draw_uplinks(guests: Sequence[shapes.Guest], letters: Mapping[str, str], survey: shapes.Survey, width: int) -> Iterator[str]:
    owners = {nic["address"]: letters[guest["name"]] for guest in guests for nic in guest["nics"] if nic["address"]}
    edges = {nic["interface"]: nic["edge"] for guest in guests for nic in guest["nics"]}
    for pf in survey["pfs"]:
        name = pf["interface"] or pf["address"]
        words = [pf["driver"] or "no driver", f"node {pf['node']}" if pf["node"] is not None else "node unknown"]
        words += ["link up" if pf["up"] else "link down", *([edges[name]] if name in edges else []), *filter(None, [pf["fault"]])]
        yield from _label(name, wrap(", ".join(words), width - _INDENT))
        cells = "".join(owners.get(vf["address"], _HOST if vf["use"] else _FREE) for vf in pf["vfs"])
        unmade = pf["total_vfs"] - len(pf["vfs"])
        text = f"VFs {cells or 'none'}" + (f", {unmade} more possible" if unmade > 0 else "")
        yield from _label("", wrap(text, width - _INDENT))
    others = {nic["interface"] for guest in guests for nic in guest["nics"] if nic["tap"]}
    for name in sorted(others):
        users = "".join(letters[guest["name"]] for guest in guests for nic in guest["nics"] if nic["interface"] == name)
        yield from _label(name, [f"software edge {edges[name]}: {users}"])


def _draw_disks(guests: Sequence[shapes.Guest], letters: Mapping[str, str], survey: shapes.Survey) -> Iterator[str]:
    # No driver but nvme shows the serial number, so those of guests come from their plans.
    owned = {disk["address"]: (letters[guest["name"]], disk["serial"]) for guest in guests for disk in guest["disks"]}
    serials = {disk["serial"]: letters[guest["name"]] for guest in guests for disk in guest["disks"] if disk["serial"]}
    for disk in survey["controllers"]:
        used = disk["uses"] or disk["signatures"] or disk["fault"]
        owner, serial = owned.get(disk["address"], ("", disk["serial"]))
        owner = owner or serials.get(serial or "", _HOST if used else _FREE)
        size = sum(namespace["size"] for namespace in disk["namespaces"])
        yield from _label("disk", [f"{owner} {serial or disk['address']}" + (f", {format_size(size)}" if size else "")])


def _describe(letter: str, guest: shapes.Guest) -> str:
    words = [guest["name"], guest["state"], f"CPUs {', '.join(guest['cores'])}", format_size(guest["memory"])]
    words += [f"tenant {guest['owner']}"] if guest["owner"] else []
    return f"{letter:>{_INDENT - 2}}  {'  '.join(words)}"


def _fill(cells: Sequence[str], width: int) -> list[str]:
    """Lines of whole cells: cores of one node can have different numbers of CPUs."""
    lines = [""]
    for cell in cells:
        if lines[-1] and len(lines[-1]) + len(cell) > width:
            lines.append("")
        lines[-1] += cell
    return lines


def _label(label: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        # Not shortened: the ports of a card differ in the last letters of long names.
        yield f"{label:{_INDENT - 1}} {line}"
        label = ""
