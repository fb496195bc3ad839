"""Ed25519 keys in files: a private key is PKCS #8 in PEM, readable by its owner only; a public key is PEM."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from orchestrator.errors import HostError, RequestError
from orchestrator.evidence.document import EvidenceError, Rejected, SignedFile, build_message, write_signed

_MAX_KEY = 64 << 10


def create_key(path: Path) -> tuple[Path, str]:
    """Writes a new private key, and the public key to ``path`` with ``.pub``. Returns the latter path, and the key's id.

    Raises RequestError if one of the files exists or cannot be written.
    """
    if not path.name:
        raise RequestError(f"cannot create {path}: it is a folder", "give the path of a file that does not exist")
    key = Ed25519PrivateKey.generate()
    public = path.with_name(f"{path.name}.pub")
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    try:
        write_new(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    except RequestError:
        path.unlink()
        raise
    return public, identify(key.public_key())


def identify(key: Ed25519PublicKey) -> str:
    """SHA-256 of the 32 bytes of the key, in hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def load_private(path: Path) -> Ed25519PrivateKey:
    """Raises HostError if the file is missing, belongs to another user, is accessible to others, or has no Ed25519 key."""
    hint = f"run `chown {os.geteuid()} {path} && chmod 600 {path}`"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise HostError(f"the signing key {path} is not a regular file")
            if status.st_uid != os.geteuid():
                raise HostError(f"the signing key {path} belongs to user {status.st_uid}, expected {os.geteuid()}", hint)
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = f"{stat.S_IMODE(status.st_mode):04o}"
                raise HostError(f"the signing key {path} has mode {mode}, expected 0600 or 0400", hint)
            data = file.read(_MAX_KEY)
    except OSError as error:
        hint = f"create a key with `nohype audit keygen {path}`"
        raise HostError(f"cannot read the signing key {path}: {error.strerror}", hint) from None
    key = try_load(lambda: load_pem_private_key(data, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise HostError(f"{path} is not an Ed25519 private key in PEM without passphrase", "use `nohype audit keygen`")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Raises RequestError if the file cannot be read or has no Ed25519 public key."""
    key = read_public(path, "public key")
    if not isinstance(key, Ed25519PublicKey):
        raise RequestError(f"{path} is not an Ed25519 public key in PEM", "give the file with .pub of `nohype audit keygen`")
    return key


def read_public(path: Path, what: str) -> object:
    """The public key of a PEM file, of any kind; None if it has none. Raises RequestError if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY)
    except OSError as error:
        raise RequestError(f"cannot read the {what} {path}: {error.strerror}", "check the path") from None
    return try_load(lambda: load_pem_public_key(data))


def sign(evidence: dict[str, Any], key: Ed25519PrivateKey) -> bytes:
    """The signed file. Raises ValueError for a value that has no canonical form."""
    signature = key.sign(build_message(evidence))
    return write_signed(evidence, identify(key.public_key()), base64.b64encode(signature).decode())


def check_signature(file: SignedFile, key: Ed25519PublicKey) -> None:
    """Raises EvidenceError if the signature is not one of this key over this evidence."""
    if file.key != identify(key):
        message = f"the evidence is signed with another key: {file.key:.64}, expected {identify(key)}"
        raise EvidenceError(Rejected.SIGNATURE, message, "give the public key of the host with --key")
    try:
        signature = base64.b64decode(file.signature, validate=True)
        if base64.b64encode(signature).decode() != file.signature:  # its last letter has unused bits
            raise ValueError
        key.verify(signature, file.message)
    except (InvalidSignature, binascii.Error, ValueError):
        message = "the signature does not match the evidence: the file was altered"
        raise EvidenceError(Rejected.SIGNATURE, message, "get the file again from its source") from None


def try_load(load: Callable[[], object]) -> object:
    """None for what cannot be loaded: TypeError is a passphrase that is required."""
    try:
        return load()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Raises RequestError if the file exists or cannot be written."""
    created = False
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        created = True
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
    except OSError as error:
        if created:
            path.unlink()  # half of a key would prevent the next attempt
        hint = "give the path of a file that does not exist, in a folder that does"
        raise RequestError(f"cannot create {path}: {error.strerror}", hint) from None
