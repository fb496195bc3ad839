"""Parts of the pictures of hosts: style, cells and text. No scripts, text that can be selected, light and dark. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from orchestrator.cli.output import printable

WIDTH, MARGIN, LABEL = 1120, 20, 110
"""Pixels; LABEL is where the cells of a line begin."""
CELL, GAP, LINE = 18, 3, 22
COLOURS = 10  # of guests; letters tell them apart

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
    **{f".g{number} rect": (f"hsl({36 * number}, 75%, 84%)", f"hsl({36 * number}, 45%, 30%)") for number in range(COLOURS)},
}  # fmt: skip
"""Selector → its colour on a light and on a dark page. Plain rules: many viewers know neither variables nor light-dark()."""


def write_style() -> str:
    light, dark = ("\n".join(f"{name} {{ fill: {fills[index]}; }}" for name, fills in _FILLS.items()) for index in (0, 1))
    lines = ".cell rect, .bar {{ stroke: {}; stroke-width: 1; }}\n"
    shades = f"@media (prefers-color-scheme: dark) {{\n{lines.format('#6b7480')}{dark}\n}}\n"
    return f"<style>{lines.format('#8c959f')}{light}\n{shades}{_RULES}</style>\n"


Part = Iterator[tuple[int, str]]
"""Heights and elements, from the top down."""


def draw_page(title: str, parts: Iterable[Part]) -> Iterator[str]:
    """The parts of the file."""
    body, y = [], MARGIN + 6
    for part in parts:
        for height, text in part:
            body.append(f'<g transform="translate({MARGIN} {y})">{text}</g>\n')
            y += height
    size = f'width="{WIDTH}" height="{y + MARGIN}" viewBox="0 0 {WIDTH} {y + MARGIN}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape_text(title)}</title>\n'
    yield f'{write_style()}<rect class="page" width="100%" height="100%"/>\n'
    yield from body
    yield "</svg>\n"


def draw_cell(x: float, width: int, kind: str, mark: str, title: str) -> str:
    box = f'<rect width="{width}" height="{CELL}" rx="3"/>'
    text = f'<text x="{width / 2:g}" y="13">{escape_text(mark)}</text>' if mark else ""
    return f'<g class="cell {kind}" transform="translate({x:g} 0)"><title>{escape_text(title)}</title>{box}{text}</g>'


def draw_text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape_text(text)}</text>'


def escape_text(text: str) -> str:
    """Names come from the network. XML allows no control characters, not even as entities."""
    return escape(printable(text).replace("\n", " "))
