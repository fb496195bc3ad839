"""Readers of a console: earlier lines, positions, and SSH host keys."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from orchestrator.console import LogReader, find_host_key
from orchestrator.errors import NotFound, RequestError
from orchestrator.guests.console_stream import HELD_BYTES, ConsoleStream, Part, parse_position

UUID_TEXT = "6f1c64e2-6a4a-5d3c-9f5d-0c3f6f1f3a55"
KEY = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"k" * 32).decode()


def read_all(reader: LogReader) -> bytes:
    return b"".join(iter(lambda: reader.read(7), b""))


def write_logs(folder: Path, *texts: bytes) -> Path:
    """Oldest first: the last is the current file."""
    log = folder / "log"
    for number, text in enumerate(reversed(texts)):
        (log if number == 0 else folder / f"log.{number - 1}").write_bytes(text)
    return log


@pytest.mark.parametrize(
    ("texts", "lines", "shown"),
    [
        ((b"a\nb\nc\n",), 1, b"c\n"),
        ((b"a\nb\nc\n",), 2, b"b\nc\n"),
        ((b"a\nb\nc\n",), 3, b"a\nb\nc\n"),
        ((b"a\nb\nc\n",), 99, b"a\nb\nc\n"),
        ((b"a\nb\nlogin: ",), 1, b"login: "),
        ((b"a\nb\nlogin: ",), 2, b"b\nlogin: "),
        ((b"\n\n\n",), 2, b"\n\n"),
        ((b"a\nb\n", b"c\n"), 2, b"b\nc\n"),
        ((b"a\nb\n", b"c\n"), 1, b"c\n"),
        ((b"a\nb", b"c\nd\n"), 2, b"bc\nd\n"),
        ((b"a\nb\n", b""), 1, b"b\n"),
        ((b"a\n", b"b\n", b"c\n"), 3, b"a\nb\nc\n"),
        ((b"a\nb\n",), 0, b""),
        ((b"",), 5, b""),
        ((), 5, b""),
    ],
)  # fmt: skip
def test_last_lines_are_read_then_new_output(tmp_path: Path, texts: tuple[bytes, ...], lines: int, shown: bytes) -> None:
    log = write_logs(tmp_path, *texts)
    reader = LogReader(log, backups=True)
    reader.skip_to_last(lines, 1 << 20)
    assert read_all(reader) == shown
    with log.open("ab") as file:
        file.write(b"new\n")
    assert read_all(reader) == b"new\n"
    assert not reader.may_have_skipped


@pytest.mark.parametrize("most", [1, 1000, 70_000, 200_000])
def test_last_lines_are_bounded_in_bytes(tmp_path: Path, most: int) -> None:
    """A guest can print 10 MB without an end of line."""
    log = write_logs(tmp_path, b"y" * 150_000, b"x" * 100_000)
    reader = LogReader(log, backups=True)
    reader.skip_to_last(3, most)
    assert read_all(reader) == (b"y" * max(0, most - 100_000) + b"x" * min(most, 100_000))


def test_many_lines_are_found_across_blocks(tmp_path: Path) -> None:
    text = b"".join(b"line %d\n" % number for number in range(50_000))
    reader = LogReader(write_logs(tmp_path, text[:300_000], text[300_000:]), backups=True)
    reader.skip_to_last(30_000, 1 << 24)
    assert read_all(reader).startswith(b"line 20000\nline 20001\n")


@pytest.mark.parametrize("rotate", [False, True])
def test_reading_continues_at_the_position_of_another_reader(tmp_path: Path, rotate: bool) -> None:
    log = write_logs(tmp_path, b"one two ")
    first = LogReader(log, backups=True)
    assert first.read(4) == b"one "
    if rotate:
        log.rename(f"{log}.0")
        log.write_bytes(b"three")
    second = LogReader(log, backups=True)
    second.seek(first.position)
    assert read_all(second) == (b"two three" if rotate else b"two ")
    assert not second.may_have_skipped


def test_skipped_output_is_reported(tmp_path: Path) -> None:
    log = write_logs(tmp_path, b"one two ")
    first = LogReader(log, backups=True)
    first.read(4)
    log.unlink()
    (tmp_path / "other").write_bytes(b"")  # takes the inode
    log.write_bytes(b"three")
    second = LogReader(log, backups=True)
    second.seek(first.position)
    assert read_all(second) == b"three"
    assert second.may_have_skipped
    first.close()


@pytest.mark.parametrize(
    "text", ["", "x", UUID_TEXT, f"{UUID_TEXT}.1.2", f"{UUID_TEXT}.1.2.x", f"{UUID_TEXT}.1.2.-3", f"{UUID_TEXT}.1.2.3.4",
             f"{UUID_TEXT}.1.2.ffffffffffffffff", f"{'z' * 36}.1.2.3", f"{'-' * 36}.1.2.3", f"{UUID_TEXT}.1.2.3\n"],
)  # fmt: skip
def test_wrong_positions_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="invalid console position"):
        parse_position(text)


def test_position_is_read_back() -> None:
    text = f"{UUID_TEXT}.fd01.2a.3e8"
    assert str(parse_position(text)) == text
    assert parse_position(text).place == (0xFD01, 42, 1000)


def make_stream(log: Path) -> ConsoleStream:
    return ConsoleStream(parse_position(f"{UUID_TEXT}.0.0.0").uuid, LogReader(log, backups=True))


def test_reader_that_takes_nothing_is_not_read_for(tmp_path: Path) -> None:
    stream = make_stream(write_logs(tmp_path, b"x" * (10 * HELD_BYTES)))
    count = 0
    while stream.read(16 << 10):
        count += 1
    assert count * (16 << 10) == HELD_BYTES
    part = stream.take()
    assert part
    assert len(part.output) == HELD_BYTES
    assert part.position.place[2] == HELD_BYTES
    assert stream.take() is None
    assert stream.read(16 << 10), "it goes on"


@pytest.mark.parametrize("immediately", [False, True])
def test_last_output_precedes_the_end(tmp_path: Path, immediately: bool) -> None:
    stream = make_stream(write_logs(tmp_path, b"one two"))
    assert stream.read(4)
    stream.finish(NotFound("gone"), immediately=immediately)
    stream.finish(NotFound("second"))
    parts: list[Part] = []
    while not parts or not parts[-1].is_last:
        while stream.read(4):
            pass
        if part := stream.take():
            parts.append(part)
    assert b"".join(part.output for part in parts) == (b"one " if immediately else b"one two")
    assert [str(part.error) for part in parts if part.error] == ["gone"]
    assert stream.close_if_over()


@pytest.mark.parametrize(
    "line", [f"nohype: ready name=web hostkey=ssh-ed25519:{KEY}", f"nohype: ready hostkey=ssh-ed25519:{KEY} a=b"]
)
def test_host_key_in_a_ready_line_is_found(line: str) -> None:
    assert find_host_key(line) == f"ssh-ed25519 {KEY}"


@pytest.mark.parametrize(
    "field", ["", "hostkey=", f"hostkey=ssh-rsa:{KEY}", f"hostkey=ssh-ed25519:{KEY}AAAA", f"hostkey=ssh-ed25519:{KEY[:-4]}",
              f"xhostkey=ssh-ed25519:{KEY}", "hostkey=ssh-ed25519:" + "A" * 68, f"hostkey=ssh-ed25519:{KEY[:-1]}!"],
)  # fmt: skip
def test_malformed_host_key_is_ignored(field: str) -> None:
    assert find_host_key(f"nohype: ready name=web {field}") is None
