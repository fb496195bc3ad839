"""`nohype guest`: creates, shows and changes guests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.guest_console import console
from orchestrator.cli.guest_show import describe_boot, list_columns, print_guest
from orchestrator.cli.guest_ssh import copy, ssh
from orchestrator.cli.names import complete_guest
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.cli.readiness import wait_ready
from orchestrator.cli.request_options import build_request, request_options
from orchestrator.cli.seconds import Seconds
from orchestrator.cli.wait_line import show_guest_wait
from orchestrator.client import Client

# Checked here too: the manager would refuse a wrong wait only after it has created the guest.
_SECONDS = Seconds(0, 3600)
_TIMEOUT = Seconds(0, 3600, min_open=True)

_FILLING = 86_400.0
"""Seconds. A disk is read completely before its guest gets it."""

timeout_option = click.option(
    "--timeout", type=_TIMEOUT, default=60, show_default=True, metavar="SECONDS",
    help="Force the guest off if it has not powered off after this long.",
)  # fmt: skip


wait_option = click.option(
    "--wait", type=_SECONDS, default=0, show_default="do not wait", metavar="SECONDS",
    help="Wait up to this long for the guest to report ready.",
)  # fmt: skip


@click.group()
def guest() -> None:
    """Create, list, show, start, stop and delete guests."""


for command in (console, ssh, copy):
    guest.add_command(command)


@guest.command()
@click.argument("name")
@request_options
@wait_option
@click.option("--plan", "plan_only", is_flag=True, help="Only show the resources that the guest would get; create nothing.")
@json_option
@client_option
def create(
    name: str, *, client: Client, wait: float, plan_only: bool, as_json: bool, **fields: Any,
) -> None:  # fmt: skip
    """Create a guest and start it.

    NAME is 1 to 40 characters of a-z, 0-9 and inner hyphens. The guest owns its cores, its memory and one virtual function per
    network interface until it is deleted.
    """
    request = build_request(name, fields)
    try:
        # The fields of a guest, and the line with which it reports ready.
        limit = {"timeout": _FILLING} if "disks" in request else {}
        with show_guest_wait(client, name, "creating"):
            made: dict[str, Any] = {**(client.plan(request) if plan_only else client.create(request, **limit))}
            if wait and not plan_only:
                made["ready"] = wait_ready(client, name, wait)
    except KeyboardInterrupt:
        # The guest is not deleted: by now another guest may have the name.
        click.echo(f"the request continues in the manager: see `nohype guest show {name}`", err=True)
        raise
    _show(made, as_json=as_json)


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
        print_table([heading, *map(list_columns, guests)])
    else:
        say("no guests")


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@json_option
@client_option
def show(name: str, *, as_json: bool, client: Client) -> None:
    """Show a guest: its state and its resources."""
    _show(client.guest(name), as_json=as_json)


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@wait_option
@json_option
@client_option
def start(name: str, *, wait: float, as_json: bool, client: Client) -> None:
    """Start a stopped guest.

    The guest gets the cores, memory and virtual functions that it owns.
    """
    with show_guest_wait(client, name, "starting"):
        changed = client.start(name)
    _report(changed, client, wait, as_json=as_json)


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@timeout_option
@json_option
@client_option
def stop(name: str, *, timeout: float, as_json: bool, client: Client) -> None:
    """Shut a guest down.

    The guest keeps its resources and can be started again; `nohype guest delete` releases them.
    """
    with show_guest_wait(client, name, "stopping"):
        changed = client.stop(name, timeout)
    _report(changed, client, as_json=as_json)


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@timeout_option
@wait_option
@json_option
@client_option
def restart(name: str, *, timeout: float, wait: float, as_json: bool, client: Client) -> None:
    """Stop a guest as `stop` does, and start it again."""
    with show_guest_wait(client, name, "restarting"):
        changed = client.restart(name, timeout)
    _report(changed, client, wait, as_json=as_json)


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@json_option
@client_option
def disengage(name: str, *, as_json: bool, client: Client) -> None:
    """End the boot of a running guest.

    For images whose guests do not report the end of their boot. VM exits are counted separately from then on. Does nothing if the
    boot is over.
    """
    changed = client.disengage(name)
    if as_json:
        print_json(changed)
    else:
        say(f"{name} disengaged: {describe_boot(changed)}")


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@json_option
@client_option
def kill(name: str, *, as_json: bool, client: Client) -> None:
    """Force a guest off.

    The guest keeps its resources and can be started again.
    """
    _report(client.kill(name), client, as_json=as_json)


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@json_option
@client_option
def delete(name: str, *, as_json: bool, client: Client) -> None:
    """Delete a guest and release its resources.

    A running guest is forced off first.
    """
    client.delete(name)
    if as_json:
        print_json({"name": name, "state": "deleted"})
    else:
        say(f"{name} deleted")


@guest.command()
@click.argument("name", shell_complete=complete_guest)
@click.argument("line")
@click.option("--timeout", type=_SECONDS, default=60, show_default=True, metavar="SECONDS", help="Wait this long for the reply.")
@json_option
@client_option
def tell(name: str, line: str, *, timeout: float, as_json: bool, client: Client) -> None:
    """Send LINE to a guest's console and print the reply.

    Works with images that support the console protocol nohype-1, such as `minimal`.
    """
    answer = client.send_command(name, line, timeout)
    if as_json:
        print_json({"name": name, "answer": answer})
    else:
        say(answer, nl=False)


def _report(changed: Mapping[str, Any], client: Client, wait: float = 0, *, as_json: bool) -> None:
    """Prints a guest's new state; with ``wait`` after it has reported ready."""
    if wait:
        with show_guest_wait(client, changed["name"], "waiting for"):
            changed = {**changed, "ready": wait_ready(client, changed["name"], wait)}
    if as_json:
        print_json(changed)
        return
    say(f"{changed['name']} {changed['state']}")
    if wait:
        say(changed["ready"])


def _show(shown: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(shown)
    else:
        print_guest(shown)
