"""`nohype fleet`, and the configuration of its hosts. The work is in `orchestrator.fleet`, which runs Slurm's commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.fleet_batch import submit_all
from orchestrator.cli.fleet_guests import cancel, list_guests, logs, show, submit
from orchestrator.cli.fleet_hosts import drain, hosts, orphans, requeue, resume
from orchestrator.cli.fleet_modules import load_fleet
from orchestrator.cli.fleet_step import step
from orchestrator.cli.fleet_view import draw_map, metrics
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.client import Client
from orchestrator.values import Size

_FILES = (
    "slurm.conf", "nohype-start", "nohype-nodes.conf", "gres.conf",
    "nohype-prolog", "nohype-job", "nohype-epilog", "nohype-check",
)  # fmt: skip
_folder = click.Path(path_type=Path)


@click.group()
def fleet() -> None:
    """Run guests on many hosts, which Slurm chooses."""


for command in (
    submit, submit_all, list_guests, show, logs, cancel, hosts, drain, resume, requeue, orphans, metrics, draw_map, step,
):  # fmt: skip
    fleet.add_command(command)


@fleet.command()
@click.option("--host", required=True, metavar="NAME", help="Name of the host in the fleet.")
@click.option("--address", metavar="ADDRESS", help="Address at which the controller reaches the host.  [default: its name]")
@click.option("--port", type=click.IntRange(1024, 65000), default=17000, show_default=True, metavar="PORT",
              help="Port of slurmd for the first NUMA node of the host; each further node uses the next port.")  # fmt: skip
@click.option("--page-size", metavar="SIZE", help="Huge page size of the fleet.  [default: the only size that the host has]")
@click.option("--controller", default="controller", show_default=True, metavar="NAME", help="Host name of Slurm's controller.")
@click.option(
    "--group", default="nohype-fleet", show_default=True, metavar="GROUP", help="Group whose members may submit guests."
)
@click.option("--program", metavar="FILE", help="Path of `nohype` on the host.  [default: as found in $PATH]")
@click.option(
    "--feature",
    "features",
    multiple=True,
    metavar="NAME",
    help="Feature that guests can request, such as rack-1; may be repeated.",
)
@click.option("--file", "only", type=click.Choice(_FILES), help="Print only this file.")
@click.option("--check", "checked", type=_folder, metavar="FOLDER",
              help="Compare the files in FOLDER, such as /etc/slurm, with the host instead.")  # fmt: skip
@json_option
@client_option
@click.pass_context
def config(
    ctx: click.Context, *, host: str, address: str | None, port: int, page_size: str | None, controller: str, group: str,
    program: str | None, features: tuple[str, ...], only: str | None, checked: Path | None, as_json: bool, client: Client,
) -> None:  # fmt: skip
    """Print or check Slurm's configuration of a host.

    It is made from the survey of the host's manager. nohype-nodes.conf and gres.conf hold the lines of all hosts of the fleet:
    append those of each host. The other files are the same on all hosts with the same options. Cores that are not offered to the
    fleet are reported. With --check, exit status 1 if the files differ from what the host has.
    """
    node, files = load_fleet("node"), load_fleet("configuration")
    found = client.host()
    nodes = node.build_nodes(found, files.check_host_name(host), Size.parse(page_size) if page_size else None)
    for text in node.find_left_out(found, nodes):
        click.echo(f"not offered to the fleet: {text}", err=True)
    networks = [network["name"] for network in client.networks()]
    if checked:
        written = [(checked / name).read_text(errors="replace") for name in (files.NODES_FILE, files.GRES_FILE)]
        differences = files.find_differences(nodes, host, *written, networks)
        if as_json:
            print_json({"host": host, "differences": list(differences)})
        else:
            say("\n".join(differences) or f"the files in {checked} match host {host}")
        ctx.exit(1 if differences else 0)
    size, path = str(Size(nodes[0].page_size)), program or shutil.which("nohype") or "/usr/bin/nohype"
    texts = {
        "slurm.conf": files.build_common(controller, group),
        files.START_FILE: files.build_start(),
        files.NODES_FILE: files.build_node_lines(nodes, files.Address(host, address or host, port), networks, features),
        files.GRES_FILE: files.build_gres_lines(nodes),
        **{f"nohype-{name}": files.build_step(name, path, host, size) for name in ("prolog", "job", "epilog", "check")},
    }
    if only:
        click.echo(texts[only], nl=False)
    elif as_json:
        print_json(texts)
    else:
        click.echo("\n".join(f"### {name}\n{text}" for name, text in texts.items()), nl=False)
