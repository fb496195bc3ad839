"""Builds images whose root is a Debian system (RootRecipe)."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images import debian, lock
from orchestrator.images.cache import Progress, hash_inputs, remove_tree
from orchestrator.images.customize import EPOCH, customize, remove_identity
from orchestrator.images.description import DISK, INITRD, KERNEL, RAM_INITRD, Description, DiskImage, Provenance, RamRoot
from orchestrator.images.initramfs import build_initramfs, find_kernel
from orchestrator.images.recipe import RootRecipe, find_file
from orchestrator.images.root_pack import pack_disk, pack_ram_root
from orchestrator.images.tools import DISENGAGE, build_tools
from orchestrator.values import Size

KEPT = "packages"
"""Folder beside a built image with the .deb files of its lock."""

TOOLS = "usr/lib/nohype"
"""Folder of a root with the programs of `images.tools`."""

_TOOLS = ("busybox-static", "e2fsprogs", "kmod", "zstd")
_ENV = {
    "SOURCE_DATE_EPOCH": str(EPOCH),  # passwd(1) and others write dates into the root
    "INITRD": "No",  # the kernel's hook builds no initramfs
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",  # mmdebstrap starts a Python program per package: not with a Python of the user's
}


def build_debian(
    recipe: RootRecipe, layers: tuple[Path, ...], image: Path, cache: Path, *,
    key: str, locked: tuple[lock.LockedPackage, ...], progress: Progress,
) -> Description:  # fmt: skip
    """Fills the folder of an image with all files except the description, which is returned.

    Args:
        layers: folders of the recipe, those of its bases first.
        key: a hash of the recipe and of the code.
        locked: the packages to build from without network; () for those that the mirror has now.
    """
    name, root, folder = image.name, image.parent / "root", image.parent
    kept = [cache / "debs", *sorted(cache.glob(f"image-*/{KEPT}"))]
    repository = folder / "repository" if locked else None
    if repository:
        _check_lock(recipe, locked)
        progress(f"image {name}: checking {len(locked)} kept packages")
        lock.build_repository(locked, kept, repository)
    progress(f"image {name}: installing packages" + (" without network" if locked else ""))
    log = cache / "log" / f"image-{name}.log"
    debian.make_root(root, recipe.packages, cache=cache, log=log, variant="apt", updates=True, repository=repository, env=_ENV)
    progress(f"image {name}: packing the root")
    names = {installed for installed, _, _ in lock.list_installed(root)}
    installed = tuple(package for package in locked if package.name in names) or lock.lock_root(root, kept)
    (image / lock.LOCK).write_text(lock.format_lock(installed))
    lock.keep_debs(installed, kept, folder / KEPT)
    if repository:
        remove_tree(repository)
    description = _pack(recipe, layers, root, image, identity=hash_inputs(key, lock.format_lock(installed)), locked=installed)
    remove_tree(root)
    return description


def _pack(
    recipe: RootRecipe,
    layers: tuple[Path, ...],
    root: Path,
    image: Path,
    *,
    identity: str,
    locked: tuple[lock.LockedPackage, ...],
) -> Description:
    init = find_file(layers, recipe.init) or layers[-1] / recipe.init
    version, kernel = find_kernel(root)
    shutil.copyfile(kernel, image / KERNEL)
    customize(root, recipe, layers)
    if recipe.tools:
        (root / TOOLS).mkdir(exist_ok=True)
        build_tools(layers[0].parent, recipe.tools, root / TOOLS)
    build_initramfs(root, init, recipe.modules, image / INITRD, programs=recipe.programs)
    remove_identity(root)
    size = Size.parse(recipe.disk)
    ram = None
    if recipe.ram:
        unpacked = pack_ram_root(root, init, image / RAM_INITRD)
        ram = RamRoot(packed=(image / RAM_INITRD).stat().st_size, unpacked=unpacked)
    pack_disk(root, size, identity, image / DISK)
    versions = {package.name: package.version for package in locked}
    return Description(
        description=recipe.description,
        hash=identity,
        kernel_version=version,
        cmdline=recipe.cmdline,
        memory=Size.parse(recipe.memory),
        console=recipe.console,
        ready=recipe.ready,
        disengages=DISENGAGE in recipe.tools,
        configuration=tuple(recipe.configuration),
        network_root=tuple(recipe.network_root),
        disk=DiskImage(size=size.bytes, sha256=lock.hash_file(image / DISK), layout="ext4"),
        ram_root=ram,
        provenance=Provenance(
            recipe=image.name,
            packages=versions,
            lock=lock.hash_file(image / lock.LOCK),
            tools={name: versions[name] for name in _TOOLS} | {"mmdebstrap": run(["mmdebstrap", "--version"]).stdout.split()[-1]},
        ),
    )


def _check_lock(recipe: RootRecipe, locked: tuple[lock.LockedPackage, ...]) -> None:
    missing = sorted({*recipe.packages} - {package.name for package in locked})
    if missing:
        raise ImageError(f"the lock lacks packages of the recipe: {', '.join(missing)}", "use a lock of the same recipe")
