"""`nohype events`, `quarantine` and `metrics`: what the manager has done, what it has put aside, and its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from orchestrator.api.client import Client
from orchestrator.cli.output import json_option, print_json, socket_option

_PAGE = 1000


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until interrupted.")
@click.option("--after", type=click.IntRange(min=0), metavar="ID", help="Begin after this event; 0: with the first of all.")
@click.option("--guest", metavar="NAME", help="Only what is about this guest.")
@json_option
@socket_option
def events(*, follow: bool, after: int | None, guest: str | None, as_json: bool, path: Path) -> None:
    """Show what has happened: who asked, what was decided and why, what changed, how long it took.

    Without --after the newest 1000 events. With --json and --follow each event is one line.
    """
    client, shown, last = Client(path), [], after
    for event in _all_after(client, after):
        last = event["id"]
        if guest in (None, event["subject"]):
            shown.append(event)
            if follow or not as_json:
                _print_event(event, as_json=as_json)
    if as_json and not follow:
        print_json(shown)
    if follow:
        # From the last one of those on: what has happened since is not missed.
        for event in client.follow(last):
            if guest in (None, event["subject"]):
                _print_event(event, as_json=as_json)


@click.group()
def quarantine() -> None:
    """Guests that have ended, but not everything they had could be verified clean: nobody else gets it until that is cleared."""


@quarantine.command("list")
@json_option
@socket_option
def list_quarantined(*, as_json: bool, path: Path) -> None:
    """List the guests in quarantine, and why they are there."""
    found = Client(path).quarantined()
    if as_json:
        print_json(found)
    elif found:
        for one in found:
            click.echo(f"{one['name']}, since {one['since']}")
            for reason in one["reasons"]:
                click.echo(f"  {reason}")
    else:
        click.echo("nothing is in quarantine")


@quarantine.command()
@click.argument("name")
@json_option
@socket_option
def clear(name: str, *, as_json: bool, path: Path) -> None:
    """Give back what the guest NAME had. You have seen to it that it is clean: it is not looked at again."""
    Client(path).clear_quarantine(name)
    print_json({"name": name, "state": "cleared"}) if as_json else click.echo(f"{name} cleared")


@click.command()
@json_option
@socket_option
def metrics(*, as_json: bool, path: Path) -> None:
    """Print what Prometheus reads (`GET /v1/metrics`)."""
    text = Client(path).metrics()
    if as_json:
        print_json(_parse_metrics(text))
    else:
        click.echo(text, nl=False)


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
        click.echo(json.dumps(event))
        return
    took = "" if event["took"] is None else f" ({event['took']:.3f} s)"
    # A line an event, whatever the detail holds (a refusal has a line for each candidate).
    detail = " ".join(event["detail"].split())
    click.echo(f"{event['id']:>6} {event['time']} {event['kind']:<12} {event['subject']:<16} by {event['who']}: {detail}{took}")


def _parse_metrics(text: str) -> list[dict[str, str]]:
    """Each sample as Prometheus writes it: the series (name and labels), and the figure. Kept as text: it may be NaN or Inf."""
    samples = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [{"series": series, "value": value} for series, _, value in samples]
