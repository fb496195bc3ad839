"""`nohype top`: the host, refreshed until a key ends it."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from queue import SimpleQueue

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.host_rates import measure_others, measure_rates
from orchestrator.cli.output import json_option, print_json, printable, say
from orchestrator.cli.seconds import Seconds
from orchestrator.cli.terminal import raw_terminal, read_size
from orchestrator.cli.top_pages import PAGES, Line, PlanResult, Reading, show_head
from orchestrator.cli.top_plan import Request, ask_plan, parse_request
from orchestrator.client import Client
from orchestrator.client.host_shapes import Host
from orchestrator.errors import OrchestratorError

_ONCE_SECONDS = 1.0
"""Between the two readings of --once. The manager reads at most twice per second."""
_SILENCE = 3.0
"""Seconds after which a missing response is shown."""
_KEY_SECONDS = 0.25
_SPARK_SECONDS = 60.0
_SPARK_WIDTH = 30
_END_KEYS = ("q", "\x03", "\x04", "\x1b")  # q, ^C, ^D, Escape
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
"""Another screen, without cursor and without wrapping of long lines; and back (xterm's ctlseqs)."""


@click.command()
@click.option("--once", is_flag=True, help="Print all pages once. Reads the host twice, because rates need two readings.")
@click.option("--interval", type=Seconds(min=1, max=3600), default=2.0, show_default=True, metavar="SECONDS",
              help="Time between two readings.")  # fmt: skip
@click.option("--plan", "request", type=click.File("rb"), metavar="FILE", callback=parse_request,
              help="Show whether a guest could be created now, and why not. FILE: `POST /v1/plans` in JSON.")  # fmt: skip
@json_option
@client_option
def top(*, once: bool, interval: float, request: Request | None, as_json: bool, client: Client) -> None:
    """Show the host and its guests live.

    Keys: 1 cores, 2 guests, 3 virtual functions, 4 NUMA nodes, 5 vCPUs, q end. What needs a person is at the top, oldest first,
    with the command to do it.

    BUSY is the part of the time that a vCPU ran, of the busiest. WAIT is the milliseconds per second that it was ready, but its
    core did something else: 0 on cores of their own; above 1, the threads that ran there are named. EXITS/S are VM exits per
    second. PROOFS are the verdicts of the last `nohype audit`, which this command does not start. A `-` was not measured.

    With --json one object per reading and line; with --once one object.
    """
    readings = read_host(client, request, _ONCE_SECONDS if once else interval)
    if not once and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        _watch(client, request, interval)
        return
    for reading in readings:
        if as_json:
            rates = {name: [asdict(vcpu) for vcpu in vcpus] for name, vcpus in reading.rates.items()}
            others = {name: None if found is None else [asdict(one) for one in found] for name, found in reading.others.items()}
            found = {**reading.host, "rates": rates, "others": others, **({"plan": reading.plan} if reading.plan else {})}
            print_json(found) if once else click.echo(json.dumps(found))
        else:
            _print_all(reading)
        if once:
            return


def read_host(client: Client, request: Request | None, interval: float) -> Iterator[Reading]:
    """Yields a reading with rates every ``interval`` seconds, indefinitely."""
    before = client.host()
    history = _History(interval)
    while True:
        time.sleep(interval)
        after = client.host()
        yield history.add(before, after, ask_plan(client, request))
        before = after


class _History:
    """The exits of the last minute."""

    def __init__(self, interval: float) -> None:
        self._length = max(1, min(_SPARK_WIDTH, int(_SPARK_SECONDS / interval)))
        self._values: dict[tuple[str, int], deque[float]] = {}
        self._last: Reading | None = None

    def add(self, before: Host | None, after: Host, plan: PlanResult | None) -> Reading:
        # The same clock: the manager has not read the host again.
        if not self._last or not before or before["clock"] != after["clock"]:
            self._last = self._measure(before, after)
        self._last = replace(self._last, plan=plan)
        return self._last

    def _measure(self, before: Host | None, after: Host) -> Reading:
        rates = measure_rates(before, after)
        known, self._values = self._values, {}
        for guest, vcpus in rates.items():
            for index, vcpu in enumerate(vcpus):
                values = self._values[guest, index] = known.get((guest, index), deque(maxlen=self._length))
                if vcpu.exits is not None:
                    values.append(vcpu.exits)
        history = {key: tuple(values) for key, values in self._values.items()}
        return Reading(after, rates, history, others=measure_others(before, after))


def _print_all(reading: Reading) -> None:
    width = read_size(sys.stdout.fileno())[0] if sys.stdout.isatty() else 100
    for line, _ in show_head(reading):
        say(line)
    for title, show in PAGES.values():
        say(f"--- {title}")
        for line, _ in show(reading, width):
            say(line)
        say("")


def _watch(client: Client, request: Request | None, interval: float) -> None:
    history, page = _History(interval), "2"
    reading = history.add(None, client.host(), ask_plan(client, request))  # raises if the manager cannot be reached at all
    results: SimpleQueue[tuple[Host, PlanResult | None] | OrchestratorError] = SimpleQueue()
    # A daemon: a manager that does not respond must hold up neither keys nor the end.
    threading.Thread(target=_read_repeatedly, args=(client, request, interval, results), name="host", daemon=True).start()
    error, heard_at = "", time.monotonic()
    with raw_terminal(sys.stdin.fileno()), _screen():
        while True:
            while not results.empty():
                found, heard_at, error = results.get(), time.monotonic(), ""
                if isinstance(found, OrchestratorError):
                    error = f"{found.message}: trying again"
                else:
                    reading = history.add(reading.host, *found)
            silence = time.monotonic() - heard_at
            problem = error or (f"no response for {silence:.0f} s" if silence > interval + _SILENCE else "")
            _paint(reading, page, f"values of {reading.host['time'][11:19]} UTC: {problem}" if problem else "")
            if (key := _wait_for_key(_KEY_SECONDS)) in _END_KEYS:
                return
            page = key if key in PAGES else page


def _read_repeatedly(
    client: Client, request: Request | None, interval: float,
    results: SimpleQueue[tuple[Host, PlanResult | None] | OrchestratorError],
) -> None:  # fmt: skip
    while True:
        time.sleep(interval)
        try:
            results.put((client.host(), ask_plan(client, request)))
        except OrchestratorError as error:
            results.put(error)


@contextmanager
def _screen() -> Iterator[None]:
    click.echo(_ENTER, nl=False)
    try:
        yield
    finally:
        click.echo(_LEAVE, nl=False)


def _paint(reading: Reading, page: str, problem: str) -> None:
    columns, rows = read_size(sys.stdout.fileno())
    keys = "   ".join(f"[{key} {name}]" if key == page else f"{key} {name}" for key, (name, _) in PAGES.items())
    lines: list[Line] = [(problem, "red")] if problem else []
    lines += [*show_head(reading), *PAGES[page][1](reading, columns)]
    if len(lines) > rows - 1:
        lines = [*lines[: rows - 2], (f"{len(lines) - rows + 2} more lines: enlarge the terminal, or use --once", "yellow")]
    lines += [("", "")] * (rows - 1 - len(lines)) + [(f"{keys}   q end", "cyan")]
    # A hostile name must not reach the terminal as a control sequence.
    shown = (click.style(printable(text)[:columns], fg=colour or None) + "\x1b[K" for text, colour in lines)
    sys.stdout.write("\x1b[H" + "\r\n".join(shown))
    sys.stdout.flush()


def _wait_for_key(seconds: float) -> str:
    """The key, or empty after this time."""
    ready, _, _ = select.select([sys.stdin.fileno()], [], [], max(0.0, seconds))
    if not ready:
        return ""
    typed = os.read(sys.stdin.fileno(), 64)
    # An empty read: the terminal was closed. Cursor keys begin with Escape too.
    return "q" if not typed else typed.decode("ascii", "replace") if len(typed) == 1 else ""
