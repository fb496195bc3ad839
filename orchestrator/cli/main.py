"""`nohype`: the commands, the options that select a manager, and the exit status."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from click.core import ParameterSource

from orchestrator import __version__
from orchestrator.cli.output import print_error, print_os_error
from orchestrator.errors import LabLost, OrchestratorError, Unauthorized
from orchestrator.evidence.document import EvidenceError
from orchestrator.values import DEFAULT_SOCKET

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Each command is in the module of its name.
_COMMANDS = {
    "guest": "Create, list, show, start, stop and delete guests.",
    "fleet": "Run guests on many hosts, which Slurm chooses.",
    "network": "Create, list, show and delete networks.",
    "survey": "Show cores, huge pages, NICs and disks of the host.",
    "top": "Show the host and its guests live.",
    "web": "Serve a web page of the host on this machine.",
    "map": "Draw the host, and which guest has what of it.",
    "who": "Show who owns a thing of the host, and since when.",
    "audit": "Measure the isolation of the guests on the live host.",
    "exits": "Show the VM exits of a guest by hardware reason.",
    "uplink": "Show and set edge modes, and probe the external switch.",
    "events": "Show the event log: what the manager decided, and why.",
    "quarantine": "List and clear quarantined guests.",
    "switch": "Register, verify and set external switches.",
    "metrics": "Print metrics in Prometheus format.",
    "token": "Create bearer tokens for the manager's TLS port.",
    "config": "Check the manager's configuration file.",
    "doctor": "Check whether this server is fit for NoHype.",
    "completion": "Print the script that completes commands, options and names.",
    "image": "Build, import, inspect and delete guest images.",
    "lab": "Build and run the nested lab.",
    "demo": "Run the end-to-end demo in the nested lab.",
}
# Commands that do not contact a manager.
LOCAL_COMMANDS = ("token", "config", "doctor", "completion", "image", "lab", "demo")

_LAB_LOST = 3
_INTERRUPTED = 130


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used: under emulation each import takes 0.1 s."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        try:
            command: click.Command = getattr(importlib.import_module(f"orchestrator.cli.{cmd_name}"), cmd_name)
        except ModuleNotFoundError as error:
            if not error.name or error.name.startswith("orchestrator"):
                raise
            if ctx.resilient_parsing:  # the shell completes a command: nothing can be shown
                return None
            extra = "lab" if cmd_name in ("lab", "demo") else "host"
            hint = f"run `pip install 'nohype-orchestrator[{extra}]'`"
            raise OrchestratorError(f"`nohype {cmd_name}` requires the Python package {error.name}", hint) from None
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Not click.Group's, which imports each command."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name, help=text) for name, text in _COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


_file = click.Path(path_type=Path)


# How the options combine is decided in `connection`, which is imported only by commands that contact a manager.
@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket", type=_file, envvar="NOHYPE_SOCKET", show_envvar=True,
    help=f"The manager's Unix socket on this host.  [default: {DEFAULT_SOCKET}]",
)  # fmt: skip
@click.option(
    "--url", metavar="URL", envvar="NOHYPE_URL", show_envvar=True,
    help="TLS port of a manager, https://HOST:PORT, instead of the socket.",
)  # fmt: skip
@click.option(
    "--ca", type=_file, envvar="NOHYPE_CA", show_envvar=True,
    help="PEM file with the CA of the manager's certificate.  [default: the CAs that this machine trusts]",
)  # fmt: skip
@click.option(
    "--cert", type=_file, envvar="NOHYPE_CERT", show_envvar=True,
    help="PEM file with your client certificate.",
)  # fmt: skip
@click.option(
    "--key", type=_file, envvar="NOHYPE_KEY", show_envvar=True,
    help="PEM file with the private key of --cert.  [default: the file of --cert]",
)  # fmt: skip
@click.option(
    "--token-file", type=_file,
    help="File with the bearer token; or set NOHYPE_TOKEN. Never pass it as an argument: other users can read arguments.",
)  # fmt: skip
@click.version_option(__version__)
@click.pass_context
def nohype(ctx: click.Context, /, **settings: object) -> None:
    """Run virtual machines (guests) with dedicated cores, memory and NIC functions, and measure their isolation.

    Most commands contact the manager, the daemon `nohyped`: on this host by its Unix socket, or over the network with --url and
    a token or a client certificate. `token`, `config`, `doctor`, `completion`, `image`, `lab` and `demo` work without a manager.
    Options take precedence over environment variables.
    """
    typed = [name for name in settings if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if typed and ctx.invoked_subcommand in LOCAL_COMMANDS:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise click.UsageError(f"{names}: not allowed, because `nohype {ctx.invoked_subcommand}` does not contact a manager")


def main() -> NoReturn:
    """Runs the command. docs/cli.md lists the exit statuses."""
    _open_standard_streams()
    try:
        try:
            sys.exit(nohype(standalone_mode=False) or 0)
        finally:
            sys.stdout.flush()  # now, as Python shows a traceback if it fails at the end
    except OSError as error:
        if error.errno != errno.EPIPE:  # the reader, such as head(1), has ended
            print_os_error(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python writes at its end
        sys.exit(1)
    except click.Abort:
        click.echo("nohype: interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EvidenceError as error:
        print_error(error)
        sys.exit(error.status)
    except OrchestratorError as error:
        if isinstance(error, Unauthorized):
            error.hint = f"{error.hint}; with nohype: --token-file FILE or NOHYPE_TOKEN, or --cert FILE --key FILE"
        print_error(error)
        sys.exit(_LAB_LOST if isinstance(error, LabLost) else 1)


def _open_standard_streams() -> None:
    """Where the caller has closed one, a file or socket opened later would get its number, and a child process its content."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:  # Python's value for a closed one
            setattr(sys, name, open(descriptor, mode, closefd=False))
