"""The id of this host (machine-id(5))."""

from __future__ import annotations

import hashlib
import hmac
import re
from uuid import UUID

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot

_FILE = "etc/machine-id"
_APPLICATION = UUID("8e1c5a52-6f0b-4c1d-9c57-4e6f48797065")
"""Of this program. machine-id(5): the machine id itself is confidential, so that only a keyed hash of it may leave the host."""
_ID = re.compile(r"[0-9a-f]{32}")


def read_host_id(host: HostRoot) -> str:
    """A stable id of the host for this program, as `systemd-id128 machine-id --app-specific` derives it; empty if the host has
    no machine id (in an image it is "uninitialized"), or it cannot be read.
    """
    try:
        text = host.find(_FILE) or ""
    except HostError:
        return ""
    if not _ID.fullmatch(text) or not int(text, 16):
        return ""
    digest = bytearray(hmac.digest(bytes.fromhex(text), _APPLICATION.bytes, hashlib.sha256)[:16])
    digest[6] = digest[6] & 0x0F | 0x40  # a UUID of version 4 (sd-id128, id128_make_v4_uuid())
    digest[8] = digest[8] & 0x3F | 0x80
    return digest.hex()
