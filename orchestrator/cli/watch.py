"""`nohype events`, `quarantine` and `metrics`: what the manager has done, what it has put aside, and its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.client.client import Client

_PAGE = 1000


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with events as they happen, until interrupted.")
@click.option(
    "--after", type=click.IntRange(min=0), metavar="ID", help="Begin after the event with this id; 0: with the first of all."
)
@click.option("--guest", metavar="NAME", help="Only events about this guest.")
@json_option
@client_option
def events(*, follow: bool, after: int | None, guest: str | None, as_json: bool, client: Client) -> None:
    """Show what has happened, and what happens.

    A line an event: its id, when, what, about whom, who asked, what was decided and why, how many seconds it took. Without
    --after the newest 1000 events. With --json and --follow each line is an event as JSON.
    """
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
        # From the last one of those on: what has happened since is not missed.
        for event in client.follow(last):
            if guest in (None, event["subject"]):
                _print_event(event, as_json=as_json)


@click.group()
def quarantine() -> None:
    """List and clear guests that are not verified clean.

    Such a guest has ended, but something that it had could not be verified to be as before: nobody else gets any of it until it
    is cleared.
    """


@quarantine.command("list")
@json_option
@client_option
def list_quarantined(*, as_json: bool, client: Client) -> None:
    """List the guests in quarantine, each with its reasons."""
    found = client.quarantined()
    if as_json:
        print_json(found)
    elif found:
        for one in found:
            say(f"{one['name']}, since {one['since']}")
            for reason in one["reasons"]:
                say(f"  {reason}")
    else:
        say("nothing is in quarantine")


@quarantine.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Even if it is still not clean: you have seen to it that it does no harm.")
@json_option
@client_option
def clear(name: str, *, force: bool, as_json: bool, client: Client) -> None:
    """Give back what the guest NAME had.

    The manager looks again first, and refuses if something is still not clean. Operators only.
    """
    client.clear_quarantine(name, force=force)
    print_json({"name": name, "state": "cleared"}) if as_json else say(f"{name} cleared")


@click.command()
@json_option
@client_option
def metrics(*, as_json: bool, client: Client) -> None:
    """Print the manager's figures for Prometheus.

    In its text format, as Prometheus itself gets them from GET /v1/metrics. With --json a list of series and values.
    """
    text = client.metrics()
    if as_json:
        print_json(_parse_metrics(text))
    else:
        say(text, nl=False)


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
    # A line an event, whatever the detail holds (a refusal has a line for each candidate).
    detail = " ".join(event["detail"].split())
    say(f"{event['id']:>6} {event['time']} {event['kind']:<12} {event['subject']:<16} by {event['who']}: {detail}{took}")


def _parse_metrics(text: str) -> list[dict[str, str]]:
    """Each sample as Prometheus writes it: the series (name and labels), and the figure. Kept as text: it may be NaN or Inf."""
    samples = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [{"series": series, "value": value} for series, _, value in samples]
