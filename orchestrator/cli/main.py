"""`nohype`, the operator's command: commands, and how errors end the program. Only what is asked for is imported."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from orchestrator import __version__
from orchestrator.errors import LabLost, OrchestratorError

_COMMANDS = {
    "guest": ("orchestrator.cli.guest", "guest", "Make, list, show, start, stop and delete guests."),
    "survey": ("orchestrator.cli.host", "survey", "Show what the host has."),
    "audit": ("orchestrator.cli.host", "audit", "Measure all proofs on the live host."),
    "events": ("orchestrator.cli.watch", "events", "Show what has happened, and what happens."),
    "quarantine": ("orchestrator.cli.watch", "quarantine", "List and clear guests that are not verified clean."),
    "metrics": ("orchestrator.cli.watch", "metrics", "Print what Prometheus reads."),
    "token": ("orchestrator.cli.token", "token", "Make bearer tokens for the manager's TLS port."),
    "image": ("orchestrator.cli.image", "image", "Build guest images."),
    "lab": ("orchestrator.cli.lab", "lab", "Build and run the nested lab."),
    "demo": ("orchestrator.cli.demo", "demo", "Run the whole story in the nested lab."),
}
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


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def nohype() -> None:
    """NoHype: guests on their own cores, memory and network functions, and proofs of it.

    `image`, `lab` and `demo` work by themselves; everything else talks to the manager of this host.
    """


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
        click.echo(f"nohype: {error}", err=True)
        sys.exit(_LAB_LOST if isinstance(error, LabLost) else 1)
