"""Builds the image of a plain Debian server: what the host role is applied to from outside, as to a real server.

The server boots from its disk with GRUB. Most packages of the role are installed, since each takes seconds under emulation; the
others, which the role must install, are in a repository on the disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.initramfs import build_initramfs, find_kernel
from orchestrator.lab.grub import FOLDER, MODULES, SECTOR, install_grub

PACKAGES = ("apt", "ca-certificates", "grub-pc-bin", "grub2-common", "python3", "python3-venv", "qemu-system-x86", "qemu-utils")
LEFT_OUT = frozenset(
    ("apparmor", "ethtool", "libvirt-clients", "libvirt-daemon-driver-qemu", "libvirt-daemon-system", "mtools", "python3-libvirt")
)
"""Packages of the host role that the server does not have."""

REPOSITORY = "var/lib/lab-packages"
_MB = 1 << 20
_BIOS, _ROOT = 1 * _MB, 3 * _MB  # where the partitions start
_DEVICE = "/dev/vda2"
# As LabImage.cmdline of other labs, and what the emulated hardware needs (lab.qemu.build_cmdline).
_WORDS = "console=ttyS0 no_timer_check loglevel=5 cryptomgr.notests initcall_blacklist=jent_mod_init"
_SETTINGS = f"""GRUB_TIMEOUT=0
GRUB_TERMINAL=console
GRUB_DISABLE_OS_PROBER=true
GRUB_CMDLINE_LINUX="{_WORDS}"
"""


def add_repository(root: Path, complete: Path, debs: Path) -> None:
    """Puts the packages that ``complete`` has more than ``root`` into a repository of ``root``, and lets apt read it."""
    wanted = sorted(_list_packages(complete) - _list_packages(root))
    target = root / REPOSITORY
    target.mkdir(parents=True)
    stanzas = []
    for name, version, architecture in wanted:
        source = debs / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
        if not source.exists():
            raise ImageError(f"the package {source.name} is not in {debs}", f"remove {complete.parent}, and build again")
        file = target / source.name.replace("%3a", "+3a+")  # apt's method `copy` does not find an escaped character
        shutil.copyfile(source, file)
        control = run(["dpkg-deb", "--field", file]).stdout.rstrip()
        digest = run(["sha256sum", file]).stdout.split()[0]
        stanzas.append(f"{control}\nFilename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n")
    (target / "Packages").write_text("\n".join(stanzas))
    (root / "etc/apt/sources.list.d").mkdir(parents=True, exist_ok=True)
    (root / "etc/apt/sources.list.d/lab.list").write_text(f"deb [trusted=yes] copy:/{REPOSITORY} ./\n")


def _list_packages(root: Path) -> set[tuple[str, str, str]]:
    show = "--showformat=${Package}\t${Version}\t${Architecture}\n"
    lines = run(["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", show]).stdout.splitlines()
    return {(name, version, architecture) for name, version, architecture in (line.split("\t") for line in lines)}


def pack_disk(root: Path, init: Path, modules: tuple[str, ...], folder: Path, size: int) -> None:
    """Writes root.raw of ``size`` bytes, vmlinuz and initrd. ``init`` is that of other labs, whose disk has no partitions."""
    version, kernel = find_kernel(root)
    own_init = folder / "init"
    own_init.write_text(init.read_text().replace("/dev/vda", _DEVICE))
    build_initramfs(root, own_init, modules, folder / "initrd")
    own_init.unlink()
    shutil.copyfile(kernel, folder / "vmlinuz")
    shutil.copyfile(folder / "initrd", root / f"boot/initrd.img-{version}")
    (folder / "cmdline").write_text("")
    (root / "etc/default").mkdir(exist_ok=True)
    (root / "etc/default/grub").write_text(_SETTINGS)
    shutil.copytree(root / FOLDER, root / "boot/grub/i386-pc")
    lines = (f"linux /boot/vmlinuz-{version} root={_DEVICE} rw {_WORDS}", f"initrd /boot/initrd.img-{version}", "boot")
    (root / "boot/grub/grub.cfg").write_text("".join(f"{line}\n" for line in lines))
    image = ["grub-mkimage", "-O", "i386-pc", "-o", "/boot/grub/core.img", "-p", "(hd0,gpt2)/boot/grub", *MODULES]
    run(["chroot", root, *image])
    disk = folder / "root.raw"
    _partition(disk, size)
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-L", "nohype-lab"]
    blocks = f"{(size - _ROOT - _MB) >> 10}k"
    path = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    run([*words, "-E", f"offset={_ROOT}", "-d", root, disk, blocks], timeout=600, env=path)
    install_grub(disk, root, root / "boot/grub/core.img", _BIOS)


def _partition(disk: Path, size: int) -> None:
    with disk.open("xb") as file:
        file.truncate(size)
    kinds = ((_BIOS, _ROOT, "21686148-6449-6E6F-744E-656564454649"), (_ROOT, size - _MB, "0FC63DAF-8483-4772-8E79-3D69D8477DE4"))
    lines = [f"start={start // SECTOR}, size={(end - start) // SECTOR}, type={kind}" for start, end, kind in kinds]
    path = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    run(["sfdisk", "--quiet", disk], input="\n".join(("label: gpt", *lines)), env=path)
