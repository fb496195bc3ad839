"""Logs in to a guest, directly or through another host. The key of each host is known before: none is trusted at first use."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import paramiko

from orchestrator.errors import ShellError
from orchestrator.ssh.transport import FAILURES, HostKey, WrongHostKey, dial, end_when_silent, explain, open_transport

DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
"""Files in ~/.ssh that are tried without --identity, as ssh(1) does."""

_ATTEMPT_SECONDS = 15.0
_PAUSE = 1.0

AskPassphrase = Callable[[Path], str | None]


@dataclass(frozen=True)
class Target:
    """An SSH server; ``name`` is for messages."""

    name: str
    host: str
    port: int
    user: str

    def __str__(self) -> str:
        return f"{self.name} ({self.user}@{self.host} port {self.port})"


@dataclass(frozen=True)
class Keys:
    """The keys to log in with. Without ``identities``: the keys of the agent, then those of `DEFAULT_KEYS`.

    ``ask`` returns the passphrase of a file, or None if the user cannot be asked.
    """

    identities: tuple[Path, ...] = ()
    ask: AskPassphrase = field(default=lambda _path: None)
    home: Path = field(default_factory=Path.home)


class Retry(ShellError):
    """The server did not answer yet: it may still be starting."""


@dataclass
class Login:
    """A connection that is logged in; closes the connection to a jump host with it."""

    transport: paramiko.Transport
    target: Target
    jump: Login | None = None

    def __enter__(self) -> Login:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()
        if self.jump:
            self.jump.__exit__()


def log_in(target: Target, host_key: HostKey, keys: Keys, *, timeout: float, jump: Login | None = None) -> Login:
    """Retries until the server answers, for ``timeout`` seconds. Raises ShellError, immediately if a key is refused."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            return _log_in(target, host_key, keys, max(1.0, min(_ATTEMPT_SECONDS, left)), jump)
        except Retry as error:
            if deadline - time.monotonic() < _PAUSE:
                message = f"{error.message}; gave up after {round(timeout, 1):g} s"
                raise ShellError(message, "check that this machine reaches the guest, and see `nohype guest console`") from None
        time.sleep(_PAUSE)


def find_known_key(target: Target, files: Sequence[Path]) -> HostKey:
    """The key of a host in known_hosts files (sshd(8)). Raises ShellError without one."""
    name = target.host if target.port == 22 else f"[{target.host}]:{target.port}"
    for file in files:
        try:
            known = paramiko.HostKeys(str(file)).lookup(name) if file.is_file() else None
        except (OSError, paramiko.SSHException) as error:
            raise ShellError(f"cannot read {file}: {error}", "check the file") from None
        for kind in ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"):
            if known and kind in known:
                return HostKey(f"{kind} {known[kind].get_base64()}")
    where = " or ".join(map(str, files))
    hint = f"run `ssh {target.host}` once and compare the key that it shows"
    raise ShellError(f"the host key of {name} is not in {where}", hint)


def _log_in(target: Target, host_key: HostKey, keys: Keys, timeout: float, jump: Login | None) -> Login:
    stream = _open_stream(target, timeout, jump)
    try:
        transport = open_transport(stream, host_key, lambda opened: _authenticate(opened, target, keys), timeout=timeout)
    except WrongHostKey as error:
        hint = "another machine answers at this address, or the key has changed: do not log in"
        raise ShellError(f"{target} {error.message}", hint) from None
    except FAILURES as error:
        raise Retry(f"cannot open an SSH connection to {target}: {explain(error)}") from None
    end_when_silent(transport)
    return Login(transport, target, jump)


def _open_stream(target: Target, timeout: float, jump: Login | None) -> socket.socket | paramiko.Channel:
    if jump is None:
        try:
            return dial(target.host, target.port, timeout)
        except OSError as error:
            raise Retry(f"{target} did not answer: {error.strerror or error}") from None
    try:
        where = (target.host, target.port)
        return jump.transport.open_channel("direct-tcpip", where, ("127.0.0.1", 0), timeout=timeout)
    except paramiko.ChannelException as error:
        raise Retry(f"{jump.target} could not connect to {target}: {error.text}") from None
    except FAILURES as error:
        if not jump.transport.is_active():
            raise ShellError(f"connection to {jump.target} lost: {explain(error)}") from None
        raise Retry(f"{jump.target} could not connect to {target}: {explain(error)}") from None


def _authenticate(transport: paramiko.Transport, target: Target, keys: Keys) -> None:
    tried = []
    for name, key in _list_keys(keys):
        tried.append(name)
        try:
            if not transport.auth_publickey(target.user, key):
                return
            raise ShellError(f"{target} requires more than the key {name}", "only public keys are supported")
        except paramiko.AuthenticationException:
            if not transport.is_active():
                break
    if not tried:
        raise ShellError("no SSH key found: the agent has none, and ~/.ssh has no default key", "give a key with --identity FILE")
    hint = "give the key that the guest accepts with --identity FILE; check --user"
    raise ShellError(f"{target} accepts none of the keys {', '.join(tried)}", hint)


def _list_keys(keys: Keys) -> list[tuple[str, paramiko.PKey]]:
    if keys.identities:
        return [(str(path), _load(path, keys.ask)) for path in keys.identities]
    try:
        agent = [(f"{key.get_name()} of the agent", key) for key in paramiko.Agent().get_keys()]
    except (paramiko.SSHException, OSError):
        agent = []  # SSH_AUTH_SOCK names an agent that has ended
    defaults = [keys.home / ".ssh" / name for name in DEFAULT_KEYS]
    return [*agent, *((str(path), _load(path, keys.ask)) for path in defaults if path.is_file())]


def _load(path: Path, ask: AskPassphrase) -> paramiko.PKey:
    try:
        path.read_bytes()
        try:
            return _parse(path, None)
        except paramiko.PasswordRequiredException:
            passphrase = ask(path)
            if passphrase is None:
                raise ShellError(f"the key {path} has a passphrase", "add it to an SSH agent with ssh-add") from None
            return _parse(path, passphrase)
    except OSError as error:
        raise ShellError(f"cannot read the key {path}: {error.strerror}", "check the path and its permissions") from None


def _parse(path: Path, passphrase: str | None) -> paramiko.PKey:
    reason = ""
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            return kind.from_private_key_file(str(path), passphrase)
        except paramiko.PasswordRequiredException:
            raise
        except Exception as error:  # a malformed file makes paramiko raise errors of many kinds
            reason = reason or str(error) or type(error).__name__
    what = "the passphrase is wrong, or " if passphrase else ""
    raise ShellError(f"cannot use the key {path}: {what}{reason}", "give a private key (Ed25519, ECDSA or RSA)")
