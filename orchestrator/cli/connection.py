"""The manager that a command talks to: this host's, on its Unix socket, or one on the network, by its URL.

A secret is never an argument: every user of a machine can read the arguments of all programs (proc(5), /proc/PID/cmdline).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from orchestrator.cli.secrets import check_secret, read_secret
from orchestrator.client.client import Client
from orchestrator.errors import RequestError
from orchestrator.values import DEFAULT_SOCKET

_TOKEN = "NOHYPE_TOKEN"
# What only the TLS port wants, as people write it.
_FLAGS = {"ca": "--ca", "cert": "--cert", "key": "--key", "token_file": "--token-file", "token": _TOKEN}
_LONGEST_TOKEN = 4096


def client_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command its argument ``client``, and the option --socket, which may stand before the command as well."""

    @click.option("--socket", type=click.Path(path_type=Path), help="As `nohype --socket`.", hidden=True)
    @functools.wraps(command)
    def run(*, socket: Path | None, **options: Any) -> Any:
        return command(client=connect(click.get_current_context(), socket), **options)

    return run


def connect(ctx: click.Context, socket: Path | None = None) -> Client:
    """A client of the manager that the options of `nohype` and the environment name. Nothing is sent yet.

    Args:
        ctx: of the command; the options are those of its outermost group.
        socket: what the command's own --socket says.

    Raises:
        click.UsageError: the options contradict each other.
        RequestError: the URL, a file or the token can't be used.
    """
    root = ctx.find_root()
    said, typed = _read_settings(root, socket)
    if "url" in said and "socket" in said:
        if typed >= {"url", "socket"} or not typed & {"url", "socket"}:
            names = "--url and --socket" if "url" in typed else "NOHYPE_URL and NOHYPE_SOCKET"
            raise click.UsageError(f"{names} name two managers: leave one of them out", root)
        # What was typed is meant; what is in the environment was set for all commands.
        del said["socket" if "url" in typed else "url"]
    if "url" not in said:
        _check_no_tls(root, said, typed)
        return Client(Path(said.get("socket", DEFAULT_SOCKET)), slow=_say_slow)
    if "key" in said and "cert" not in said:
        raise click.UsageError(f"{_name('key', typed)} is of no use alone: name its certificate too, --cert FILE", root)
    if "key" in said:
        check_secret(Path(said["key"]))
    token = _read_token(Path(said["token_file"])) if "token_file" in said else said.get("token")
    files = {"ca": _path(said, "ca"), "certificate": _path(said, "cert"), "key": _path(said, "key")}
    return Client(str(said["url"]), token=token, slow=_say_slow, **files)


def _say_slow() -> None:
    """systemd holds the socket: while a manager does not come up, requests wait."""
    click.echo("nohype: the manager has not answered yet; on its host `systemctl status nohyped` says how it is", err=True)


def _read_settings(root: click.Context, socket: Path | None) -> tuple[dict[str, Any], frozenset[str]]:
    """What is said by options and environment, and which of it was typed on the command line."""
    said = {name: root.params.get(name) for name in ("url", "socket", *_FLAGS)}
    typed = {name for name in said if root.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if socket is not None:
        said["socket"] = socket
        typed.add("socket")
    said["token"] = os.environ.get(_TOKEN) or None
    return {name: value for name, value in said.items() if value is not None}, frozenset(typed)


def _check_no_tls(root: click.Context, said: dict[str, Any], typed: frozenset[str]) -> None:
    """Whoever shows a token, and forgets the URL, would else be answered as somebody else: as the user that the kernel knows."""
    wrong = [name for name in _FLAGS if name in said and (name in typed or "socket" not in typed)]
    if wrong:
        names = ", ".join(_name(name, typed) for name in wrong)
        raise click.UsageError(f"{names}: only for a manager's TLS port; name it: --url https://HOST:PORT", root)


def _name(setting: str, typed: frozenset[str]) -> str:
    return _FLAGS[setting] if setting in typed else f"NOHYPE_{setting.upper()}"


def _path(said: dict[str, Any], name: str) -> Path | None:
    return Path(said[name]) if name in said else None


def _read_token(path: Path) -> str:
    words = read_secret(path, _LONGEST_TOKEN).decode("ascii", "replace").split()
    if len(words) != 1:
        what = "more than one word" if words else "nothing"
        raise RequestError(f"there is {what} in the token file {path}", "it holds the token, as `nohype token new` printed it")
    return words[0]
