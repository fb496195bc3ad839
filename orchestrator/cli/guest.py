"""`nohype guest`: asks the manager of this host to make, show and stop guests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.api.client import Client
from orchestrator.cli.output import format_size, json_option, print_json, print_table, socket_option

# Checked here too: a wait that the manager refuses would be refused only after the guest was made.
_SECONDS = click.FloatRange(0, 3600)


@click.group()
def guest() -> None:
    """Make, list, show and stop guests."""


@guest.command()
@click.argument("name")
@click.option("--cores", type=int, default=1, show_default=True, help="Whole physical cores; their SMT threads become vCPUs.")
@click.option("--memory", required=True, help="Fixed memory, a whole number of huge pages: 256M, 1G.")
@click.option("--image", required=True, help="Name of a built guest image.")
@click.option("--address", help="Address and prefix length of the guest's network interface: 10.9.0.11/24.")
@click.option("--cmdline", default="", help="Further words for the guest's kernel command line.")
@click.option("--wait", type=_SECONDS, default=0, metavar="SECONDS", help="Wait until the guest says that it is ready.")
@click.option("--plan", "plan_only", is_flag=True, help="Only show what the guest would get.")
@json_option
@socket_option
def create(name: str, *, wait: float, plan_only: bool, as_json: bool, path: Path, **fields: Any) -> None:
    """Make a guest and start it."""
    client = Client(path)
    request = {"name": name, **{key: value for key, value in fields.items() if value is not None}}
    try:
        made = client.plan(request) if plan_only else client.create(request)
        if wait and not plan_only:
            made["ready"] = client.wait_ready(name, wait)
    except KeyboardInterrupt:
        # We can't take it back from here: by now the name may be somebody else's guest.
        click.echo(f"the manager goes on with what it was asked for: `nohype guest show {name}`", err=True)
        raise
    print_json(made) if as_json else _print_guest(made)


@guest.command("list")
@json_option
@socket_option
def list_guests(*, as_json: bool, path: Path) -> None:
    """List all guests."""
    guests = Client(path).guests()
    if as_json:
        print_json(guests)
    elif guests:
        heading = ("NAME", "STATE", "CPUS", "NODE", "MEMORY", "VF", "MAC", "IMAGE")
        print_table([heading, *(_row(one) for one in guests)])
    else:
        click.echo("no guests")


@guest.command()
@click.argument("name")
@json_option
@socket_option
def show(name: str, *, as_json: bool, path: Path) -> None:
    """Show one guest."""
    found = Client(path).guest(name)
    print_json(found) if as_json else _print_guest(found)


@guest.command()
@click.argument("name")
@json_option
@socket_option
def stop(name: str, *, as_json: bool, path: Path) -> None:
    """End a guest at once, as pulling the plug does, and give back all that it had."""
    Client(path).stop(name)
    print_json({"name": name, "state": "stopped"}) if as_json else click.echo(f"{name} stopped")


@guest.command()
@click.argument("name")
@click.argument("line")
@click.option("--timeout", type=_SECONDS, default=60, show_default=True, help="Seconds to wait for the answer.")
@json_option
@socket_option
def tell(name: str, line: str, *, timeout: float, as_json: bool, path: Path) -> None:
    """Type LINE on the guest's console and print its answer (images with the console protocol nohype-1, such as minimal)."""
    answer = Client(path).tell(name, line, timeout)
    print_json({"name": name, "answer": answer}) if as_json else click.echo(answer, nl=False)


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    cpus = ",".join(one["cores"])
    return (
        one["name"],
        one["state"],
        cpus,
        one["node"],
        format_size(one["memory"]),
        one["vf"]["address"],
        one["vf"]["mac"],
        one["image"],
    )


def _print_guest(one: dict[str, Any]) -> None:
    vf = one["vf"]
    rows: list[tuple[str, object]] = [
        ("name", one["name"]),
        ("state", one["state"]),
        ("CPUs", f"{','.join(one['cores'])} on node {one['node']} (vCPU n is the n-th of {one['cpus']})"),
        ("memory", f"{format_size(one['memory'])}, {one['huge_pages']} huge pages of {format_size(one['page_size'])}"),
        ("VF", f"{vf['address']}, number {vf['index']} of {vf['interface']} ({vf['pf']}), address {vf['mac']}"),
        ("image", one["image"]),
        ("cmdline", one["cmdline"]),
    ]
    if "ready" in one:
        rows.append(("ready", one["ready"]))
    print_table(rows)
