"""Removes control sequences with which a guest could attack the terminal that shows its console.

Terminals answer queries as if the user had typed the answer, set the clipboard and the window's title, print, and change how keys
are sent (xterm's ctlseqs; ECMA-48). Kept are characters and sequences that only draw.
"""

from __future__ import annotations

import codecs
import re

_STRING = 4096  # characters of the longest string sequence that is removed as a whole, as in the expressions
_MARK = "\ufffd"

_TOKEN = re.compile(
    r"\x1b\[(?P<parameters>[0-9;:<=>?]{0,32})(?P<middle>[ -/]{0,4})(?P<final>[@-~])"
    r"|\x1b[\]PX^_][^\x07\x1b\x18\x1a]{0,4096}(?:\x07|\x1b\\)"
    r"|\x1b(?P<charset>[()*+][0-9A-Z])"
    r"|\x1b(?P<single>[ -~])?"
    # C0 without those that only move the cursor or ring; C1; characters that change the direction of text (UAX 9 2).
    r"|(?P<control>[\x00-\x06\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069])"
)
# The beginning of a sequence at the end of a piece.
_PARTIAL = re.compile(r"\x1b(?:\[[0-9;:<=>?]{0,32}[ -/]{0,4}|[()*+]|[\]PX^_][^\x07\x1b\x18\x1a]{0,4096}\x1b?)?\Z")

# Moves the cursor, erases, inserts, deletes, scrolls, sets the scroll region.
_DRAWING = frozenset("ABCDEFGHJKLMPSTX@`adefr")
_PLAIN = re.compile(r"[0-9;]*")
_COLOURS = re.compile(r"[0-9;:]*")
# Cursor keys, wrapping, blinking and hidden cursor, other screen, brackets around pasted text: mode → value before.
_PRIVATE_MODES = {1: False, 7: True, 12: False, 25: True, 47: False, 1047: False, 1049: False, 2004: False}
_INSERT = 4
_SINGLE = frozenset("78DEM=>")


class TerminalFilter:
    """Filters pieces of a guest's output; keeps an incomplete sequence until the next piece."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._changed: dict[str, str] = {}  # what was changed → the sequence that changes it back

    def feed(self, data: bytes) -> bytes:
        text = self._held + self._decode.decode(data)
        match = _PARTIAL.search(text, max(0, len(text) - _STRING - 4))
        self._held = match[0] if match else ""
        return _TOKEN.sub(self._replace, text[: len(text) - len(self._held)]).encode(errors="replace")

    def finish(self) -> bytes:
        """Changes back how the terminal draws."""
        back = "".join(self._changed.values())
        self._held, self._changed = "", {}
        return back.encode()

    def _replace(self, match: re.Match[str]) -> str:
        if match["final"]:
            return match[0] if self._keeps_csi(match["parameters"], match["middle"], match["final"]) else ""
        if match["charset"]:
            if match["charset"][0] == "(" and match["charset"][1] in "0AB":
                self._note("charset", "\x1b(B", changed=match["charset"] != "(B")
                return match[0]
            return ""
        if match["single"] in _SINGLE:
            if match["single"] in "=>":
                self._note("keypad", "\x1b>", changed=match["single"] == "=")
            return match[0]
        return _MARK if match["control"] not in (None, "\0") else ""

    def _keeps_csi(self, parameters: str, middle: str, final: str) -> bool:
        if middle:
            return False
        if final == "m":
            if not _COLOURS.fullmatch(parameters):
                return False
            self._note("colours", "\x1b[m", changed=parameters not in ("", "0"))
            return True
        if final in "hl":
            return self._keeps_modes(parameters, enabled=final == "h")
        if final in "su":
            return not parameters
        if final not in _DRAWING or not _PLAIN.fullmatch(parameters):
            return False
        if final == "r":
            self._note("region", "\x1b7\x1b[r\x1b8", changed=bool(parameters))
        return True

    def _keeps_modes(self, parameters: str, *, enabled: bool) -> bool:
        if parameters == str(_INSERT):
            self._note("insert", f"\x1b[{_INSERT}l", changed=enabled)
            return True
        numbers = parameters[1:].split(";")
        if not parameters.startswith("?") or not all(number.isascii() and number.isdigit() for number in numbers):
            return False
        modes = [int(number) for number in numbers]
        if not all(mode in _PRIVATE_MODES for mode in modes):
            return False
        for mode in modes:
            before = _PRIVATE_MODES[mode]
            self._note(f"mode {mode}", f"\x1b[?{mode}{'h' if before else 'l'}", changed=enabled != before)
        return True

    def _note(self, what: str, back: str, *, changed: bool) -> None:
        if changed:
            self._changed[what] = back
        else:
            self._changed.pop(what, None)
