"""The options of boot files: kernel and initrd that the manager downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

FIELDS = ("kernel", "kernel_sha256", "initrd", "initrd_sha256")

_OPTIONS = (
    click.option("--kernel", metavar="URL", help="Kernel on an HTTP(S) server (not with --image); needs the next three options."),
    click.option("--kernel-sha256", metavar="HEX", help="SHA-256 of the kernel."),
    click.option("--initrd", metavar="URL", help="The initrd for --kernel."),
    click.option("--initrd-sha256", metavar="HEX", help="SHA-256 of the initrd."),
)  # fmt: skip


def boot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_boot(fields: dict[str, Any]) -> None:
    """Replaces the four options in ``fields`` with ``boot``. Raises click.UsageError for incomplete options."""
    given = {name: value for name in FIELDS if (value := fields.pop(name)) is not None}
    if given and len(given) < len(FIELDS):
        missing = ", ".join(f"--{name.replace('_', '-')}" for name in FIELDS if name not in given)
        raise click.UsageError(f"boot files are incomplete: missing {missing}")
    if bool(given) == bool(fields["image"]):
        raise click.UsageError("give either --image or the four options of boot files")
    fields["boot"] = given or None
