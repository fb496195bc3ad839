"""Shows the stages of long work on standard error: updated live on a terminal, otherwise one line per stage."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from orchestrator.lab.progress import Event, Kind, Timeline


@contextmanager
def show_progress() -> Iterator[Timeline]:
    with _live() if sys.stderr.isatty() else _plain() as report:
        yield Timeline(report)


@contextmanager
def _plain() -> Iterator[Callable[[Event], None]]:
    def report(event: Event) -> None:
        if event.kind is Kind.NOTE:
            click.echo(f"  {event.text}", err=True)
        elif event.kind in (Kind.END, Kind.FAILED):
            word = "" if event.kind is Kind.END else ": failed"
            click.echo(f"{event.stage}{word} ({event.seconds:.1f} s)", err=True)

    yield report


@contextmanager
def _live() -> Iterator[Callable[[Event], None]]:
    # Imported late: other commands run under emulation, where each import takes time.
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    running: list[tuple[str, float]] = []
    note = ""
    lock = threading.Lock()

    class Current:
        def __rich__(self) -> Text:
            with lock:
                if not running:
                    return Text()
                name, since = running[-1]
                seconds = time.monotonic() - since
                sign = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(seconds * 8) % 10]
                text = Text.assemble((f"{sign} ", "cyan"), f"{name} ", (f"{seconds:5.1f} s", "cyan"), (f"  {note}", "dim"))
                text.truncate(console.width - 1, overflow="ellipsis")
                return text

    with Live(Current(), console=console, refresh_per_second=8, transient=True, redirect_stdout=False) as live:

        def report(event: Event) -> None:
            if event.kind is Kind.PAUSE:
                live.stop()
                return
            if event.kind is Kind.BEGIN:
                live.start()  # does nothing if it runs; not sooner, as it clears an unfinished line of the other program
            show(event)

        def show(event: Event) -> None:
            nonlocal note
            with lock:
                if event.kind is Kind.BEGIN:
                    running.append((event.stage, time.monotonic()))
                    note = ""
                elif event.kind is Kind.NOTE:
                    note = event.text
                elif event.kind in (Kind.END, Kind.FAILED):
                    running.pop()
                    note = ""
            if event.kind in (Kind.END, Kind.FAILED):
                sign = ("✔ ", "green") if event.kind is Kind.END else ("✘ ", "red")
                live.console.print(Text.assemble(sign, f"{event.stage} ", (f"{event.seconds:5.1f} s", "dim")))
            elif event.kind is Kind.NOTE and not running:
                live.console.print(Text(f"  {event.text}", "dim"))

        yield report
