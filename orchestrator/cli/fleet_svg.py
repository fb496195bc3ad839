"""The hosts of the fleet as one SVG file. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from orchestrator.cli.svg import CELL, COLOURS, GAP, LINE, MARGIN, WIDTH, Part, draw_cell, draw_page, draw_text

if TYPE_CHECKING:
    from orchestrator.fleet.use import NodeUse

_NAME, _STATE, _CORE, _CHARACTERS = 150, 110, CELL, 24
"""Pixels for the columns of name and state, pixels of a core or VF, and characters of a name."""


def draw_fleet(uses: Sequence[NodeUse], waiting: int) -> Iterator[str]:
    """The parts of the file. ``waiting``: guests without a host."""
    colours = {name: f"g{number % COLOURS}" for number, name in enumerate(sorted(_list_guests(uses)))}
    yield from draw_page(
        "NoHype fleet", [_draw_title(uses, waiting), *(_draw_node(use, colours) for use in uses), _draw_legend()]
    )


def _list_guests(uses: Sequence[NodeUse]) -> set[str]:
    return {place.guest for use in uses for place in use.places}


def _draw_title(uses: Sequence[NodeUse], waiting: int) -> Part:
    free = sum(use.node.cores - use.cores for use in uses)
    words = f"{len(_list_guests(uses))} guests run, {waiting} wait, {free} of {sum(use.node.cores for use in uses)} cores free"
    yield LINE + 8, draw_text(0, 12, f"Fleet of {len(uses)} nodes: {words}", "title")


def _draw_node(use: NodeUse, colours: dict[str, str]) -> Part:
    node = use.node
    cores = {core: place.guest for place in use.places for core in place.cores}
    vfs = {vf: place.guest for place in use.places for vf in place.vfs}
    cells = [
        *(_draw_owned("core", number, cores.get(number, ""), colours) for number in range(node.cores)),
        None,
        *(_draw_owned("VF", number, vfs.get(number, ""), colours) for number in range(node.vfs)),
    ]
    columns = (WIDTH - 2 * MARGIN - _NAME - _STATE) // (_CORE + GAP)
    kind = "good" if node.responds and not node.reason else "bad"
    label = draw_text(0, 13, node.name[:_CHARACTERS]) + draw_text(_NAME, 13, node.state.lower(), kind)
    for begin in range(0, len(cells), columns):
        yield (
            CELL + GAP,
            (label if not begin else "")
            + "".join(
                draw_cell(_NAME + _STATE + column * (_CORE + GAP), _CORE, kind, mark, title)
                for column, cell in enumerate(cells[begin : begin + columns])
                if cell
                for kind, mark, title in (cell,)
            ),
        )
    amounts = f"memory {use.memory} of {node.memory} MiB" + (f", NVMe {use.disks} of {node.disks}" if node.disks else "")
    words = f"{amounts}, guests: {', '.join(place.guest for place in use.places) or 'none'}"
    yield LINE, draw_text(_NAME + _STATE, 13, f"{words}{f'; {node.reason}' if node.reason else ''}", "quiet")


def _draw_owned(what: str, number: int, guest: str, colours: dict[str, str]) -> tuple[str, str, str]:
    """Kind, mark and title of a cell."""
    return colours.get(guest, "free"), "v" if what == "VF" else "", f"{what} {number}: {guest or 'free'}"


def _draw_legend() -> Part:
    text = "one box is a core, or a VF (v), by Slurm's numbers; empty: free. From the controller: the managers were not asked"
    yield LINE, draw_text(0, 13, text, "quiet")
