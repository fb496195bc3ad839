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

    The text that Prometheus itself reads from GET /v1/metrics. With --json a list of series and values.
    """
    text = client.metrics()
    if as_json:
        print_json(_parse_metrics(text))
    else:
        say(text, nl=False)


def _parse_metrics(text: str) -> list[dict[str, str]]:
    """The samples: series (name and labels) and value. Values stay text, since they can be NaN or Inf."""
    samples = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [{"series": series, "value": value} for series, _, value in samples]
