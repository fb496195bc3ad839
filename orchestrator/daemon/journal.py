"""Structured logs: to systemd's journal by its native protocol, otherwise to standard error with a prefix `<N>` (sd-daemon(3)).

Messages with ``extra={"event": event}`` have the event's fields: ``journalctl NOHYPE_GUEST=web``, ``NOHYPE_EVENT=quarantined``.
Protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from errno import EMSGSIZE, ENOBUFS
from pathlib import Path

from orchestrator.daemon.flood import FloodFilter
from orchestrator.model.event import EVENT_FIELDS

JOURNAL = Path("/run/systemd/journal/socket")

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
_RENAMED = {"id": "EVENT_ID", "kind": "EVENT", "subject": "GUEST"}
# The journal has its own time, and the message contains the detail.
_EVENT = {name: _RENAMED.get(name, name.upper()) for name in EVENT_FIELDS if name not in ("time", "detail")}
_FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# A journal that hangs must not block the manager.
_TIMEOUT = 2.0


class JournalHandler(logging.Handler):
    """Sends records to the journal's socket. Records that the journal does not accept go to standard error."""

    def __init__(self, path: Path = JOURNAL) -> None:
        super().__init__()
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_TIMEOUT)
        self.fallback = logging.StreamHandler(sys.stderr)
        self.fallback.setFormatter(PriorityFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(encode(build_fields(record, self.format(record))))
        except OSError:
            self.fallback.handle(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _send(self, data: bytes) -> None:
        # sendto, not connect: journald may have been restarted.
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in (EMSGSIZE, ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        """Sends an entry that is too big for a datagram as a sealed memory file with an empty datagram."""
        file = os.memfd_create("nohype-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(data)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            # Not socket.send_fds: it ignores its argument `address` (Python 3.13).
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file))
            self._socket.sendmsg([b""], [rights], 0, self._path)
        finally:
            os.close(file)


class PriorityFormatter(logging.Formatter):
    """Each line begins with the priority, also the lines of a traceback."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{read_priority(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


def set_up_logging(level: int = logging.INFO, journal: Path = JOURNAL) -> None:
    """Logs to the journal if standard error is connected to it, otherwise to standard error; with ``FloodFilter``."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if writes_to_journal(journal):
        handler = JournalHandler(journal)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    elif sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(PriorityFormatter())
    handler.addFilter(FloodFilter(handler.handle))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def writes_to_journal(journal: Path = JOURNAL) -> bool:
    """Standard error is systemd's stream (JOURNAL_STREAM in systemd.exec(5): device and inode), and the journal exists.

    The variable alone is not enough: programs whose standard error is a file inherit it.
    """
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}" and journal.exists()


def read_priority(level: int) -> int:
    """syslog(3)'s priority."""
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)


def build_fields(record: logging.LogRecord, message: str) -> dict[str, str]:
    """The fields of a record (systemd.journal-fields(7)). NOHYPE_GUEST of an event about the host is "host"."""
    event = getattr(record, "event", None)
    own = {f"NOHYPE_{field}": getattr(event, name, None) for name, field in _EVENT.items()}
    return {
        "MESSAGE": message,
        "PRIORITY": str(read_priority(record.levelno)),
        "SYSLOG_IDENTIFIER": "nohyped",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
        "THREAD_NAME": record.threadName or "",
        **{name: str(value) for name, value in own.items() if value not in (None, "")},
    }


def encode(entry: Mapping[str, str]) -> bytes:
    """``KEY=value`` per line; a value with line ends is preceded by its length (64 bits, little-endian) instead.

    Invalid names are omitted: the journal would reject the whole entry.
    """
    lines = []
    for name, text in entry.items():
        if not _FIELD.fullmatch(name):
            continue
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            lines.append(name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n")
        else:
            lines.append(name.encode() + b"=" + value + b"\n")
    return b"".join(lines)
