"""The text of a console: read once, piece by piece, whatever the guest prints and virtlogd does, and kept within bounds."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from random import Random

import pytest

from orchestrator.console import ANSWER, LINE, READY, LineScanner, LogReader, Pattern, clean, format_tail, read_tail


def read_all(reader: LogReader, limit: int = 1 << 20) -> bytes:
    said = b""
    while piece := reader.read(limit):
        said += piece
    return said


def put_aside(log: Path) -> None:
    """What virtlogd does with a full log (virRotatingFileWriterRollover)."""
    for number in range(8, -1, -1):
        if (backup := log.with_name(f"{log.name}.{number}")).exists():
            backup.rename(log.with_name(f"{log.name}.{number + 1}"))
    log.rename(f"{log}.0")


def find_lines(data: bytes, size: int = 1 << 20, pattern: Pattern = READY, *, begins_line: bool = True) -> list[bytes]:
    """The first line in each piece."""
    scanner, found = LineScanner(begins_line=begins_line), []
    for begin in range(0, len(data), size):
        scanner.feed(data[begin : begin + size])
        found += [line.text for line in [scanner.find(pattern)] if line]
    return found


@pytest.mark.parametrize("limit", [1, 3, 1 << 20])
def test_a_log_is_read_once(tmp_path: Path, limit: int) -> None:
    log = tmp_path / "log"
    reader = LogReader(log, backups=True)
    assert reader.read(limit) == b"", "it is not there yet"
    log.write_bytes(b"one\n")
    assert read_all(reader, limit) == b"one\n"
    assert reader.read(limit) == b""
    reader.close()
    with log.open("ab") as file:
        file.write(b"two\n")
    assert read_all(reader, limit) == b"two\n", "it goes on where it was"


@pytest.mark.parametrize("open_meanwhile", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_what_is_put_aside_is_read_to_its_end(tmp_path: Path, open_meanwhile: bool, times: int) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"0a ")
    reader = LogReader(log, backups=True)
    assert reader.read(9) == b"0a "
    if not open_meanwhile:
        reader.close()
    for number in range(1, times + 1):
        with log.open("ab") as file:
            file.write(b"more ")
        put_aside(log)
        log.write_bytes(b"%da " % number)
    assert read_all(reader, 4) == b"more " + b"".join(b"%da more " % number for number in range(1, times)) + b"%da " % times


def test_what_was_rotated_before_is_read_first_if_it_is_the_guests(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text in (b"first ", b"second ", b"third "):
        if log.exists():
            put_aside(log)
        log.write_bytes(text)
    assert read_all(LogReader(log, backups=True)) == b"first second third "
    assert read_all(LogReader(log, backups=False)) == b"third "


def test_a_log_whose_oldest_part_is_gone_is_read_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one ")
    reader = LogReader(log, backups=True)
    assert read_all(reader) == b"one "
    put_aside(log)
    log.with_name("log.0").unlink()
    log.write_bytes(b"two ")
    assert read_all(reader) == b"two "


def test_a_log_without_backups_is_followed_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one ")
    reader = LogReader(log, backups=False)
    assert reader.read(2) == b"on"
    put_aside(log)
    log.write_bytes(b"two ")
    assert read_all(reader) == b"e two "


def test_a_log_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"a long line\n")
    reader = LogReader(log, backups=True)
    assert read_all(reader) == b"a long line\n"
    log.write_bytes(b"new\n")
    assert read_all(reader) == b"new\n"


@pytest.mark.parametrize(("before", "begins"), [(b"", True), (b"old\n", True), (b"old", False)])
def test_what_was_printed_before_is_skipped(tmp_path: Path, before: bytes, begins: bool) -> None:
    log = tmp_path / "log"
    log.write_bytes(before)
    reader = LogReader(log, backups=True)
    assert reader.skip_to_end() is begins
    with log.open("ab") as file:
        file.write(b"new\n")
    assert read_all(reader) == b"new\n"


def test_a_log_of_any_size_is_skipped_without_reading_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    os.truncate(log, 1 << 40)
    reader = LogReader(log, backups=True)
    reader.skip_to_end()
    assert reader.read(100) == b""
    assert len(read_tail(log)) <= 4096


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    """A FIFO would block, a link may lead anywhere."""
    os.mkfifo(tmp_path / "fifo")
    assert LogReader(tmp_path / "fifo", backups=True).read(9) == b""
    assert read_tail(tmp_path / "fifo") == b""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        LogReader(tmp_path / "link", backups=True).read(9)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 9, 13, 1 << 20])
def test_lines_of_the_protocol_are_found_however_they_come(size: int) -> None:
    printed = b"boot\nnohype nohype: no\nxnohype: ready no\n\r\n%s\r\nmore nohype: ready no\nnohype: ready"
    for line, pattern in ((b"nohype: ready name=one", READY), (b"nohype: done mac", ANSWER), (b"nohype: error x y", ANSWER)):
        for before in (b"", b"\r", b"\r\r"):
            assert find_lines(printed % (before + line), size, pattern) == [line]


CLOUD_INIT = b"Cloud-init v. 25.1.4 finished at Thu, 26 Nov 2026 13:57:02 +0000. Datasource DataSourceNoCloud.  Up 9 seconds"


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize("before", [b"", b"\r", b"[    9.123456] cloud-init[470]: ", b"[12345.123456] cloud-init[1]: "])
def test_end_of_cloud_init_is_a_ready_line(size: int, before: bytes) -> None:
    """As an image of a distribution prints it, by itself or through journald."""
    earlier = b"[    1.0] cloud-init[470]: Cloud-init v. 25.1.4 running 'init-local' at Thu. Up 1 seconds.\r\n[\r\n[    2."
    assert find_lines(earlier + b"\r\n" + before + CLOUD_INIT + b"\r\n", size) == [CLOUD_INIT]


@pytest.mark.parametrize("before", [b"x", b"[1.0] other[1]: ", b"[1.0] ", b"cloud-init[1]: "])
def test_other_lines_that_mention_the_end_of_cloud_init_are_none(before: bytes) -> None:
    assert find_lines(before + CLOUD_INIT + b"\n") == []
    assert find_lines(b"[1.0] cloud-init[470]: nohype: ready name=x\n") == []


def test_the_first_of_several_lines_is_found() -> None:
    assert find_lines(b"nohype: ready 1\nnohype: ready 2\n") == [b"nohype: ready 1"]
    assert find_lines(b"nohype: ready 1\nnohype: ready 2\n", 1) == [b"nohype: ready 1", b"nohype: ready 2"]


def test_where_a_line_ends_is_told() -> None:
    scanner = LineScanner()
    scanner.feed(b"noise\nnohype: do")
    assert scanner.find(ANSWER) is None
    scanner.feed(b"ne mac\r\nmore")
    line = scanner.find(ANSWER)
    assert line
    assert (line.text, line.end) == (b"nohype: done mac", len(b"ne mac\r\n"))
    scanner.feed(b"and more\n")
    assert scanner.find(ANSWER) is None, "it was in the piece before"


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
def test_line_begun_before_the_first_piece_is_ignored(size: int) -> None:
    assert find_lines(b"nohype: ready x\nnohype: ready y\n", size, begins_line=False) == [b"nohype: ready y"]
    assert find_lines(b"nohype: ready x", size, begins_line=False) == []


@pytest.mark.parametrize("size", [1000, 16384, 1 << 20])
@pytest.mark.parametrize("noise", [b"nohype: ready " + b"x" * 100_000, b"nohype: " * 20_000, b"\xff" * 200_000, b"\r" * 100_000,
                                   b"[" * 100_000])  # fmt: skip
def test_endless_line_is_skipped_and_not_kept(size: int, noise: bytes) -> None:
    scanner = LineScanner()
    for begin in range(0, len(noise), size):
        scanner.feed(noise[begin : begin + size])
        assert scanner.find(READY) is None
        scanner.feed(b"")
        assert len(pickle.dumps(scanner)) < 2 * LINE + 1000
    scanner.feed(b"\nnohype: ready yes\n")
    line = scanner.find(READY)
    assert line
    assert line.text == b"nohype: ready yes"


def test_a_scanner_finds_what_is_there_wherever_it_is_cut() -> None:
    rng = Random(7)
    words = [b"nohype: ", b"ready ", b"nohype: ready ", b"\n", b"\r", b"x", b"\r\n", b"nohype: done a"]
    for _ in range(500):
        printed = b"".join(rng.choices(words, k=30)) + b"\n"
        lines = [line.lstrip(b"\r") for line in printed.split(b"\n")[:-1]]
        wanted = [line.replace(b"\r", b"") for line in lines if line.startswith(b"nohype: ready ")]
        assert find_lines(printed, 1) == wanted, printed
        assert find_lines(printed) == wanted[:1], printed
        assert set(find_lines(printed, rng.choice((3, 7, 20)))) <= set(wanted), printed


@pytest.mark.parametrize("line", [b"nohype: ready", b" nohype: ready x", b"nohype:ready x", b"nohype: done x"])
def test_what_is_not_the_word(line: bytes) -> None:
    assert find_lines(line + b"\n") == []


def test_nothing_that_a_guest_prints_moves_the_readers_cursor() -> None:
    printed = "nohype: ready \x1b]0;title\x07 \x9b2J\u202e\x00 ä\tb\n".encode()
    assert clean(printed) == "nohype: ready \ufffd]0;title\ufffd \ufffd2J\ufffd\ufffd ä\tb\n"
    assert clean(b"\xff\xfe\x7f\r\n") == "\ufffd\ufffd\ufffd\n"
    for code in (
        *range(9),
        *range(11, 13),
        *range(14, 32),
        *range(127, 160),
        0x61C,
        0x200E,
        0x200F,
        *range(0x202A, 0x202F),
        0x2066,
        0x2069,
    ):
        assert clean(chr(code).encode()) == "\ufffd", hex(code)


@pytest.mark.parametrize(
    "printed", [b"\xff" * (2 << 20), b"\x01" * (2 << 20), b"x" * (2 << 20), "\u202e".encode() * 500_000, b"a\n" * 99_999]
)
def test_the_end_of_a_console_is_short_whatever_was_printed(printed: bytes) -> None:
    shown = format_tail(printed)
    assert len(shown.encode()) <= 2000
    assert len(shown.splitlines()) <= 9
    assert all(len(line) <= 204 for line in shown.splitlines())


def test_the_end_of_a_console() -> None:
    assert format_tail(b"") == " nothing"
    assert format_tail(b"".join(b"%d\n" % number for number in range(20))) == "".join(
        f"\n    {number}" for number in range(12, 20)
    )


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "none") == b""
