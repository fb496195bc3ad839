"""Images that the manager makes of kernel and initrd from boot servers, for guests that ask for them.

The files of such an image are downloaded before the guest is planned, outside all locks. Its name is a hash of their checksums,
so a second guest with the same files, or a restart, downloads nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator import serving_cpu
from orchestrator.errors import Conflict, ImageError, NotFound
from orchestrator.guests.boot_shares import BootShares
from orchestrator.images.cache import remove_tree
from orchestrator.images.description import Description, write_description
from orchestrator.images.download import check_allowed, download
from orchestrator.images.install import delete_image, install_image
from orchestrator.images.store import find_image, image_names
from orchestrator.ledger import Claim
from orchestrator.model.access import Identity, Role
from orchestrator.model.boot import BOOT_IMAGE_PREFIX, BootFiles, is_boot_image
from orchestrator.model.plan import BootPolicy
from orchestrator.values import Size

MAX_IMAGES = 64
"""Shared evenly between the operators and the tenants that may boot from servers."""
KEEP_SECONDS = 3600.0
"""How long an image without a guest is kept."""
_DOWNLOAD = ".download-"
_SPARE = 1 << 30
"""Bytes that stay free on the disk of the store."""
_MIB = 1 << 20
_CMDLINE = "console=ttyS0 panic=-1"


class BootImages:
    """The images of one store; ``images`` is its folder."""

    def __init__(self, images: Path, policy: BootPolicy) -> None:
        self._images, self._policy = images, policy
        self._shares = BootShares(images, max(1, MAX_IMAGES // (policy.tenants + 1)))

    def check(self, caller: Identity, boot: BootFiles) -> None:
        """Raises Forbidden if the caller may not boot from these servers."""
        for url in (boot.kernel, boot.initrd):
            check_allowed(url, self._list_servers(caller))

    def ensure(self, caller: Identity, boot: BootFiles) -> None:
        """Downloads the files and installs the image, if the store does not have it.

        Raises:
            Forbidden: as ``check``.
            Conflict: the tenant has its share of images already.
            ImageError: a file cannot be downloaded, is too large, or has another checksum.
        """
        self.check(caller, boot)
        try:
            with self._shares.using(caller.tenant, boot.image_name, lambda: boot.image_name in image_names(self._images)):
                if not self._touch(boot.image_name):
                    self._check_room()
                    with serving_cpu.left():
                        self._download(caller, boot)
        except OSError as error:
            what = f"cannot store boot files in {self._images}: {error.strerror or error}"
            raise ImageError(what, "check the folder's disk and mode") from None

    def remove_unused(self, read_claims: Callable[[], Iterable[Claim]]) -> None:
        """Removes the images that no guest has, and whose files were requested more than KEEP_SECONDS ago.

        ``read_claims`` reads the claims of all guests; called again while no guest can be claimed.
        """
        before = time.time() - KEEP_SECONDS
        for leftover in self._images.glob(f"{_DOWNLOAD}*"):  # of a manager that was killed
            if _is_older(leftover, before):
                remove_tree(leftover)
        used = {(claim.owner, claim.plan.image.name) for claim in read_claims()}
        self._shares.remove_older(before, used)
        names = {name for _, name in used}
        for name in image_names(self._images):
            if is_boot_image(name) and name not in names and _is_older(self._images / name, before):
                with suppress(Conflict, NotFound):  # it got a guest meanwhile, or another program removed it
                    delete_image(self._images, name, lambda: [(one.plan.name, one.plan.image) for one in read_claims()])

    def _touch(self, name: str) -> bool:
        """As if the image was downloaded now: `remove_unused` leaves it alone until the guest has its claim. False without it."""
        try:
            find_image(self._images, name)
            os.utime(self._images / name, follow_symlinks=False)
        except (NotFound, FileNotFoundError):
            return False
        return True

    def _download(self, caller: Identity, boot: BootFiles) -> None:
        servers = self._list_servers(caller)
        with TemporaryDirectory(dir=self._make_store(), prefix=_DOWNLOAD) as name:
            folder, deadline = Path(name) / boot.image_name, time.monotonic() + self._policy.timeout
            folder.mkdir()
            size = 0
            for url, sha256, file in ((boot.kernel, boot.kernel_sha256, "vmlinuz"), (boot.initrd, boot.initrd_sha256, "initrd")):
                size += download(
                    url, sha256, folder / file, servers=servers, limit=self._policy.max_size - size,
                    timeout=max(0.1, deadline - time.monotonic()),
                )  # fmt: skip
            write_description(folder, _describe(boot, size))
            install_image(folder, self._images, boot.image_name)

    def _list_servers(self, caller: Identity) -> tuple[str, ...]:
        return caller.boot_servers if caller.role is Role.TENANT else self._policy.servers

    def _make_store(self) -> Path:
        self._images.mkdir(parents=True, exist_ok=True)
        return self._images

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._make_store()).free
        if free < self._policy.max_size + _SPARE:
            raise ImageError(f"the disk of the image store has only {free // _MIB} MB left", "ask the operator of the host")


def _describe(boot: BootFiles, size: int) -> Description:
    return Description(
        description=f"{boot.kernel} and {boot.initrd}",
        hash=boot.image_name.removeprefix(BOOT_IMAGE_PREFIX),
        kernel_version="unknown",
        cmdline=_CMDLINE,
        # The packed initrd, its content, and the kernel's own memory.
        memory=Size(-(-(64 * _MIB + 3 * size) // (2 * _MIB)) * 2 * _MIB),
        console=None,
    )


def _is_older(path: Path, time: float) -> bool:
    try:
        return path.lstat().st_mtime < time
    except FileNotFoundError:
        return False
