"""Logs in to guests and copies files, for `guest_ssh`."""

from __future__ import annotations

import base64
import getpass
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.readiness import find_address
from orchestrator.cli.secrets import check_secret
from orchestrator.cli.terminal import raw_terminal, read_size
from orchestrator.client import Client
from orchestrator.errors import NotFound, OrchestratorError, RequestError, ShellError
from orchestrator.ssh.login import Keys, Login, Target, find_known_key, log_in
from orchestrator.ssh.session import LeftSession, Screen, Streams, run_session
from orchestrator.ssh.transfer import Transfer
from orchestrator.ssh.transport import ConnectionLost, HostKey
from orchestrator.values import NAME

_PAUSE = 1.0
_LEFT = 255
_REPORT_SECONDS = 0.2
_REMOTE = re.compile(rf"(?P<name>{NAME}):(?P<path>.*)", re.DOTALL)
_JUMP = re.compile(r"(?:(?P<user>[^@\s]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^@:\s/]+))(?::(?P<port>[0-9]{1,5}))?")
_KEY = re.compile(r"(?:^|\s)((?:ssh|ecdsa)-[a-z0-9-]+) ([A-Za-z0-9+/]{40,}={0,2})(?:\s|$)")


def run(client: Client, name: str, access: dict[str, Any], command: tuple[str, ...], *, tty: bool | None) -> int:
    """Returns the exit status."""
    line = command[0] if len(command) == 1 else shlex.join(command) or None
    has_input = sys.stdin is not None
    is_terminal = has_input and sys.stdin.isatty()
    with _explained(client, name), _log_in(client, name, access) as login:
        screen = None
        if tty if tty is not None else (line is None and is_terminal):
            descriptor = sys.stdin.fileno() if is_terminal else 1
            screen = Screen(os.environ.get("TERM", "dumb"), lambda: read_size(descriptor))
        streams = Streams(sys.stdin.fileno() if has_input else None, _Writer(1), _Writer(2))
        try:
            with raw_terminal(sys.stdin.fileno()) if screen and is_terminal else nullcontext():
                return run_session(login, line, streams, screen)
        except LeftSession:
            return _LEFT
        except BrokenPipeError:
            return _LEFT  # the program that reads the output has ended
        except OSError as error:
            raise ShellError(f"cannot read or write on this machine: {error.strerror}") from None


def copy(client: Client, source: str, target: str, access: dict[str, Any], *, recursive: bool) -> None:
    sides = [_REMOTE.fullmatch(text) for text in (source, target)]
    if bool(sides[0]) == bool(sides[1]):
        raise click.UsageError("exactly one of SRC and DST must be NAME:PATH; write a local path with a colon as ./PATH")
    remote = sides[0] or sides[1]
    assert remote
    if not sides[0] and not Path(source).exists():
        raise RequestError(f"{source} does not exist", "check the path")
    name = remote["name"]
    with _explained(client, name), _log_in(client, name, access) as login, _show_progress() as progress:
        transfer = Transfer(login, progress)
        if sides[0]:
            transfer.download(remote["path"], Path(target), recursive=recursive)
        else:
            transfer.upload(Path(source), remote["path"], recursive=recursive)


@contextmanager
def _explained(client: Client, name: str) -> Iterator[None]:
    """Adds to the error of a lost connection what the manager knows of the guest."""
    try:
        yield
    except ConnectionLost as error:
        try:
            state = client.guest(name)["state"]
        except NotFound:
            raise ConnectionLost(f"{error.message}: guest {name} was deleted") from None
        except OrchestratorError:
            raise error from None
        if state != "running":
            hint = f"see `nohype events --guest {name}`"
            raise ConnectionLost(f"{error.message}: guest {name} is {state}", hint) from None
        raise


class _Writer:
    """Writes all bytes to a descriptor; Python's own streams may hold text back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]


def _log_in(client: Client, name: str, access: dict[str, Any]) -> Login:
    deadline = time.monotonic() + access["timeout"]
    for path in access["identities"]:
        check_secret(path)
    keys = Keys(tuple(access["identities"]), _ask_passphrase)
    jump_target = _parse_jump(access["jump"]) if access["jump"] else None
    host_key = _read_host_key(access["host_key"]) if access["host_key"] else _wait_for_host_key(client, name, deadline)
    address = access["address"] or find_address(client.guest(name))
    target = Target(f"guest {name}", address, access["port"], access["user"])
    jump = None
    if jump_target:
        known = find_known_key(jump_target, (Path.home() / ".ssh/known_hosts", Path("/etc/ssh/ssh_known_hosts")))
        jump = log_in(jump_target, known, keys, timeout=max(0.0, deadline - time.monotonic()))
    try:
        return log_in(target, host_key, keys, timeout=max(0.0, deadline - time.monotonic()), jump=jump)
    except BaseException:
        if jump:
            jump.transport.close()
        raise


def _wait_for_host_key(client: Client, name: str, deadline: float) -> HostKey:
    """The key that the guest has reported since its start. Waits while the guest boots."""
    while True:
        guest = client.guest(name)
        if guest["state"] != "running":
            raise NotFound(f"guest {name} is {guest['state']}", f"start it: nohype guest start {name}")
        if guest["ssh_host_key"]:
            return HostKey(guest["ssh_host_key"])
        if time.monotonic() + _PAUSE > deadline:
            message = f"guest {name} has not reported an SSH host key on its console"
            raise ShellError(message, "wait until it is ready; if its image reports no key, give the key with --host-key FILE")
        time.sleep(_PAUSE)


def _read_host_key(path: Path) -> HostKey:
    """The first key in a public key file or known_hosts file."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    for line in text.splitlines():
        if not line.startswith("#") and (match := _KEY.search(line)):
            try:
                if base64.b64decode(match[2], validate=True)[4:].startswith(match[1].encode()):
                    return HostKey(f"{match[1]} {match[2]}")
            except ValueError:
                continue
    raise RequestError(f"{path} contains no SSH public key", "give a file such as ssh_host_ed25519_key.pub of the guest")


def _parse_jump(text: str) -> Target:
    match = _JUMP.fullmatch(text)
    port = int(match["port"] or 22) if match else 0
    if not match or not 0 < port < 65536:
        raise click.UsageError(f"--jump {text!r}: use the form USER@HOST or USER@HOST:PORT")
    return Target(f"jump host {text}", match["v6"] or match["host"], port, match["user"] or getpass.getuser())


def _ask_passphrase(path: Path) -> str | None:
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    return str(click.prompt(f"Passphrase of {path}", hide_input=True, err=True))


@contextmanager
def _show_progress() -> Iterator[Any]:
    """On a terminal, one line that is updated."""
    if not sys.stderr.isatty():
        yield lambda _name, _done, _size: None
        return
    started_at = shown_at = time.monotonic()

    def report(name: str, done: int, size: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at < _REPORT_SECONDS and done < size:
            return
        shown_at = now
        rate = done / max(now - started_at, 0.001) / 1e6
        share = f"{100 * done // size}%" if size else "100%"
        click.echo(f"\r\x1b[K{name[:60]!r} {share} of {size / 1e6:.1f} MB, {rate:.1f} MB/s", nl=False, err=True)

    try:
        yield report
    finally:
        if shown_at != started_at:
            click.echo(err=True)
