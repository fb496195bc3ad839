"""Creates a lab's SSH keys. They are passed to the lab host as a systemd credential, so no image contains a secret."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from orchestrator.lab.paths import LabDir

SWITCH_KEY = "/etc/nohype/switch_key"
"""In the lab: the manager logs in on the lab's switch with it."""


@dataclass(frozen=True)
class KeyPair:
    """An ed25519 key in OpenSSH formats; ``public`` is one line without a comment."""

    private: bytes
    public: str


def make_key() -> KeyPair:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return KeyPair(private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


@dataclass(frozen=True)
class LabKeys:
    """Public keys: of the lab host, of the server of its switch, and of the manager in the lab, which may log in there."""

    host: str
    switch: str
    manager: str


def write_keys(folder: LabDir) -> LabKeys:
    """Creates all keys, and the credential with those of the lab host."""
    client, host, switch, manager = make_key(), make_key(), make_key(), make_key()
    _write_secret(folder.key, client.private)
    _write_secret(folder.switch_key, switch.private)
    _write_secret(folder.path / "tmpfiles.extra", build_tmpfiles(client.public, host, manager.private).encode())
    folder.known_hosts.write_text(f"nohype-lab-{folder.name} {host.public}\n")
    return LabKeys(host.public, switch.public, manager.public)


def build_tmpfiles(client: str, host: KeyPair, manager: bytes) -> str:
    """Lines for the credential ``tmpfiles.extra`` (systemd-tmpfiles(8), tmpfiles.d(5)).

    systemd-tmpfiles-setup.service applies them before any server starts. ``f+`` replaces a file of the image, ``~`` means base64.
    The credential ``ssh.authorized_keys.root`` does not replace a file, and host keys have no credential.
    """
    return "".join(
        f"{kind} {path} {mode} root root - {value}\n"
        for kind, path, mode, value in (
            ("d", "/root/.ssh", "0700", "-"),
            ("f+~", "/root/.ssh/authorized_keys", "0600", _base64(client.encode() + b"\n")),
            ("f+~", "/etc/ssh/ssh_host_ed25519_key", "0600", _base64(host.private)),
            ("f+~", "/etc/ssh/ssh_host_ed25519_key.pub", "0644", _base64(host.public.encode() + b"\n")),
            ("f+~", SWITCH_KEY, "0600", _base64(manager)),
        )
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write_secret(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
