"""The option `--nic`: one network interface of a guest."""

from __future__ import annotations

import click

_KEYS = ("uplink", "vf", "address")


def parse_nic(text: str) -> dict[str, str]:
    """The fields of a NIC in a request. Raises click.BadParameter for wrong keys; the manager checks the values."""
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
    help="Add a network interface, instead of --address and --vf. Keys: uplink=INTERFACE of the host, vf=PCI-ADDRESS of a virtual"
    " function, address=IP/LENGTH in the guest. All are optional; '' adds an interface without any. Can be repeated.",
)  # fmt: skip
