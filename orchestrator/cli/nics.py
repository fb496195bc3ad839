"""The option `--nic`: one network interface of a guest."""

from __future__ import annotations

import click

from orchestrator.cli.key_values import parse_all

_KEYS = ("uplink", "vf", "address")


nic_option = click.option(
    "--nic", "nics", multiple=True, callback=parse_all(_KEYS), metavar="[KEY=VALUE,...]",
    help="Add a network interface, instead of --address and --vf. Keys: uplink=INTERFACE of the host, vf=PCI-ADDRESS of a virtual"
    " function, address=IP/LENGTH in the guest. All are optional; '' adds an interface without any. Can be repeated.",
)  # fmt: skip
