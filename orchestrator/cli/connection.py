"""Chooses the manager that a command contacts: by a Unix socket on this host, or by a URL.

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
from orchestrator.client import Client
from orchestrator.errors import RequestError
from orchestrator.values import DEFAULT_SOCKET

_TOKEN = "NOHYPE_TOKEN"
# Settings that only the TLS port uses, as they are typed.
_FLAGS = {"ca": "--ca", "cert": "--cert", "key": "--key", "token_file": "--token-file", "token": _TOKEN}
_LONGEST_TOKEN = 4096


def client_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the argument ``client`` to a command, and adds the option --socket, which can also precede the command."""

    @click.option("--socket", type=click.Path(path_type=Path), help="As `nohype --socket`.", hidden=True)
    @functools.wraps(command)
    def run(*, socket: Path | None, **options: Any) -> Any:
        return command(client=connect(click.get_current_context(), socket), **options)

    return run


def connect(ctx: click.Context, socket: Path | None = None) -> Client:
    """A client of the manager that options and environment select; ``socket`` is the command's own --socket. Sends nothing.

    Raises click.UsageError if options contradict each other, and RequestError for an invalid URL, file or token.
    """
    root = ctx.find_root()
    given, typed = _read_settings(root, socket)
    if "url" in given and "socket" in given:
        if typed >= {"url", "socket"} or not typed & {"url", "socket"}:
            names = "--url and --socket" if "url" in typed else "NOHYPE_URL and NOHYPE_SOCKET"
            raise click.UsageError(f"{names} are mutually exclusive", root)
        # The command line takes precedence over the environment, which was set for all commands.
        del given["socket" if "url" in typed else "url"]
    if "url" not in given:
        _check_no_tls(root, given, typed)
        return Client(Path(given.get("socket", DEFAULT_SOCKET)), on_slow=_warn_slow)
    if "key" in given and "cert" not in given:
        raise click.UsageError(f"{_name('key', typed)} requires --cert FILE", root)
    if "key" in given:
        check_secret(Path(given["key"]))
    token = _read_token(Path(given["token_file"])) if "token_file" in given else given.get("token")
    files = {"ca": _path(given, "ca"), "certificate": _path(given, "cert"), "key": _path(given, "key")}
    return Client(str(given["url"]), token=token, on_slow=_warn_slow, **files)


def _warn_slow() -> None:
    # systemd holds the socket: requests wait until the manager has started.
    click.echo("nohype: the manager has not responded yet, still waiting: check `systemctl status nohyped` on its host", err=True)


def _read_settings(root: click.Context, socket: Path | None) -> tuple[dict[str, Any], frozenset[str]]:
    """All settings, and the names of the settings from the command line."""
    given = {name: root.params.get(name) for name in ("url", "socket", *_FLAGS)}
    typed = {name for name in given if root.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if socket is not None:
        given["socket"] = socket
        typed.add("socket")
    given["token"] = os.environ.get(_TOKEN) or None
    return {name: value for name, value in given.items() if value is not None}, frozenset(typed)


def _check_no_tls(root: click.Context, given: dict[str, Any], typed: frozenset[str]) -> None:
    # Without --url a token would be ignored, and the caller would be the local user instead.
    wrong = [name for name in _FLAGS if name in given and (name in typed or "socket" not in typed)]
    if wrong:
        names = ", ".join(_name(name, typed) for name in wrong)
        raise click.UsageError(f"{names}: requires --url https://HOST:PORT", root)


def _name(setting: str, typed: frozenset[str]) -> str:
    return _FLAGS[setting] if setting in typed else f"NOHYPE_{setting.upper()}"


def _path(given: dict[str, Any], name: str) -> Path | None:
    return Path(given[name]) if name in given else None


def _read_token(path: Path) -> str:
    words = read_secret(path, _LONGEST_TOKEN).decode("ascii", "replace").split()
    if len(words) != 1:
        problem = "has several words" if words else "is empty"
        raise RequestError(f"token file {path} {problem}", "store the word printed by `nohype token new`")
    return words[0]
