"""Structured logs: to systemd's journal by its native protocol, elsewhere to standard error with a `<N>` in front (sd-daemon(3)).

What was logged with ``extra={"event": event}``, an event of the ledger, is found again by ``journalctl NOHYPE_GUEST=web`` or
``NOHYPE_EVENT=quarantined``. Protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
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

JOURNAL = Path("/run/systemd/journal/socket")

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
_EVENT = {"id": "EVENT_ID", "kind": "EVENT", "subject": "GUEST", "who": "WHO", "tenant": "TENANT", "took": "TOOK"}
_FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# A journal that stands still must not make the manager stand still.
_PATIENCE = 2.0


class JournalHandler(logging.Handler):
    """Sends records to the journal. One that the journal does not take is written to standard error.

    Args:
        path: the journal's socket.
    """

    def __init__(self, path: Path = JOURNAL) -> None:
        super().__init__()
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE)
        self._otherwise = logging.StreamHandler(sys.stderr)
        self._otherwise.setFormatter(PriorityFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            self._send(encode(build_fields(record, self.format(record))))
        except OSError:
            self._otherwise.handle(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """See logging.Handler."""
        self._socket.close()
        super().close()

    def _send(self, data: bytes) -> None:
        # sendto, not connect: journald may have been started again since.
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in (EMSGSIZE, ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        """Entries that are too big for a datagram go as a sealed file in memory, with an empty datagram."""
        file = os.memfd_create("nohype-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(data)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            # Not socket.send_fds: it takes an address, and forgets it (Python 3.13).
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file))
            self._socket.sendmsg([b""], [rights], 0, self._path)
        finally:
            os.close(file)


class PriorityFormatter(logging.Formatter):
    """A line a record, with its priority in front; further lines of a traceback get it too, so that each is shown alike."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        prefix = f"<{read_priority(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


def set_up_logging(level: int = logging.INFO, journal: Path = JOURNAL) -> None:
    """Sends all logs to the journal if our standard error goes there, else to standard error; not more than it takes."""
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
    """Whether standard error is the stream that systemd made for us (JOURNAL_STREAM in systemd.exec(5)) and the journal is there.

    Device and inode are compared: somebody may have sent standard error to a file, and passed the variable on.
    """
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}" and journal.exists()


def read_priority(level: int) -> int:
    """The priority of syslog(3) for a level of Python's logging."""
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)


def build_fields(record: logging.LogRecord, message: str) -> dict[str, str]:
    """The journal's fields of a record (systemd.journal-fields(7)). The guest of an event that is about the host is "host"."""
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
    """An entry on the wire: ``KEY=value`` a line, or where the value has line ends its length (64 bits, little-endian) before it.

    A name that the journal would refuse is left out: it would refuse the whole entry.
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
