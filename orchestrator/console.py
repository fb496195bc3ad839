"""A guest's serial console: its log, and the lines of the protocol `nohype-1` in it.

Guests can print anything at any speed, without an end of line. So the code here reads, keeps and decodes a bounded number of
bytes at a time, and scans each byte once. libvirt writes the log (`<log file=...>` of a serial port); virtlogd renames a full log
to LOG.0, LOG.0 to LOG.1 and so on (src/util/virrotatingfile.c).
"""

from __future__ import annotations

import base64
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LINE = 4096  # bytes of the longest line of the protocol; longer lines are ignored


@dataclass(frozen=True)
class Pattern:
    """Lines of the protocol."""

    words: tuple[bytes, ...]  # every such line contains one of them: a fast test before the regular expression
    regex: re.Pattern[bytes]  # possessive, so that it scans each byte once


# Or the last message of cloud-init (its module final_message), to which journald adds time and process (ForwardToConsole=).
READY = Pattern(
    (b"nohype: ready ", b"Cloud-init v. "),
    re.compile(
        rb"^\r*+(?:\[[ 0-9.]{1,20}+\] cloud-init\[[0-9]{1,9}+\]: (?=Cloud-init ))?"
        rb"((?:nohype: ready |Cloud-init v\. [^ \n]{1,80}+ finished at )[^\n]{0,%d}+)\n" % LINE,
        re.MULTILINE,
    ),
)
ANSWER = Pattern(
    (b"nohype: done", b"nohype: error"), re.compile(rb"^\r*+(nohype: (?:done|error)[^\n]{0,%d}+)\n" % LINE, re.MULTILINE)
)

# The host keys that cloud-init prints before its last message (its module keys_to_console): lines as in files `.pub`.
KEYS, KEYS_END = (
    Pattern((b"SSH HOST KEY KEYS",), re.compile(rb"^\r*+(-----%b SSH HOST KEY KEYS-----)[\r ]{0,9}+\n" % word, re.MULTILINE))
    for word in (b"BEGIN", b"END")
)
PRINTED_KEY = Pattern((b"ssh-ed25519 ",), re.compile(rb"^\r*+(ssh-ed25519 [^\n]{68,%d}+)\n" % LINE, re.MULTILINE))

ANSWER_BYTES = 16 << 10  # how much of the output before the guest's reply is kept

# An Ed25519 key in the wire format: its name and 32 bytes, each with its length (RFC 8709 4).
_HOST_KEY = re.compile(r"(?: hostkey=ssh-ed25519:|^ssh-ed25519 )([A-Za-z0-9+/]{68})(?: |$)")
_KEY_HEAD = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"

_BEGINNINGS = (
    b"nohype: ",
    b"Cloud-init v. ",
    b"[",
    b"-----BEGIN SSH HOST KEY KEYS",
    b"-----END SSH HOST KEY KEYS",
    b"ssh-ed25519 ",
)
_TAIL_READ, _TAIL_LINES, _TAIL_LINE, _TAIL_BYTES = 4 << 10, 8, 200, 2000
_BACKUPS = 100
_SCAN = 64 << 10
# C0 controls except tab and line feed become NUL, which is replaced after decoding.
_CONTROLS = bytes(0 if code < 32 and code not in (9, 10) or code == 127 else code for code in range(256))
# C1 controls, and characters that change the direction of text (Unicode 9, UAX 9 2).
_UNSAFE = re.compile("[\x80-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(printed: bytes) -> str:
    """Text without characters that control a terminal or the direction of text."""
    text = printed.replace(b"\r", b"").translate(_CONTROLS).decode(errors="replace")
    if not text.isascii():
        text = _UNSAFE.sub("\ufffd", text)
    return text.replace("\0", "\ufffd")


def find_host_key(line: str) -> str | None:
    """The SSH host key in a ready line (`hostkey=ssh-ed25519:BASE64`), or in a line that begins with the key.

    As `ssh-ed25519 BASE64`; None without a valid one.
    """
    match = _HOST_KEY.search(line)
    return f"ssh-ed25519 {match[1]}" if match and base64.b64decode(match[1]).startswith(_KEY_HEAD) else None


def format_tail(printed: bytes) -> str:
    """The last lines for an error message: at most 8 lines of 200 characters, and 2,000 bytes in total."""
    lines = clean(printed[-_TAIL_READ:]).splitlines()[-_TAIL_LINES:]
    shown = [f"\n    {line if len(line) <= _TAIL_LINE else f'{line[: _TAIL_LINE - 3]}...'}" for line in lines]
    while sum(len(line.encode()) for line in shown) > _TAIL_BYTES:
        del shown[0]
    return "".join(shown) or " nothing"


def read_tail(log: Path) -> bytes:
    """Empty if the log does not exist."""
    descriptor = _open(log)
    if descriptor is None:
        return b""
    try:
        return os.pread(descriptor, _TAIL_READ, max(0, os.fstat(descriptor).st_size - _TAIL_READ))
    finally:
        os.close(descriptor)


class LogReader:
    """Reads a log from its beginning, or from `skip_to_end()`, and follows it when virtlogd rotates files.

    The log need not exist yet. With `backups`, rotated files are read first. Methods raise OSError.

    Attributes:
        may_have_skipped: the file that was read before the current one is gone, and perhaps others that followed it.
    """

    def __init__(self, log: Path, *, backups: bool) -> None:
        self.log, self._backups = log, backups
        self.may_have_skipped = False
        self._descriptor: int | None = None
        # Device and inode of the current file: its name changes when it is rotated.
        self._file: tuple[int, int] | None = None
        self._offset = 0

    @property
    def was_rotated(self) -> bool:
        return _identify(self._name(0)) is not None

    def read(self, limit: int) -> bytes:
        """The next bytes, at most `limit`; empty if there are none yet."""
        for _ in range(_BACKUPS + 2):
            if self._descriptor is None and not self._reopen():
                return b""
            assert self._descriptor is not None
            if data := os.pread(self._descriptor, limit, self._offset):
                self._offset += len(data)
                return data
            if not self._next_file():
                return b""
        return b""

    def skip_to_end(self) -> bool:
        """Skips all output so far; returns whether the next byte starts a line."""
        self.close()
        self._file, self._offset = None, 0
        self._descriptor = _open(self.log)
        if self._descriptor is None:
            return True
        self._offset = self._record_file()
        return self._offset == 0 or os.pread(self._descriptor, 1, self._offset - 1) == b"\n"

    def skip_to_last(self, lines: int, most: int) -> None:
        """Continues with the last lines of all output so far, at most `most` bytes. 0 lines: with the next output."""
        self.close()
        self._file, self._offset = None, 0
        is_end = True
        for name in reversed(self._names()):
            descriptor = _open(name)
            if descriptor is None:
                continue
            try:
                status = os.fstat(descriptor)
                start, found = _find_last_lines(descriptor, status.st_size, lines, most, ignore_last=is_end)
                self._file, self._offset = (status.st_dev, status.st_ino), start
            finally:
                os.close(descriptor)
            lines, most, is_end = lines - found, most - (status.st_size - start), is_end and not status.st_size
            if start or lines <= 0 or most <= 0:
                break

    @property
    def position(self) -> tuple[int, int, int]:
        """Device and inode of the file, and the offset of the next byte; zeros before the first file."""
        return (*(self._file or (0, 0)), self._offset)

    def seek(self, position: tuple[int, int, int]) -> None:
        """Continues at a position of another reader of this log; if its file is gone, at the beginning of the oldest."""
        self.close()
        device, inode, self._offset = position
        self._file = (device, inode) if inode else None

    def close(self) -> None:
        """`read` reopens the file and continues."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _reopen(self) -> bool:
        # Opens the current file, or the oldest if the current file does not exist any more.
        names = self._names()
        index = self._find(names)
        if index is None:
            self.may_have_skipped |= self._file is not None
            index = self._offset = 0
        return bool(names) and self._open(names[index])

    def _next_file(self) -> bool:
        """At the end of a file: whether there is more to read, in this file or the next."""
        assert self._descriptor is not None
        now = _identify(self.log)
        if now is None:
            return False
        if now == self._file:
            begun_anew = os.fstat(self._descriptor).st_size < self._offset
            self._offset = 0 if begun_anew else self._offset
            return begun_anew
        # The guest may have printed between the last read and the rotation.
        if os.pread(self._descriptor, 1, self._offset):
            return True
        names = self._names()
        index = self._find(names)
        following = 0 if index is None else index + 1
        if following >= len(names):
            return False
        self.may_have_skipped |= index is None and self._backups
        self.close()
        self._offset = 0
        return self._open(names[following])

    def _find(self, names: list[Path]) -> int | None:
        return next((index for index, name in enumerate(names) if self._file and _identify(name) == self._file), None)

    def _open(self, name: Path) -> bool:
        self._descriptor = _open(name)
        if self._descriptor is None:
            return False
        self._record_file()
        return True

    def _record_file(self) -> int:
        """Records which file is open; returns its size."""
        assert self._descriptor is not None
        status = os.fstat(self._descriptor)
        self._file = status.st_dev, status.st_ino
        return status.st_size

    def _names(self) -> list[Path]:
        # oldest first
        names = [self.log] if _identify(self.log) else []
        if self._backups:
            for number in range(_BACKUPS):
                if not _identify(self._name(number)):
                    break
                names.insert(0, self._name(number))
        return names

    def _name(self, number: int) -> Path:
        return self.log.with_name(f"{self.log.name}.{number}")


@dataclass(frozen=True)
class Line:
    text: bytes  # without end of line and carriage returns
    end: int  # position after the line in the piece that completed it


class LineScanner:
    """Finds lines of the protocol in pieces of output. `begins_line`: the first piece starts at the beginning of a line."""

    def __init__(self, *, begins_line: bool = True) -> None:
        self._begins_line = begins_line
        # The beginning of a possible line of the protocol, shorter than LINE; and the same with the last piece.
        self._kept = self._text = b""
        self._before = self._from = 0

    def feed(self, data: bytes) -> None:
        self._text, self._before = self._kept + data, len(self._kept)
        self._from = 0 if self._begins_line else self._text.find(b"\n") + 1 or len(self._text)
        begin = self._text.rfind(b"\n") + 1
        if begin or self._begins_line:
            # Carriage returns before a line are ignored.
            last = self._text[begin:].lstrip(b"\r")
            is_possible = any(last.startswith(word) or word.startswith(last) for word in _BEGINNINGS)
            self._begins_line = len(last) < LINE and is_possible
            self._kept = last if self._begins_line else b""

    def find(self, pattern: Pattern, after: Line | None = None) -> Line | None:
        """The first matching line that the last piece completed; ``after``: behind this one."""
        if not any(word in self._text for word in pattern.words):
            return None
        begin = self._from if after is None else after.end + self._before
        match = pattern.regex.search(self._text, begin)
        return Line(match[1].replace(b"\r", b""), match.end() - self._before) if match else None


def _find_last_lines(descriptor: int, size: int, lines: int, most: int, *, ignore_last: bool) -> tuple[int, int]:
    """Offset of the last `lines` lines of a file, and how many line breaks follow it, except the file's last byte if ignored."""
    begin, found = size, 0
    while begin > 0 and size - begin < most and lines > 0:
        length = min(_SCAN, begin, most - (size - begin))
        begin -= length
        piece = os.pread(descriptor, length, begin)
        at = len(piece) - (1 if ignore_last and begin + length == size else 0)
        while (at := piece.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found == lines:
                return begin + at + 1, found
    return begin, found


def _open(log: Path) -> int | None:
    # Regular files only: opening another file can block.
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def _identify(name: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = os.stat(name, follow_symlinks=False)
        return status.st_dev, status.st_ino
    return None
