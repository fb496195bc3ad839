"""The options with which `nohype guest create` configures a guest. Files are read here; the manager checks their content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import click

_LONGEST = 1 << 20
"""Bytes; the manager's limits are lower."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def read_text(file: BinaryIO) -> str:
    """Raises click.BadParameter, which does not contain the text, for a file that is too long or not UTF-8."""
    content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise click.BadParameter(f"{file.name} has more than {_LONGEST >> 20} MB")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise click.BadParameter(f"{file.name} is not text in UTF-8") from None


def parse_keys(text: str, name: str) -> tuple[str, ...]:
    """The keys of a .pub file, or of an authorized_keys file. Raises click.BadParameter for a private key: it is not sent."""
    if "PRIVATE KEY" in text:
        raise click.BadParameter(f"{name} is a private key; give the public key, the file with the suffix .pub")
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise click.BadParameter(f"{name} contains no key")
    return keys


def _read_keys(_context: click.Context, _option: click.Parameter, files: tuple[BinaryIO, ...]) -> list[str] | None:
    return [key for file in files for key in parse_keys(read_text(file), file.name)] or None


def _read_file(_context: click.Context, _option: click.Parameter, file: BinaryIO | None) -> str | None:
    return None if file is None else read_text(file)


_OPTIONS = (
    click.option("--ssh-key", "ssh_keys", type=click.File("rb"), multiple=True, callback=_read_keys, metavar="FILE",
                 help="Allow logins with the SSH public keys in FILE (~/.ssh/id_ed25519.pub). Can be repeated."),
    click.option("--hostname", metavar="NAME", help="Host name in the guest.  [default: the guest's name]"),
    click.option("--user-data", type=click.File("rb"), callback=_read_file, metavar="FILE",
                 help="User data for cloud-init: #cloud-config, a script or MIME multi-part. It is kept secret."),
    click.option("--network-config", type=click.File("rb"), callback=_read_file, metavar="FILE",
                 help="Network configuration for cloud-init, version 2. It is kept secret.  [default: from the addresses]"),
)  # fmt: skip


def configuration_options(command: _Command) -> _Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
