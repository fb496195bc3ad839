"""`nohype completion`: scripts that complete commands, options and names in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_PROGRAM, _VARIABLE = "nohype", "_NOHYPE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and names.

    For one session of bash: `eval "$(nohype completion bash)"`. For all sessions write the script to
    ~/.local/share/bash-completion/completions/nohype, for zsh to the file _nohype in a folder of $fpath, and for fish to
    ~/.config/fish/completions/nohype.fish. The Debian package has these files.
    """
    kind = get_completion_class(shell)
    assert kind, shell
    click.echo(kind(ctx.find_root().command, {}, _PROGRAM, _VARIABLE).source())
