"""Text that only its file and the guest contain: the ledger, events, logs and answers have its SHA-256 and its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema

FROM_LEDGER = {"stored": True}
"""Validation context in which a secret is read from its stored form. A caller can only send text."""

_SHA256_DIGITS = 64


@dataclass(frozen=True)
class Secret:
    """Two secrets are equal if their hashes are.

    Attributes:
        bytes: size in UTF-8.
        text: None if it was read from the ledger.
    """

    sha256: str
    bytes: int
    text: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, text: str) -> Secret:
        """Raises ValueError, without the text, if it has no form in UTF-8 or contains a zero byte."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text contains an unpaired surrogate") from None
        if b"\0" in data:
            raise ValueError("the text contains a zero byte")
        return cls(sha256(data).hexdigest(), len(data), text)

    @property
    def short_hash(self) -> str:
        """For users: enough to recognise a file, too little to guess a password by its hash."""
        return self.sha256[:8]

    def without_text(self) -> Secret:
        return replace(self, text=None)

    def to_stored(self) -> dict[str, object]:
        return {"sha256": self.sha256, "bytes": self.bytes}


def _reader(max_bytes: int) -> Callable[[object, ValidationInfo], Secret]:
    def read(value: object, info: ValidationInfo) -> Secret:
        if isinstance(value, Secret):
            return value
        if info.context == FROM_LEDGER and isinstance(value, Mapping):
            return _parse_stored(value)
        if not isinstance(value, str):
            raise ValueError("not a text")
        # Before it is encoded: a character takes at least one byte.
        if not value or len(value) > max_bytes or (secret := Secret.of(value)).bytes > max_bytes:
            raise ValueError(f"1 to {max_bytes} bytes are allowed")
        return secret

    return read


def _parse_stored(value: Mapping[object, object]) -> Secret:
    digest, size = value.get("sha256"), value.get("bytes")
    if value.keys() != {"sha256", "bytes"} or type(size) is not int or not isinstance(digest, str) or size < 0:
        raise ValueError("not a stored secret")
    if len(digest) != _SHA256_DIGITS or not set(digest) <= set("0123456789abcdef"):
        raise ValueError("not a SHA-256")
    return Secret(digest, size)


_STORED = PlainSerializer(Secret.to_stored)

MAX_USER_DATA, MAX_NETWORK_CONFIG, MAX_DISK_SECRET = 256 << 10, 32 << 10, 256
"""Bytes."""

UserData = Annotated[
    Secret, PlainValidator(_reader(MAX_USER_DATA)), _STORED,
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_USER_DATA}),
]  # fmt: skip
NetworkConfig = Annotated[
    Secret, PlainValidator(_reader(MAX_NETWORK_CONFIG)), _STORED,
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_NETWORK_CONFIG}),
]  # fmt: skip
DiskSecret = Annotated[
    Secret, PlainValidator(_reader(MAX_DISK_SECRET)), _STORED,
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_DISK_SECRET}),
]  # fmt: skip
