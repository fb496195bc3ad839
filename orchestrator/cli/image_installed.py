"""What the commands that install a guest image do afterwards."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.image_users import read_users
from orchestrator.cli.output import print_json, printable
from orchestrator.config import DEFAULT_CONFIG
from orchestrator.errors import OrchestratorError
from orchestrator.images.install import collect
from orchestrator.images.store import Image

config_option = click.option(
    "--config", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True,
    help="Configuration of this host's manager: its ledger says which guests use which builds.",
)  # fmt: skip


def report_installed(installed: Image, store: Path, config: Path, *, as_json: bool, is_new: bool = True) -> None:
    """Prints the image, and removes the builds that nothing uses any more."""
    try:
        removed = collect(store, lambda: read_users(config))
    except OrchestratorError as error:
        removed = ()
        click.echo(printable(f"earlier builds are kept: {error}"), err=True)
    if removed:
        click.echo(f"removed unused builds: {', '.join(name[:12] for name in removed)}", err=True)
    if as_json:
        print_json(installed.to_json())
    else:
        kernel = f"kernel {installed.kernel_version}" if installed.kernel_version else "boots from its disk"
        click.echo(
            f"guest image {installed.name}{'' if is_new else ' is already installed'}: {kernel}, in {store / installed.name}"
        )
