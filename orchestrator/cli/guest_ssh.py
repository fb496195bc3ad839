"""`nohype guest ssh` and `nohype guest copy`: their options. The work is in `ssh_session`, which needs paramiko."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.names import complete_guest
from orchestrator.cli.output import printable
from orchestrator.cli.seconds import Seconds
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError

_FAILED = 255  # as of ssh(1), so that the status of a command can be told from an error
_file = click.Path(path_type=Path)


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options with which a guest is reached; passed as one dictionary ``access``."""
    options = (
        click.option("--user", "-l", default="root", show_default=True, metavar="NAME", help="User in the guest."),
        click.option("--identity", "-i", "identities", type=_file, multiple=True, metavar="FILE",
                     help="Private key; can be repeated.  [default: the keys of the SSH agent, then those in ~/.ssh]"),
        click.option("--host-key", type=_file, metavar="FILE",
                     help="File with the guest's public host key.  [default: the key that the guest reported on its console]"),
        click.option("--address", metavar="IP",
                     help="Address of the guest.  [default: the first address that it was created with]"),
        click.option("--port", type=click.IntRange(1, 65535), default=22, show_default=True, metavar="PORT",
                     help="Port in the guest."),
        click.option("--jump", metavar="USER@HOST[:PORT]",
                     help="Connect through this host, whose key must be in ~/.ssh/known_hosts."),
        click.option("--timeout", type=Seconds(0, 86400), default=60, show_default=True, metavar="SECONDS",
                     help="Give up if the guest has not answered after this long."),
    )  # fmt: skip
    names = ("user", "identities", "host_key", "address", "port", "jump", "timeout")

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        return command(access={name: given.pop(name) for name in names}, **given)

    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), run)


@click.command()
@click.argument("name", shell_complete=complete_guest)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--tty/--no-tty", "-t/-T", default=None, help="Use a terminal in the guest.  [default: only without COMMAND]")
@access_options
@client_option
def ssh(name: str, command: tuple[str, ...], *, tty: bool | None, access: dict[str, Any], client: Client) -> int:
    """Log in to a guest, or run a command in it.

    Write -- before COMMAND. A single argument is passed to the guest's shell as a line; several arguments are passed as words.
    The guest must present the host key that it has reported on its console. Exits with the status of the command, or with 255
    after an error. Enter ~ . leaves a session that hangs.
    """
    try:
        return int(load_session().run(client, name, access, command, tty=tty))
    except OrchestratorError as error:
        click.echo(f"nohype: {printable(str(error))}", err=True)
        return _FAILED


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--recursive", "-r", is_flag=True, help="Copy a directory with everything in it.")
@access_options
@client_option
def copy(source: str, target: str, *, recursive: bool, access: dict[str, Any], client: Client) -> None:
    """Copy files from or to a guest.

    One of SRC and DST is NAME:PATH. A path in the guest is relative to the user's home directory. A file replaces an existing one
    when its copy is complete. Write a local path that contains a colon as ./PATH.
    """
    load_session().copy(client, source, target, access, recursive=recursive)


def load_session() -> Any:
    """The module `ssh_session`. By name, so that the other commands need no paramiko."""
    try:
        return importlib.import_module("orchestrator.cli.ssh_session")
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("orchestrator"):
            raise
        hint = "run `pip install 'nohype-orchestrator[ssh]'`"
        raise OrchestratorError(f"SSH requires the Python package {error.name}", hint) from None
