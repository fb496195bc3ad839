"""`nohype fleet metrics` and `map`: the hosts of the fleet, as Slurm's controller knows them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TextIO

import click

from orchestrator.cli.fleet_modules import load_fleet
from orchestrator.errors import HostError, OrchestratorError


@click.command()
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Replace FILE in one step instead, for the textfile collector of node_exporter.")  # fmt: skip
def metrics(*, file: Path | None) -> None:
    """Print metrics of the fleet in Prometheus format.

    They are what Slurm's controller knows; the metrics of a host come from its manager. If the controller does not respond, the
    text is `nohype_fleet_up 0` and the exit status 1.
    """
    texts, failure = load_fleet("metrics"), None
    try:
        text = texts.write_metrics(load_fleet("use").read_uses(), load_fleet("slurm").read_jobs())
    except OrchestratorError as error:
        text, failure = texts.write_down(), error
    if file:
        try:
            load_fleet("files").replace_file(file, text)  # its part is not read: the collector reads *.prom only
        except OSError as error:
            raise HostError(f"cannot write {file}", errno=error.errno or 0) from None
    else:
        click.echo(text, nl=False)
    if failure:
        raise failure


@click.command("map")
@click.option("--svg", "file", type=click.File("w", encoding="utf-8", lazy=True), default="-", metavar="FILE",
              help="Write the picture to FILE.  [default: standard output]")  # fmt: skip
def draw_map(*, file: TextIO) -> None:
    """Draw the hosts of the fleet and their guests, as SVG.

    One line per NUMA node, drawn from what Slurm's controller knows: the managers of the hosts are not asked. `nohype map` draws
    a host as its manager knows it.
    """
    draw = importlib.import_module("orchestrator.cli.fleet_svg").draw_fleet
    file.write(
        "".join(draw(load_fleet("use").read_uses(), len([job for job in load_fleet("slurm").read_jobs() if not job.node])))
    )
