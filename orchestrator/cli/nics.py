"""The option `--nic`: one network interface of a guest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from orchestrator.cli.key_values import parse_key_values

_KEYS = ("uplink", "vf", "address", "network", "rate")


def _parse(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[dict[str, object], ...]:
    return tuple(_parse_nic(text) for text in values)


def _parse_nic(text: str) -> dict[str, object]:
    fields: dict[str, object] = {**parse_key_values(text, _KEYS)}
    rate = str(fields.get("rate", 0))
    if not rate.isascii() or not rate.isdigit() or len(rate) > 9:
        raise click.BadParameter(f"rate={rate} in {text!r}: use a whole number of Mbit/s")
    return {**fields, "rate": int(rate)} if "rate" in fields else fields


def describe_network(nic: Mapping[str, Any]) -> str:
    """Network and rate of a NIC, to be appended to its description; empty without both."""
    network = f", network {nic['network']} (VLAN {nic['vlan']})" if nic.get("network") else ""
    return network + (f", at most {nic['rate']} Mbit/s" if nic.get("rate") else "")


nic_option = click.option(
    "--nic", "nics", multiple=True, callback=_parse, metavar="[KEY=VALUE,...]",
    help="Add a network interface, instead of --address and --vf. Keys: uplink=INTERFACE of the host, vf=PCI-ADDRESS of a virtual"
    " function, address=IP/LENGTH in the guest, network=NAME that the guest joins, rate=MBITS that it can send per second. All"
    " are optional; '' adds an interface without any. Can be repeated.",
)  # fmt: skip
