"""`nohype config`: looks at the manager's configuration before the manager does. Works without one."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.api.identity import build_directory
from orchestrator.api.tls import build_context
from orchestrator.config import DEFAULT_CONFIG, read_config


@click.group()
def config() -> None:
    """Check the manager's configuration file."""


@config.command()
@click.argument("path", metavar="[FILE]", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)
def check(path: Path) -> None:
    """Find what `nohyped` would refuse in its configuration.

    Looks at each section and field of FILE (left out: /etc/nohype/nohype.toml), whether the users and groups that are named
    exist, and whether TLS can use the files of [api]. Exit status 0 if all is good, 1 if not. Run it as root, who alone can read
    the key.
    """
    found = read_config(path)
    build_directory(found)
    if found.api:
        build_context(found.api)
    click.echo(f"the configuration {path} is good")
