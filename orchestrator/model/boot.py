"""Boot files that a request names by their URLs."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.model.url import MAX_URL, parse_url

BOOT_IMAGE_PREFIX = "boot-"
"""Of the names of images that the manager makes of a request's ``boot``."""
_SHA256 = r"^[0-9a-f]{64}$"
_BOOT_IMAGE = re.compile(f"{BOOT_IMAGE_PREFIX}[0-9a-f]{{32}}")


def _url(text: str) -> str:
    parse_url(text)
    return text


def is_boot_image(name: str) -> bool:
    """Whether the name of an image is one of ``BootFiles.image_name``."""
    return bool(_BOOT_IMAGE.fullmatch(name))


class BootFiles(BaseModel):
    """Kernel and initrd on an HTTP or HTTPS server, with their SHA-256 in hexadecimal."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kernel: Annotated[str, Field(max_length=MAX_URL), AfterValidator(_url)]
    kernel_sha256: Annotated[str, Field(pattern=_SHA256)]
    initrd: Annotated[str, Field(max_length=MAX_URL), AfterValidator(_url)]
    initrd_sha256: Annotated[str, Field(pattern=_SHA256)]

    @property
    def image_name(self) -> str:
        """The name of the image that these files become. The same contents have the same name, wherever they come from."""
        digest = hashlib.sha256(f"{self.kernel_sha256} {self.initrd_sha256}".encode()).hexdigest()
        return f"{BOOT_IMAGE_PREFIX}{digest[:32]}"
