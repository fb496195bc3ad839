"""`nohype guest`: asks the manager to make, show, start and end guests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import format_size, json_option, print_json, print_table, say
from orchestrator.cli.seconds import Seconds
from orchestrator.client.client import Client

# Checked here too: a wait that the manager refuses would be refused only after the guest was made.
_SECONDS = Seconds(0, 3600)
_PATIENCE = Seconds(0, 3600, min_open=True)

timeout_option = click.option(
    "--timeout", type=_PATIENCE, default=60, show_default=True, metavar="SECONDS",
    help="How long the guest has to power off by itself; after that it is ended the hard way.",
)  # fmt: skip


wait_option = click.option(
    "--wait", type=_SECONDS, default=0, show_default="do not wait", metavar="SECONDS",
    help="Wait up to so long until the guest says that it is ready.",
)  # fmt: skip


@click.group()
def guest() -> None:
    """Make, list, show, start, stop and delete guests."""


@guest.command()
@click.argument("name")
@click.option("--cores", type=click.IntRange(1, 1024), metavar="NUMBER",
              help="Whole physical cores; their SMT threads become vCPUs.  [default: 1, or those of --cpus]")  # fmt: skip
@click.option("--memory", required=True, metavar="SIZE", help="Memory, fixed, a whole number of huge pages: 256M, 1G (1024M).")
@click.option("--image", required=True, metavar="NAME", help="Guest image in the host's store (`nohype image list` there).")
@click.option("--address", metavar="ADDRESS/LENGTH", help="IP address that the guest gives its network interface: 10.9.0.11/24.")
@click.option("--cmdline", default="", metavar="WORDS", help="Further words for the guest's kernel command line.")
@click.option("--page-size", metavar="SIZE", help="Size of its huge pages, 2M or 1G; left out: the host's own choice.")
@click.option("--cpus", metavar="LIST", help="Exactly these CPUs, whole cores of one node (2-3,6-7), or no guest at all.")
@click.option("--vf", metavar="ADDRESS", help="Exactly this virtual function (0000:41:10.0); only with --cpus.")
@click.option("--restart", type=click.Choice(["never", "on-failure"]),
              help="Start it again when it fails; one that powers off by itself stays off.  [default: never]")  # fmt: skip
@click.option("--remove", is_flag=True, default=None, help="Delete it when it ends by itself; else it keeps what it owns.")
@click.option("--id", metavar="ID", help="Your own id of this request: asked again with the same one, nothing is made twice.")
@wait_option
@click.option("--plan", "plan_only", is_flag=True, help="Only show what the guest would get; nothing is claimed.")
@json_option
@client_option
def create(
    name: str, *, client: Client, wait: float, plan_only: bool, as_json: bool, cpus: str | None, vf: str | None, **fields: Any
) -> None:
    """Make a guest and start it.

    NAME is 1 to 40 of a-z, 0-9 and inner hyphens. The guest owns its cores, its memory and a network function until it is
    deleted.
    """
    if vf and not cpus:
        raise click.UsageError("--vf is a part of a given place: say --cpus too")
    place = {"cpus": cpus, **({"vf": vf} if vf else {})} if cpus else None
    request = {"name": name, **{key: value for key, value in {**fields, "placement": place}.items() if value is not None}}
    try:
        # The fields of a guest, and the line with which it says that it is ready.
        made: dict[str, Any] = {**(client.plan(request) if plan_only else client.create(request))}
        if wait and not plan_only:
            made["ready"] = client.wait_ready(name, wait)
    except KeyboardInterrupt:
        # We can't take it back from here: by now the name may be somebody else's guest.
        click.echo(f"the manager goes on with what it was asked for: `nohype guest show {name}`", err=True)
        raise
    print_json(made) if as_json else _print_guest(made)


@guest.command("list")
@json_option
@client_option
def list_guests(*, as_json: bool, client: Client) -> None:
    """List all guests that you may see."""
    guests = client.guests()
    if as_json:
        print_json(guests)
    elif guests:
        heading = ("NAME", "STATE", "CPUS", "NODE", "MEMORY", "VF", "MAC", "IMAGE")
        print_table([heading, *(_row(one) for one in guests)])
    else:
        say("no guests")


@guest.command()
@click.argument("name")
@json_option
@client_option
def show(name: str, *, as_json: bool, client: Client) -> None:
    """Show one guest: its state, and all that it owns."""
    found = client.guest(name)
    print_json(found) if as_json else _print_guest(found)


@guest.command()
@click.argument("name")
@wait_option
@json_option
@client_option
def start(name: str, *, wait: float, as_json: bool, client: Client) -> None:
    """Start a guest that is stopped.

    It runs on the cores, memory and network function that it has owned all the time.
    """
    _report(client.start(name), client, wait, as_json=as_json)


@guest.command()
@click.argument("name")
@timeout_option
@json_option
@client_option
def stop(name: str, *, timeout: float, as_json: bool, client: Client) -> None:
    """Ask a guest to power off.

    It keeps what it owns, and can be started again; `nohype guest delete` gives all of it back.
    """
    _report(client.stop(name, timeout), client, as_json=as_json)


@guest.command()
@click.argument("name")
@timeout_option
@wait_option
@json_option
@client_option
def restart(name: str, *, timeout: float, wait: float, as_json: bool, client: Client) -> None:
    """Stop a guest as `stop` does, and start it again."""
    _report(client.restart(name, timeout), client, wait, as_json=as_json)


@guest.command()
@click.argument("name")
@json_option
@client_option
def kill(name: str, *, as_json: bool, client: Client) -> None:
    """End a guest at once, as pulling the plug does.

    It keeps what it owns, and can be started again.
    """
    _report(client.kill(name), client, as_json=as_json)


@guest.command()
@click.argument("name")
@json_option
@client_option
def delete(name: str, *, as_json: bool, client: Client) -> None:
    """End a guest at once, and give back all it owns."""
    client.delete(name)
    print_json({"name": name, "state": "deleted"}) if as_json else say(f"{name} deleted")


@guest.command()
@click.argument("name")
@click.argument("line")
@click.option("--timeout", type=_SECONDS, default=60, show_default=True, metavar="SECONDS", help="Wait so long for the answer.")
@json_option
@client_option
def tell(name: str, line: str, *, timeout: float, as_json: bool, client: Client) -> None:
    """Type a line on a guest's console.

    Prints what the guest answers to LINE. For images with the console protocol nohype-1, such as `minimal`.
    """
    answer = client.tell(name, line, timeout)
    print_json({"name": name, "answer": answer}) if as_json else say(answer, nl=False)


def _report(one: Mapping[str, Any], client: Client, wait: float = 0, *, as_json: bool) -> None:
    """What has become of a guest; once it is ready, if that is waited for."""
    if wait:
        one = {**one, "ready": client.wait_ready(one["name"], wait)}
    if as_json:
        print_json(one)
        return
    say(f"{one['name']} {one['state']}")
    if wait:
        say(one["ready"])


def _row(one: Mapping[str, Any]) -> tuple[object, ...]:
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


def _print_guest(one: Mapping[str, Any]) -> None:
    vf = one["vf"]
    rows: list[tuple[str, object]] = [
        ("name", one["name"]),
        ("state", one["state"]),
        ("CPUs", f"{','.join(one['cores'])} on node {one['node']} (vCPU n is the n-th of {one['cpus']})"),
        ("memory", f"{format_size(one['memory'])}, {one['huge_pages']} huge pages of {format_size(one['page_size'])}"),
        ("VF", f"{vf['address']}, number {vf['index']} of {vf['interface']} ({vf['pf']}), address {vf['mac']}"),
        ("image", one["image"]),
        ("cmdline", one["cmdline"]),
        ("restarts", f"{one['restarts']} ({one['restart']})"),
    ]
    if one["owner"]:
        rows.insert(1, ("tenant", one["owner"]))
    if one["id"]:
        rows.insert(1, ("id", one["id"]))
    if "ready" in one:
        rows.append(("ready", one["ready"]))
    rows += [("warning", warning) for warning in one.get("warnings", ())]
    print_table(rows)
