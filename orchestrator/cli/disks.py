"""The option `--disk`: one disk of a guest."""

from __future__ import annotations

import click

_KEYS = ("size", "serial", "kind")


def parse_disk(text: str) -> dict[str, str]:
    """The fields of a disk in a request. Raises click.BadParameter for wrong keys; the manager checks the values."""
    fields: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in _KEYS or not value or key in fields:
            raise click.BadParameter(f"{part!r} in {text!r}: use each of {', '.join(_KEYS)} at most once, as KEY=VALUE")
        fields[key] = value
    return fields


def _parse_all(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    return tuple(map(parse_disk, values))


disk_option = click.option(
    "--disk", "disks", multiple=True, callback=_parse_all, metavar="[KEY=VALUE,...]",
    help="Give the guest a whole NVMe controller of the host. Keys: size=SIZE, at least; serial=NUMBER of the controller;"
    " kind=emulated for a file of the host instead, which --accept emulated-disk must permit. '' gives any controller. Can be"
    " repeated.",
)  # fmt: skip

accept_option = click.option(
    "--accept", multiple=True, metavar="NAME",
    help="Accept that the guest lacks a property: emulated-disk (its disk is emulated by QEMU). Can be repeated.",
)  # fmt: skip
