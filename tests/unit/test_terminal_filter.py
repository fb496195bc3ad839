"""What reaches the user's terminal from a guest that tries to attack it."""

from __future__ import annotations

import re
import time
from random import Random

import pytest

from orchestrator.cli.terminal_filter import TerminalFilter

ESC = "\x1b"


def show(text: str | bytes, size: int = 1 << 20) -> str:
    data = text.encode() if isinstance(text, str) else text
    filter = TerminalFilter()
    return b"".join(filter.feed(data[begin : begin + size]) for begin in range(0, len(data), size)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "plain\r\n\ttext\b\a", "Grüße 日本語 \U0001f600",
        f"{ESC}[31mred{ESC}[0m{ESC}[38;2;1;2;3m{ESC}[4:3m", f"{ESC}[H{ESC}[2J{ESC}[3;4H{ESC}[K{ESC}[10A{ESC}[5d{ESC}[2;20r",
        f"{ESC}[?25l{ESC}[?25h{ESC}[?1049h{ESC}[?1049l{ESC}[?1h{ESC}={ESC}>{ESC}[?7;25h{ESC}[?2004h{ESC}[4h{ESC}[4l",
        f"{ESC}7{ESC}8{ESC}M{ESC}D{ESC}E{ESC}(0{ESC}(B{ESC}[s{ESC}[u",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_drawing_passes_unchanged(text: str, size: int) -> None:
    assert show(text, size) == text


@pytest.mark.parametrize(
    "sequence",
    [
        f"{ESC}[c", f"{ESC}[>c", f"{ESC}[=c", f"{ESC}[6n", f"{ESC}[5n", f"{ESC}[?6n", f"{ESC}[21t", f"{ESC}[8;1;1t", f"{ESC}[x",
        f"{ESC}[?1000h", f"{ESC}[?1003;1006h", f"{ESC}[?25;1000h", f"{ESC}[?1004h", f"{ESC}[20h",
        f"{ESC}[i", f"{ESC}[5i", f"{ESC}[?5i",
        f"{ESC}[!p", f"{ESC}[>1u", f"{ESC}[1u", f"{ESC}[>q", f"{ESC}[2 q", f"{ESC}[?25$p",
        f"{ESC}[>4;2m", f"{ESC}[1$r", f"{ESC}[<35;1;1M",
        f"{ESC}]0;title\a", f"{ESC}]52;c;aGk=\a", f"{ESC}]52;c;?{ESC}\\", f"{ESC}]8;;http://x{ESC}\\", f"{ESC}P$q\"p{ESC}\\",
        f"{ESC}P+q544e{ESC}\\", f"{ESC}_Gx{ESC}\\", f"{ESC}^x{ESC}\\", f"{ESC}Xx{ESC}\\", f"{ESC}]1337;File=:x\a", f"{ESC}Z",
        f"{ESC}c",
        f"{ESC}n", f"{ESC}o", f"{ESC}#8", f"{ESC}%@", f"{ESC})0", "\0",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 1 << 20])
def test_sequences_that_do_more_than_draw_are_removed(sequence: str, size: int) -> None:
    shown = show(f"before{sequence}after", size)
    assert ESC not in shown
    assert shown.startswith("before")
    assert shown.endswith("after")
    assert shown == "beforeafter" or sequence[1] in "#%", "what follows an unknown escape is shown as text"


@pytest.mark.parametrize(
    "text", ["\x05", "\x0e", "\x0f", "\x7f", "\x9b6n", "\x90", "\x9d52", "\u202e", "\u2066", "\x11", "\x13", b"\xff", b"\xc3"]
)
def test_other_controls_are_marked(text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    assert show(data + b"x").startswith("\ufffd")


def test_unterminated_sequence_does_not_swallow_what_follows() -> None:
    assert show(f"{ESC}]0;" + "x" * 10_000 + "visible").endswith("xvisible")
    assert show(f"{ESC}[" + "1;" * 100 + "visible").endswith("visible")
    assert show(f"{ESC}]0;title\nnext {ESC}]0;\x18visible").endswith("visible")


def test_random_bytes_never_reach_the_terminal_as_queries() -> None:
    random = Random(1)
    alphabet = [ESC, "[", "]", "?", "P", "\\", "\a", "6", "n", "c", ";", ">", "52", "t", "\x9b", "é", "\n", "m", "h", "1000"]
    allowed = re.compile(r"\x1b(?:\[(?:[0-9;]*[A-HJ-MPSTX@`adefr]|[0-9;:]*m|[su]|4[hl]|\?[0-9;]*[hl])|[78DEM=>]|\([0AB])")
    for _ in range(3000):
        text = "".join(random.choices(alphabet, k=random.randint(1, 30)))
        shown = show(text, random.randint(1, 9))
        assert ESC not in allowed.sub("", shown), repr(text)
        assert not re.search(r"\x1b\[\?[0-9;]*1000", shown)


def test_long_output_is_filtered_quickly_and_without_growing() -> None:
    """2.6 MB without an end of line, or of beginnings of sequences."""
    for piece in (b"x" * 65_536, f"{ESC}]".encode() * 32_768, f"{ESC}[31".encode() * 16_384, b"\x1b" * 65_536):
        filter, size = TerminalFilter(), 0
        begun = time.process_time()
        for _ in range(40):
            size += len(filter.feed(piece))
        assert size <= 3 * 40 * len(piece)
        assert time.process_time() - begun < 60


@pytest.mark.parametrize(
    ("text", "back"),
    [
        ("text", ""), (f"{ESC}[31m", f"{ESC}[m"), (f"{ESC}[31m{ESC}[0m", ""), (f"{ESC}[?25l", f"{ESC}[?25h"),
        (f"{ESC}[?25l{ESC}[?25h", ""), (f"{ESC}[?1049h", f"{ESC}[?1049l"), (f"{ESC}(0", f"{ESC}(B"), (f"{ESC}[4h", f"{ESC}[4l"),
        (f"{ESC}[?7l", f"{ESC}[?7h"), (f"{ESC}[2;5r", f"{ESC}7{ESC}[r{ESC}8"), (f"{ESC}=", f"{ESC}>"),
        (f"{ESC}[?2004h", f"{ESC}[?2004l"),
    ],
)  # fmt: skip
def test_terminal_is_changed_back_at_the_end(text: str, back: str) -> None:
    filter = TerminalFilter()
    filter.feed(text.encode())
    assert filter.finish().decode() == back
    assert filter.finish() == b""
