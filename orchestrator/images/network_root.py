"""Guests whose root is on a network disk: which images can mount it, and the file with which they log in to the target.

The target is a word of the kernel command line, which is not secret. The file is part of the guest's own initrd; its init removes
it once it has logged in.
"""

from __future__ import annotations

from orchestrator.errors import RequestError
from orchestrator.images.cpio import build_archive
from orchestrator.images.store import Image
from orchestrator.model.configuration import Configuration
from orchestrator.model.request import GuestRequest

_LOGIN = "nohype-disk"
_MAX_CMDLINE = 2047
"""COMMAND_LINE_SIZE of x86 (arch/x86/include/asm/setup.h), less the final zero byte. The kernel cuts off the rest."""
_WORDS = 128
"""Characters for words that are added to the command line: name, one NIC's address, and the words of a profile."""


def check_network_root(image: Image, request: GuestRequest) -> None:
    """Raises RequestError if the image's init cannot mount its root from the network disk of the request."""
    if not (target := request.network_disk):
        return
    if target.transport not in image.network_root or image.disk is None or image.boot != "direct":
        ways = ", ".join(image.network_root) or "none"
        hint = "use an image whose `nohype image show` lists this protocol as network root"
        raise RequestError(f"image {image.name} cannot mount its root from {target.transport}: it supports {ways}", hint)
    words = 1 + len(request.wanted_nics) + (1 if request.profile else 0)
    size = len(image.cmdline) + len(request.cmdline) + len(str(target)) + _WORDS * words
    if size > _MAX_CMDLINE:
        hint = f"shorten cmdline by {size - _MAX_CMDLINE} characters"
        raise RequestError(f"the kernel command line would have up to {size} characters, at most {_MAX_CMDLINE} are read", hint)


def append_login(archive: bytes | None, configuration: Configuration) -> bytes | None:
    """``archive``: other files of the guest's own initrd. None if there are none at all."""
    if not (login := configuration.disk_login):
        return archive
    fields = {"initiator": login.initiator, "id": str(configuration.uuid), "user": login.user, "secret": login.secret}
    text = "".join(f"{name}={value}\n" for name, value in fields.items() if value)
    return (archive or b"") + build_archive({_LOGIN: text.encode()})
