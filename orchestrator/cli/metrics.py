"""`nohype metrics`: the samples that Prometheus reads."""

from __future__ import annotations

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.client import Client


@click.command()
@json_option
@client_option
def metrics(*, as_json: bool, client: Client) -> None:
    """Print metrics in Prometheus format.

    This is the text that GET /v1/metrics returns to Prometheus. With --json it is a list of series and values.
    """
    text = client.metrics()
    if as_json:
        print_json(_parse_metrics(text))
    else:
        say(text, nl=False)


def _parse_metrics(text: str) -> list[dict[str, str]]:
    # Values stay text: they can be NaN or Inf.
    samples = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [{"series": series, "value": value} for series, _, value in samples]
