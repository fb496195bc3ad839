"""`nohype`, the operator's command: commands, and how errors end the program. Only what is asked for is imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource

from orchestrator import __version__
from orchestrator.cli.output import printable
from orchestrator.errors import LabLost, OrchestratorError, Unauthorized
from orchestrator.values import DEFAULT_SOCKET

_COMMANDS = {
    "guest": ("orchestrator.cli.guest", "guest", "Make, list, show, start, stop and delete guests."),
    "survey": ("orchestrator.cli.host", "survey", "Show what the host has."),
    "audit": ("orchestrator.cli.host", "audit", "Measure all proofs on the live host."),
    "events": ("orchestrator.cli.watch", "events", "Show what has happened, and what happens."),
    "quarantine": ("orchestrator.cli.watch", "quarantine", "List and clear guests that are not verified clean."),
    "metrics": ("orchestrator.cli.watch", "metrics", "Print the manager's figures for Prometheus."),
    "token": ("orchestrator.cli.token", "token", "Make bearer tokens for the manager's TLS port."),
    "config": ("orchestrator.cli.config", "config", "Check the manager's configuration file."),
    "image": ("orchestrator.cli.image", "image", "Build and list guest images."),
    "lab": ("orchestrator.cli.lab", "lab", "Build and run the nested lab."),
    "demo": ("orchestrator.cli.demo", "demo", "Run the end-to-end demo in the nested lab."),
}
_ALONE = ("token", "config", "image", "lab", "demo")
"""Commands that ask no manager."""

_LAB_LOST = 3
_INTERRUPTED = 130


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used: under emulation each import costs a tenth of a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


_file = click.Path(path_type=Path)


# What the options mean together is decided in `connection`, which only commands that ask a manager import.
@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket", type=_file, envvar="NOHYPE_SOCKET", show_envvar=True,
    help=f"The manager's Unix socket on this host.  [default: {DEFAULT_SOCKET}]",
)  # fmt: skip
@click.option(
    "--url", metavar="URL", envvar="NOHYPE_URL", show_envvar=True,
    help="The TLS port of a manager, https://HOST:PORT, in place of the socket.",
)  # fmt: skip
@click.option(
    "--ca", type=_file, envvar="NOHYPE_CA", show_envvar=True,
    help="PEM file with the CA of the manager's certificate; left out: the CAs that this machine trusts.",
)  # fmt: skip
@click.option(
    "--cert", type=_file, envvar="NOHYPE_CERT", show_envvar=True,
    help="PEM file with your client certificate.",
)  # fmt: skip
@click.option(
    "--key", type=_file, envvar="NOHYPE_KEY", show_envvar=True,
    help="PEM file with its private key; left out: the key is in the file of --cert.",
)  # fmt: skip
@click.option(
    "--token-file", type=_file,
    help="File with your bearer token. The token itself may be in NOHYPE_TOKEN; it is never an argument, which others could see.",
)  # fmt: skip
@click.version_option(__version__)
@click.pass_context
def nohype(ctx: click.Context, /, **settings: object) -> None:
    """NoHype: guests on their own cores, memory and network functions, and proofs of it.

    `token`, `config`, `image`, `lab` and `demo` work by themselves; everything else asks a manager: that of this host on its Unix
    socket, or with --url one on the network, to which you show a token or a client certificate. Options win over the environment.
    """
    typed = [name for name in settings if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if typed and ctx.invoked_subcommand in _ALONE:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise click.UsageError(f"{names}: `nohype {ctx.invoked_subcommand}` works on this machine, and asks no manager")


def main() -> NoReturn:
    """Runs the command. Status: 0 done, 1 an error or a proof that failed, 2 wrong usage, 3 lab lost, 130 interrupted."""
    try:
        sys.exit(nohype(standalone_mode=False) or 0)
    except click.Abort:
        click.echo("nohype: interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OrchestratorError as error:
        if isinstance(error, Unauthorized):
            error.hint = f"{error.hint}; with nohype: --token-file FILE or NOHYPE_TOKEN, or --cert FILE --key FILE"
        click.echo(f"nohype: {printable(str(error))}", err=True)
        sys.exit(_LAB_LOST if isinstance(error, LabLost) else 1)
