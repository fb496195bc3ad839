"""The option `--nic`: one network interface of a guest."""

from __future__ import annotations

import click

_KEYS = ("uplink", "vf", "address")


def parse_nic(text: str) -> dict[str, str]:
    """`KEY=VALUE,...` as the fields of a NIC in a request. The manager checks the values.

    Raises:
        click.BadParameter: a key is unknown, given twice, or has no value.
    """
    fields: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in _KEYS or not value or key in fields:
            raise click.BadParameter(f"{part!r} in {text!r}: use each of {', '.join(_KEYS)} at most once, as KEY=VALUE")
        fields[key] = value
    return fields


def _parse_all(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    return tuple(map(parse_nic, values))


nic_option = click.option(
    "--nic", "nics", multiple=True, callback=_parse_all, metavar="[KEY=VALUE,...]",
    help="A network interface: uplink=INTERFACE, vf=ADDRESS, address=ADDRESS/LENGTH, each optional (\'\' for none). Repeat it for"
    " more interfaces. Replaces --address and --vf.",
)  # fmt: skip
