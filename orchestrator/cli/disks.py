"""The option `--disk`: one disk of a guest."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.key_values import parse_all
from orchestrator.cli.secrets import read_secret

_KEYS = ("size", "serial", "kind", "target", "initiator", "user", "secret")
_MAX_SECRET = 4096
"""Bytes; the manager's limit is lower."""


def _parse(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    """``secret`` names a file: arguments of a process can be read by all users."""
    disks = parse_all(_KEYS)(context, option, values)
    return tuple({**disk, "secret": _read_secret(Path(disk["secret"]))} if "secret" in disk else disk for disk in disks)


def _read_secret(path: Path) -> str:
    try:
        return read_secret(path, _MAX_SECRET).decode("ascii").strip()
    except UnicodeDecodeError:
        raise click.BadParameter(f"{path} contains characters that no secret of a disk has") from None


disk_option = click.option(
    "--disk", "disks", multiple=True, callback=_parse, metavar="[KEY=VALUE,...]",
    help="Give the guest a whole NVMe controller of the host. Keys: size=SIZE, at least; serial=NUMBER of the controller;"
    " kind=emulated for a file or logical volume of the host instead, which --accept emulated-disk must permit. '' gives any"
    " controller. target=URL for a root on the network (nvme-tcp://ADDRESS/NQN, iscsi://ADDRESS/IQN/LUN) instead, with"
    " initiator=NAME, user=NAME and secret=FILE. Can be repeated.",
)  # fmt: skip

accept_option = click.option(
    "--accept", multiple=True, metavar="NAME",
    help="Accept that the guest lacks a property: emulated-disk (its disk is emulated by QEMU), software-edge (the host's kernel"
    " forwards and can read its frames), no-iommu (the host's devices can access its memory), shared-cache (the host"
    " cannot limit caches or memory bandwidth). Can be repeated.",
)  # fmt: skip
