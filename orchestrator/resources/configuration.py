"""Gives a guest its configuration: a copy of the image's initrd with the guest's own files, and credentials in the domain XML."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from xml.etree.ElementTree import Element

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.images.cpio import pad
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.resources.xml import element

_HINT = "check `df`, `mount` and `lsattr`"


@dataclass(frozen=True)
class InitrdBefore:
    """The file that was written for one guest."""

    path: str


@register
@dataclass(frozen=True)
class WriteInitrd:
    """Writes the image's initrd with a further archive behind it. The kernel unpacks one after the other (init/initramfs.c).

    Only root can read the file; libvirt gives it to QEMU's user when it starts the guest (security driver DAC).
    """

    action: ClassVar[str] = "guest-initrd"
    image_initrd: Path
    path: Path
    archive: bytes = field(repr=False)

    def describe(self) -> str:
        return f"write the initrd {self.path.name} with the guest's own files"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return to_arguments(InitrdBefore(str(self.path)))

    def apply(self, host: HostRoot) -> None:
        try:
            self.path.unlink(missing_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w+b") as file, self.image_initrd.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
                start = file.tell()
                start += file.write(pad(start))
                file.write(self.archive)
                file.flush()
                file.seek(start)
                written = file.read() == self.archive
        except OSError as error:
            raise HostError(f"cannot write {self.path}", _HINT, error.errno or 0) from None
        if not written:
            raise HostError(f"{self.path} has other content than was written", _HINT)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        path = Path(parse_arguments(InitrdBefore, arguments).path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise HostError(f"cannot remove {path}", _HINT, error.errno or 0) from None


def build_sysinfo(credentials: Mapping[str, str]) -> Element:
    """SMBIOS strings of type 11, in the form that systemd reads (systemd.system-credentials(7)).

    In base64: a string of SMBIOS ends at a zero byte, and cannot be empty.
    """
    entries = [
        element("entry", f"io.systemd.credential.binary:{name}={base64.b64encode(content.encode()).decode()}")
        for name, content in credentials.items()
    ]
    return element("sysinfo", element("oemStrings", *entries), type="smbios")
