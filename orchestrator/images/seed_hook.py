"""Lets an initramfs of initramfs-tools pass on the files with which a guest is configured.

The manager appends an archive with /run/cloud-seed to a guest's initramfs. The init of initramfs-tools mounts a tmpfs on /run
after it has sourced /conf/conf.d (initramfs-tools-core 0.148: /init), and moves this tmpfs to the root file system in the end.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.images.cpio import build_archive, pad

# Sourced before /run is mounted; the scripts of init-top run after that. Without busybox in the image, the programs are those of
# klibc, which has no cp and whose mv cannot move a file to another file system.
_HOOK = r"""if [ -d /run/cloud-seed ]; then
	mv /run/cloud-seed /nohype-seed
	echo '(umask 077; mkdir /run/cloud-seed; for file in /nohype-seed/*; do cat "$file" >"/run/cloud-seed/${file##*/}"; done)' \
		>>/scripts/init-top/ORDER
fi
"""


def append_seed_hook(initrd: Path) -> None:
    """The kernel unpacks the archives of an initramfs one after the other."""
    archive = build_archive({"conf/conf.d/nohype-seed": _HOOK.encode()})
    with initrd.open("ab") as file:
        file.write(pad(file.tell()) + archive)
