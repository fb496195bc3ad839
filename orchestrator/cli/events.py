"""`nohype events`: the event log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.client import Client
from orchestrator.evidence.document import read_file

_PAGE = 1000


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Keep printing events as they happen, until interrupted.")
@click.option("--after", type=click.IntRange(min=0), metavar="ID", help="Start after this event id; 0 starts with the oldest.")
@click.option("--guest", metavar="NAME", help="Only events about this guest.")
@click.option("--verify", is_flag=True, help="Verify that no event was changed or removed by others, instead of showing events.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="FILE",
    help="With --verify: evidence of this host, whose newest event must still be in the log.",
)  # fmt: skip
@json_option
@client_option
def events(
    *, follow: bool, after: int | None, guest: str | None, verify: bool, against: Path | None, as_json: bool, client: Client
) -> int:
    """Show the event log: what the manager decided, and why.

    Prints one line per event: id, time, kind, guest or host, caller, decision with its reason, duration in seconds. Without
    --after it prints the newest 1000 events. With --json and --follow it prints one JSON object per line. With --verify
    the exit status is 1 if the log is not intact.
    """
    if verify:
        if follow or guest or after is not None:
            raise click.UsageError("--verify excludes --follow, --after and --guest")
        return _verify(client, against, as_json=as_json)
    if against:
        raise click.UsageError("--against requires --verify")
    shown, last = [], after
    for event in _all_after(client, after):
        last = event["id"]
        if guest in (None, event["subject"]):
            shown.append(event)
            if follow or not as_json:
                _print_event(event, as_json=as_json)
    if as_json and not follow:
        print_json(shown)
    if follow:
        # After the last event read above, so that no event is missed.
        for event in client.follow(last):
            if guest in (None, event["subject"]):
                _print_event(event, as_json=as_json)
    return 0


def _verify(client: Client, against: Path | None, *, as_json: bool) -> int:
    signed: dict[str, Any] = read_file(against).evidence["events"] if against else {"last": 0, "hash": ""}
    number, digest = signed["last"], signed["hash"]
    chain = client.event_chain(number or None)
    faults = list(chain["faults"])
    if number and chain["at"] != digest:
        why = "has another hash" if chain["at"] else "is not in the log any more" if number <= chain["last"] else "is missing"
        faults.append(f"event {number}, the newest of {against}, {why}")
    if as_json:
        print_json({**chain, "faults": faults})
    else:
        for fault in faults:
            say(fault)
        state = "broken" if faults else "intact"
        say(
            f"event log {state}: {chain['events']} events up to {chain['last']}, hash {chain['hash']}, {chain['removed']} removed"
        )
    return int(bool(faults))


def _all_after(client: Client, after: int | None) -> Iterator[Mapping[str, Any]]:
    """The newest page, or all pages after an event."""
    page = client.events(after, _PAGE)
    while True:
        yield from page
        if after is None or len(page) < _PAGE:
            return
        page = client.events(page[-1]["id"], _PAGE)


def _print_event(event: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(event))
        return
    took = "" if event["took"] is None else f" ({event['took']:.3f} s)"
    # One line per event, whatever the detail contains (a refusal has one line per candidate).
    detail = " ".join(event["detail"].split())
    say(f"{event['id']:>6} {event['time']} {event['kind']:<12} {event['subject']:<16} by {event['who']}: {detail}{took}")
