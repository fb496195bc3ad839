"""Runs the commands of a switch: on this host, or over SSH with a pinned host key."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.errors import CommandError, ShellError, SwitchError
from orchestrator.host.run import run
from orchestrator.model.switch import SshAddress

if TYPE_CHECKING:
    from orchestrator.ssh import Shell

CONNECT_SECONDS, COMMAND_SECONDS = 8.0, 10.0
_KEEP_KEY = "create it with `ssh-keygen -t ed25519 -N ''`, and set [switches] ssh_key"


class Commands(Protocol):
    where: str
    """For error messages: ``on this host``."""

    def run(self, words: Sequence[str], *, input: str = "") -> str:
        """Returns the output. Raises SwitchError if the program fails, is not installed or times out."""

    def close(self) -> None: ...


class LocalCommands:
    """``prefix``: words before each command, such as those that enter a container with the switch."""

    where = "on this host"

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._prefix = tuple(prefix)

    def run(self, words: Sequence[str], *, input: str = "") -> str:
        try:
            done = run([*self._prefix, *words], timeout=COMMAND_SECONDS, input=input, check=False)
        except CommandError as error:
            raise SwitchError(error.message, f"install the package that has `{words[0]}`") from None
        return _check(words, done.status, done.stdout, done.stderr, self.where)

    def close(self) -> None:
        pass


class SshCommands:
    """Connects at the first command, and again after a lost connection. ``key``: file with the private key."""

    def __init__(self, address: SshAddress, key: Path | None) -> None:
        self.where = f"on {address}"
        self._address, self._key = address, key
        self._shell: Shell | None = None

    def run(self, words: Sequence[str], *, input: str = "") -> str:
        line = words if self._address.user == "root" else ["sudo", "-n", *words]
        known, shell = self._shell, self._shell or self._connect()
        try:
            done = shell.run(line, timeout=COMMAND_SECONDS, input=input.encode())
        except ShellError as error:
            self.close()
            # The switch may have closed an idle connection. Every command can be repeated.
            if known and error.code != "shell-timeout":
                return self.run(words, input=input)
            raise SwitchError(error.message, "check that the switch is up and that this host reaches it") from None
        return _check(words, done.status, done.stdout, done.stderr, self.where)

    def close(self) -> None:
        shell, self._shell = self._shell, None
        if shell:
            with suppress(Exception):
                shell.close()

    def _connect(self) -> Shell:
        from orchestrator.ssh import connect  # paramiko takes memory, and most hosts do not need it

        address, key = self._address, check_key(self._key)
        try:
            self._shell = connect(
                address.host, address.port, user=address.user, key=key, host_key=address.host_key, timeout=CONNECT_SECONDS
            )
        except ShellError as error:
            raise SwitchError(error.message, _explain(error)) from None
        except ValueError as error:  # paramiko's parser of key files
            raise SwitchError(f"cannot use the key {key}: {error}", _KEEP_KEY) from None
        return self._shell


def check_key(key: Path | None) -> Path:
    """Raises SwitchError without a private key that only its owner can read."""
    if key is None:
        raise SwitchError("no SSH key is configured for external switches", _KEEP_KEY)
    try:
        mode = key.stat().st_mode
    except OSError as error:
        raise SwitchError(f"cannot read the SSH key {key}: {error.strerror}", _KEEP_KEY) from None
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise SwitchError(f"the SSH key {key} is not a file that only its owner can read", f"run `chmod 600 {key}`")
    return key


def read_json(commands: Commands, words: Sequence[str]) -> Any:
    """The JSON that a program prints; no output is an empty list (iproute2)."""
    text = commands.run(words).strip()
    try:
        return json.loads(text or "[]")
    except (ValueError, RecursionError):
        name = " ".join(words)
        hint = f"check which version of {words[0]} is installed"
        raise SwitchError(f"`{name}` {commands.where} did not print JSON: {text[:80]!r}", hint) from None


def parsed(commands: Commands, what: str, parse: Callable[[], Any]) -> Any:
    """Raises SwitchError if the output has another structure than expected."""
    try:
        return parse()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message = f"cannot parse {what} {commands.where}: {type(error).__name__} {error}"
        raise SwitchError(message, "check the version of the switch's programs") from None


def _check(words: Sequence[str], status: int, output: str, errors: str, where: str) -> str:
    if status:
        said = " ".join((errors or output).split())[:500] or "no message"
        hint = f"install the package that has `{words[0]}`" if status in (126, 127) else "check the names of bridge and port"
        raise SwitchError(f"`{' '.join(words)[:200]}` {where} exited with status {status}: {said}", hint)
    return output


def _explain(error: ShellError) -> str:
    from orchestrator.ssh import KeyRefused, WrongHostKey

    if isinstance(error, WrongHostKey):
        return "do not log in: another machine answers at this address, or the key has changed; register the switch again if so"
    if isinstance(error, KeyRefused):
        return "add the public key of [switches] ssh_key to the user's authorized_keys on the switch"
    return "check that the switch is up, and that this host reaches its SSH port"
