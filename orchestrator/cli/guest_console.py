"""`nohype guest console`: shows a guest's serial console and types on it."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.names import complete_guest
from orchestrator.cli.terminal import raw_terminal
from orchestrator.cli.terminal_filter import TerminalFilter
from orchestrator.client import Client
from orchestrator.client.transport import Unreachable
from orchestrator.errors import GuestError, NotFound, OrchestratorError, TooMany

_PIECE = 4096
_HELD = 64 << 10  # bytes of input that wait for the guest: above this, standard input is not read
_PAUSE = 0.05
_LONG_PAUSE = 1.0
_LEFT_SECONDS = 2.0


def _parse_escape(_ctx: click.Context, _param: click.Parameter, text: str) -> bytes:
    if text == "none":
        return b""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 31])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise click.BadParameter(f"{text!r} is not a character, ^ followed by a character, or none")


@click.command()
@click.argument("name", shell_complete=complete_guest)
@click.option("--history", type=click.IntRange(0, 100_000), default=20, show_default=True, metavar="LINES",
              help="Show this many lines of earlier output first, at most 1 MB.")  # fmt: skip
@click.option("--no-follow", is_flag=True, help="Show only the earlier output. Works for a stopped guest too.")
@click.option("--no-input", is_flag=True, help="Only show the console; leave with Ctrl-C.")
@click.option("--escape", callback=_parse_escape, default="^]", show_default=True, metavar="CHARACTER",
              help="The key that leaves the console, such as ^] for Ctrl-]; `none` for no key.")  # fmt: skip
@click.option("--raw", is_flag=True,
              help="Print the output unchanged. Without it, only control sequences that draw reach the terminal: a guest could "
              "attack your terminal with others, such as queries, clipboard and title.")  # fmt: skip
@client_option
def console(name: str, *, history: int, no_follow: bool, no_input: bool, escape: bytes, raw: bool, client: Client) -> None:
    """Show a guest's serial console, and type on it.

    Several users can be connected to one console. The command ends with status 0 when you leave it, and with an error when the
    guest ends or is replaced.
    """
    typing = not (no_input or no_follow) and sys.stdin is not None
    interactive = typing and sys.stdin.isatty()
    output = _Output(client, name, history, follow=not no_follow, raw=raw)
    sender = _Sender(client, name, output.get_uuid) if typing else None
    if interactive:
        leave = f"; leave with {_show(escape)}" if escape else ""
        click.echo(f"console of guest {name}{leave}", err=True)
    with raw_terminal(sys.stdin.fileno()) if interactive else nullcontext():
        _run(output, sender, escape if interactive else b"")
    for part in (output, sender):
        if part and part.error:
            raise part.error


def _run(output: _Output, sender: _Sender | None, escape: bytes) -> None:
    """Returns at the end of the output, or when the user leaves."""
    wake, end = socket.socketpair()
    try:
        output.start(lambda: end.send(b"."))
        if sender:
            sender.start(lambda: end.send(b"."))
        standard_input = sys.stdin.fileno() if sender else None
        while not output.has_ended and not (sender and sender.error):
            watched: list[Any] = [wake]
            if standard_input is not None and sender and not sender.is_full:
                watched.append(standard_input)
            ready = select.select(watched, [], [], _PAUSE if sender and sender.is_full else None)[0]
            if standard_input in ready and sender and standard_input is not None:
                data = os.read(standard_input, _PIECE)
                before, found, _ = data.partition(escape) if escape else (data, b"", b"")
                sender.put(before)
                if found:
                    sender.flush(_LEFT_SECONDS)
                    return
                if not data:
                    standard_input = None
    finally:
        output.stop()
        wake.close()


class _Output:
    """Prints the console in a thread."""

    def __init__(self, client: Client, name: str, lines: int, *, follow: bool, raw: bool) -> None:
        self.error: OrchestratorError | None = None
        self.has_ended = False
        self._client, self._name, self._lines, self._follow = client, name, lines, follow
        self._filter = None if raw else TerminalFilter()
        self._lock = threading.Lock()
        self._uuid = ""
        self._known = threading.Event()

    def start(self, ended: Callable[[], object]) -> None:
        threading.Thread(target=self._print, args=(ended,), daemon=True).start()

    def get_uuid(self) -> str:
        """The guest's id: waits for the first output. Empty if there is none."""
        self._known.wait()
        return self._uuid

    def stop(self) -> None:
        """Prints nothing more, and changes the terminal back. Waits a moment for a write that is in progress."""
        if self._lock.acquire(timeout=_LEFT_SECONDS):
            # The lock is kept: the thread cannot print any more.
            if self._filter and (back := self._filter.finish()):
                self._write(back)
            self._filter = None

    def _print(self, ended: Callable[[], object]) -> None:
        try:
            for part in self._client.read_console(self._name, self._lines, follow=self._follow):
                self._uuid = part.uuid
                self._known.set()
                with self._lock:
                    if part.may_have_skipped:
                        self._write(b"\r\n[output may be missing here]\r\n")
                    self._write(self._filter.feed(part.data) if self._filter else part.data)
        except OrchestratorError as error:
            self.error = error
        except BrokenPipeError:
            pass  # the program that reads the output has ended
        finally:
            self.has_ended = True
            self._known.set()
            with suppress(OSError):
                ended()

    def _write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


class _Sender:
    """Types on the console in a thread, as fast as the guest takes it."""

    def __init__(self, client: Client, name: str, get_uuid: Callable[[], str]) -> None:
        self.error: OrchestratorError | None = None
        self._client, self._name, self._get_uuid = client, name, get_uuid
        self._changed = threading.Condition()
        self._waiting = bytearray()

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= _HELD

    def start(self, failed: Callable[[], object]) -> None:
        threading.Thread(target=self._send, args=(failed,), daemon=True).start()

    def put(self, data: bytes) -> None:
        with self._changed:
            self._waiting += data
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Waits until the guest has taken all."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self.error, seconds)

    def _send(self, failed: Callable[[], object]) -> None:
        while not self.error:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                piece = bytes(self._waiting[:_PIECE])
            pause = self._type(piece)
            if pause:
                time.sleep(pause)
        with suppress(OSError):
            failed()

    def _type(self, piece: bytes) -> float:
        """Types the beginning of the input; returns how many seconds to pause."""
        pause = 0.0
        try:
            taken = self._client.type_console(self._name, self._get_uuid(), piece)
            with self._changed:
                del self._waiting[:taken]
                self._changed.notify_all()
            pause = 0.0 if taken else _PAUSE
        except TooMany as error:
            pause = error.wait
        except Unreachable:
            # The manager may have typed it already: it is not typed twice.
            with self._changed:
                del self._waiting[: len(piece)]
            click.echo("\r\n[connection to the manager lost: input may be missing]\r", err=True)
            pause = _LONG_PAUSE
        except (NotFound, GuestError):
            pause = _LONG_PAUSE  # the guest has ended: the reader of the output learns the reason
        except OrchestratorError as error:
            self.error = error
        return pause


def _show(escape: bytes) -> str:
    return f"Ctrl-{chr(escape[0] | 64)}" if escape[0] < 32 else escape.decode()
