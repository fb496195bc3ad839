"""Logs as the journal gets them: read back from a real datagram socket with a parser of the protocol."""

from __future__ import annotations

import array
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.daemon import journal
from orchestrator.daemon.journal import JournalHandler, PriorityFormatter, encode, set_up_logging, writes_to_journal
from orchestrator.ledger import Event


def parse(data: bytes) -> dict[str, bytes]:
    """What journald makes of an entry (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value
        data = rest
    return found


class Journald:
    """A datagram socket as journald has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(30)

    def receive(self) -> dict[str, bytes]:
        """The next entry; by datagram, or as a file."""
        descriptors = array.array("i")
        data, ancillary, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_LEN(descriptors.itemsize))
        for level, kind, content in ancillary:
            assert (level, kind, data) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, b"")
            descriptors.frombytes(content)
            with open(descriptors[0], "rb") as file:
                # The writer's position: journald maps the file, whatever that is.
                return parse(os.pread(file.fileno(), 1 << 26, 0))
        return parse(data)

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    found = Journald(tmp_path / "socket")
    yield found
    if found.path.exists():
        found.close()


@pytest.fixture
def log(journald: Journald) -> Iterator[logging.Logger]:
    handler = JournalHandler(journald.path)
    logger = logging.getLogger("nohyped-test")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)
    handler.close()


def test_an_entry_has_the_fields_that_one_searches_by(log: logging.Logger, journald: Journald) -> None:
    event = Event(17, "2026-01-01T00:00:00+00:00", "ended", "web", "by itself", "manager", "", 0.25)
    log.warning("guest %s is gone", "web", extra={"event": event})
    entry = journald.receive()
    assert entry["MESSAGE"] == b"guest web is gone"
    assert (entry["PRIORITY"], entry["NOHYPE_GUEST"], entry["NOHYPE_EVENT"]) == (b"4", b"web", b"ended")
    assert (entry["NOHYPE_EVENT_ID"], entry["NOHYPE_WHO"], entry["NOHYPE_TOOK"]) == (b"17", b"manager", b"0.25")
    assert "NOHYPE_TENANT" not in entry
    assert entry["CODE_FILE"].endswith(b"test_journal.py")
    assert entry["CODE_FUNC"] == b"test_an_entry_has_the_fields_that_one_searches_by"
    assert int(entry["CODE_LINE"])
    assert entry["SYSLOG_IDENTIFIER"] == b"nohyped"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, b"7"), (logging.INFO, b"6"), (logging.WARNING, b"4"), (logging.ERROR, b"3"), (logging.CRITICAL, b"2")],
)
def test_priorities(log: logging.Logger, journald: Journald, level: int, priority: bytes) -> None:
    log.log(level, "x")
    assert journald.receive()["PRIORITY"] == priority


@pytest.mark.parametrize("text", ["two\nlines", "PRIORITY=0\nMESSAGE=forged", "", "\n", "nul \0 inside", "ä 漢"])
def test_any_text_arrives_as_it_is(log: logging.Logger, journald: Journald, text: str) -> None:
    log.info("%s", text)
    entry = journald.receive()
    assert entry["MESSAGE"].decode() == text
    assert entry["PRIORITY"] == b"6"


def test_lone_surrogates_are_escaped() -> None:
    assert parse(encode({"MESSAGE": "name \ud800"})) == {"MESSAGE": b"name \\ud800"}


def test_a_traceback_is_part_of_the_message(log: logging.Logger, journald: Journald) -> None:
    try:
        raise ValueError("of ours")
    except ValueError:
        log.exception("a fault")
    message = journald.receive()["MESSAGE"].decode()
    assert message.startswith("a fault\nTraceback")
    assert message.endswith("ValueError: of ours")


@pytest.mark.parametrize("size", [100_000, 300_000, 5_000_000])
def test_a_message_that_is_too_big_for_a_datagram_arrives_whole(log: logging.Logger, journald: Journald, size: int) -> None:
    log.error("x" * size)
    assert journald.receive()["MESSAGE"] == b"x" * size


def test_a_journal_that_was_started_again_is_found(log: logging.Logger, journald: Journald) -> None:
    log.info("first")
    journald.receive()
    journald.close()
    again = Journald(journald.path)
    log.info("second")
    assert again.receive()["MESSAGE"] == b"second"


def test_without_a_journal_nothing_is_lost(log: logging.Logger, journald: Journald, capfd: pytest.CaptureFixture[str]) -> None:
    handler = log.handlers[0]
    assert isinstance(handler, JournalHandler)
    handler.fallback.setStream(sys.stderr)
    journald.close()
    log.error("all\nlines")
    assert capfd.readouterr().err == "<3>nohyped-test: all\n<3>lines\n"


def test_hanging_journal_does_not_block(
    log: logging.Logger, journald: Journald, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = log.handlers[0]
    assert isinstance(handler, JournalHandler)
    handler.fallback.setStream(sys.stderr)
    for _ in range(600):  # more than net.unix.max_dgram_qlen
        log.info("again")
        if said := capfd.readouterr().err:
            break
    assert said == "<6>nohyped-test: again\n"


def test_invalid_field_names_are_omitted() -> None:
    assert parse(encode({"MESSAGE": "x", "_HOSTNAME": "forged", "lower": "x", "A=B": "x", "": "x"})) == {"MESSAGE": b"x"}


def test_journal_is_used_only_if_journal_stream_matches(
    tmp_path: Path, journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        found = os.fstat(stream.fileno())
        assert not writes_to_journal(journald.path)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not writes_to_journal(journald.path)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert writes_to_journal(journald.path)
        assert not writes_to_journal(tmp_path / "none")


def test_set_up_without_a_journal_writes_priorities_to_standard_error(tmp_path: Path) -> None:
    code = (
        "import logging; from orchestrator.daemon.journal import set_up_logging; set_up_logging();"
        "logging.getLogger('x').warning('one\\ntwo'); logging.getLogger('x').debug('no')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(journal.__file__).parents[1]
    )
    assert done.stderr == "<4>x: one\n<4>two\n"


def test_set_up_with_a_journal_uses_it(tmp_path: Path, journald: Journald, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    with (tmp_path / "stderr").open("w+") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        root.handlers = []
        try:
            set_up_logging(journal=journald.path)
            logging.getLogger("uvicorn.error").info("hello")
            assert journald.receive()["MESSAGE"] == b"uvicorn.error: hello"
        finally:
            root.handlers, root.level = before, level
        stream.seek(0)
        assert stream.read() == ""


def test_the_line_format_names_the_logger() -> None:
    record = logging.LogRecord("nohyped", logging.INFO, "f", 1, "hi", (), None)
    assert PriorityFormatter().format(record) == "<6>nohyped: hi"
