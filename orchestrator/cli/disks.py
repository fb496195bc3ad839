"""The option `--disk`: one disk of a guest."""

from __future__ import annotations

import click

from orchestrator.cli.key_values import parse_all

_KEYS = ("size", "serial", "kind")


disk_option = click.option(
    "--disk", "disks", multiple=True, callback=parse_all(_KEYS), metavar="[KEY=VALUE,...]",
    help="Give the guest a whole NVMe controller of the host. Keys: size=SIZE, at least; serial=NUMBER of the controller;"
    " kind=emulated for a file or logical volume of the host instead, which --accept emulated-disk must permit. '' gives any"
    " controller. Can be repeated.",
)  # fmt: skip

accept_option = click.option(
    "--accept", multiple=True, metavar="NAME",
    help="Accept that the guest lacks a property: emulated-disk (its disk is emulated by QEMU). Can be repeated.",
)  # fmt: skip
