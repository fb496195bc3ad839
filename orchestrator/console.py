"""A guest's serial console as text: its log, read piece by piece, and the lines in it that belong to the protocol `nohype-1`.

A guest may print anything, as fast as it likes, without ever ending a line. So nothing here reads, keeps or decodes more than a
fixed number of bytes at a time, and each byte is looked at once. The log is that of libvirt (`<log file=...>` of a serial port);
virtlogd renames a full one to LOG.0, and LOG.0 to LOG.1, and so on (src/util/virrotatingfile.c).
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LINE = 4096
"""Bytes of the longest line that can belong to the protocol; a longer one is noise."""


@dataclass(frozen=True)
class Pattern:
    """Lines of the protocol.

    Attributes:
        words: one of these is in each of them: what is quickly seen to have none needs no regular expression.
        regex: matches one with its end; possessive, so that each byte is looked at once.
    """

    words: tuple[bytes, ...]
    regex: re.Pattern[bytes]


READY = Pattern((b"nohype: ready ",), re.compile(rb"^\r*+(nohype: ready [^\n]{0,%d}+)\n" % LINE, re.MULTILINE))
ANSWER = Pattern(
    (b"nohype: done", b"nohype: error"), re.compile(rb"^\r*+(nohype: (?:done|error)[^\n]{0,%d}+)\n" % LINE, re.MULTILINE)
)

ANSWER_BYTES = 16 << 10
"""What is kept of all that a guest prints before its answer: the last of it."""

_WORD = b"nohype: "
_TAIL_READ, _TAIL_LINES, _TAIL_LINE, _TAIL_BYTES = 4 << 10, 8, 200, 2000
_BACKUPS = 100
# C0 controls but tab and line feed. All become one of them, which is replaced when the text is decoded.
_CONTROLS = bytes(0 if code < 32 and code not in (9, 10) or code == 127 else code for code in range(256))
# C1 controls, and what changes the direction of text (Unicode 9, UAX 9 2).
_UNSAFE = re.compile("[\x80-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(printed: bytes) -> str:
    """Text without what could move the cursor of whoever reads it, or turn his text round."""
    text = printed.replace(b"\r", b"").translate(_CONTROLS).decode(errors="replace")
    if not text.isascii():
        text = _UNSAFE.sub("\ufffd", text)
    return text.replace("\0", "\ufffd")


def format_tail(printed: bytes) -> str:
    """The last lines, as the end of an error message: at most 8 of 200 characters each, and 2,000 bytes in all."""
    lines = clean(printed[-_TAIL_READ:]).splitlines()[-_TAIL_LINES:]
    shown = [f"\n    {line if len(line) <= _TAIL_LINE else f'{line[: _TAIL_LINE - 3]}...'}" for line in lines]
    while sum(len(line.encode()) for line in shown) > _TAIL_BYTES:
        del shown[0]
    return "".join(shown) or " nothing"


def read_tail(log: Path) -> bytes:
    """The last bytes of a log; none if it is not there."""
    descriptor = _open(log)
    if descriptor is None:
        return b""
    try:
        return os.pread(descriptor, _TAIL_READ, max(0, os.fstat(descriptor).st_size - _TAIL_READ))
    finally:
        os.close(descriptor)


class LogReader:
    """Reads a log once from its beginning on, or from where it was told to skip to, also when virtlogd puts files aside.

    Args:
        log: need not be there yet.
        backups: whether files that were put aside before are the guest's too; if so they are read first.
    """

    def __init__(self, log: Path, *, backups: bool) -> None:
        self._log, self._backups = log, backups
        self._descriptor: int | None = None
        # Device and inode of the file that is being read: its name changes when it is put aside.
        self._file: tuple[int, int] | None = None
        self._offset = 0

    @property
    def was_put_aside(self) -> bool:
        """Whether something of the log was put aside: the guest has printed a lot."""
        return _identify(self._name(0)) is not None

    def read(self, limit: int) -> bytes:
        """What comes next, at most ``limit`` bytes; empty if there is nothing yet.

        Raises:
            OSError: the log can't be read.
        """
        for _ in range(_BACKUPS + 2):
            if self._descriptor is None and not self._go_on():
                return b""
            assert self._descriptor is not None
            if data := os.pread(self._descriptor, limit, self._offset):
                self._offset += len(data)
                return data
            if not self._next_file():
                return b""
        return b""

    def skip_to_end(self) -> bool:
        """Goes on with what is printed from now on; returns whether that begins a line.

        Raises:
            OSError: the log can't be read.
        """
        self.close()
        self._file, self._offset = None, 0
        self._descriptor = _open(self._log)
        if self._descriptor is None:
            return True
        self._offset = self._note_file()
        return self._offset == 0 or os.pread(self._descriptor, 1, self._offset - 1) == b"\n"

    def close(self) -> None:
        """Lets go of the file; ``read`` goes on where it was."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _go_on(self) -> bool:
        """Opens the file that was being read, or the oldest if that is gone."""
        names = self._names()
        index = self._find(names)
        if index is None:
            index = self._offset = 0
        return bool(names) and self._open(names[index])

    def _next_file(self) -> bool:
        """At the end of a file: whether there is more to read, in it or in the next."""
        assert self._descriptor is not None
        now = _identify(self._log)
        if now is None:
            return False
        if now == self._file:
            begun_anew = os.fstat(self._descriptor).st_size < self._offset
            self._offset = 0 if begun_anew else self._offset
            return begun_anew
        # Something may have been printed between our last look and the renaming.
        if os.pread(self._descriptor, 1, self._offset):
            return True
        names = self._names()
        index = self._find(names)
        following = 0 if index is None else index + 1
        if following >= len(names):
            return False
        self.close()
        self._offset = 0
        return self._open(names[following])

    def _find(self, names: list[Path]) -> int | None:
        """Which of the files is the one that is being read."""
        return next((index for index, name in enumerate(names) if self._file and _identify(name) == self._file), None)

    def _open(self, name: Path) -> bool:
        self._descriptor = _open(name)
        if self._descriptor is None:
            return False
        self._note_file()
        return True

    def _note_file(self) -> int:
        """Notes which file is open; returns its size."""
        assert self._descriptor is not None
        status = os.fstat(self._descriptor)
        self._file = status.st_dev, status.st_ino
        return status.st_size

    def _names(self) -> list[Path]:
        """The files of the log, oldest first."""
        names = [self._log] if _identify(self._log) else []
        if self._backups:
            for number in range(_BACKUPS):
                if not _identify(self._name(number)):
                    break
                names.insert(0, self._name(number))
        return names

    def _name(self, number: int) -> Path:
        return self._log.with_name(f"{self._log.name}.{number}")


@dataclass(frozen=True)
class Line:
    """A line of the protocol.

    Attributes:
        text: without its end and without carriage returns.
        end: position behind its end in the piece with which it was complete.
    """

    text: bytes
    end: int


class LineScanner:
    """Finds lines of the protocol in what is fed to it piece by piece.

    Args:
        begins_line: whether the first piece begins with a line.
    """

    def __init__(self, *, begins_line: bool = True) -> None:
        self._begins_line = begins_line
        # The begin of a line that may become one of the protocol, shorter than LINE; and with the piece that was fed last.
        self._kept = self._text = b""
        self._before = self._from = 0

    def feed(self, data: bytes) -> None:
        """Takes the next piece."""
        self._text, self._before = self._kept + data, len(self._kept)
        self._from = 0 if self._begins_line else self._text.find(b"\n") + 1 or len(self._text)
        begin = self._text.rfind(b"\n") + 1
        if begin or self._begins_line:
            # Carriage returns before a line count for nothing.
            last = self._text[begin:].lstrip(b"\r")
            self._begins_line = len(last) < LINE and (last.startswith(_WORD) or _WORD.startswith(last))
            self._kept = last if self._begins_line else b""

    def find(self, pattern: Pattern) -> Line | None:
        """The first line that is complete with the last piece and matches."""
        if not any(word in self._text for word in pattern.words):
            return None
        match = pattern.regex.search(self._text, self._from)
        return Line(match[1].replace(b"\r", b""), match.end() - self._before) if match else None


def _open(log: Path) -> int | None:
    """A plain file only: opening anything else could block."""
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
