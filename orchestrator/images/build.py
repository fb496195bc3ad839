"""Builds guest images from recipes."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images import apt, debian
from orchestrator.images.cache import Progress, build_cached, hash_inputs, remove_tree
from orchestrator.images.debian_image import build_debian
from orchestrator.images.description import INITRD, KERNEL, Description, Provenance, write_description
from orchestrator.images.initramfs import build_initramfs, find_kernel
from orchestrator.images.lock import format_lock, read_lock
from orchestrator.images.recipe import Recipe, RootRecipe, read_recipe, recipe_layers
from orchestrator.images.tools import DISENGAGE, build_tools, tools_source
from orchestrator.values import Size

_CODE = tuple(
    Path(__file__).with_name(f"{name}.py")
    for name in ("build", "debian", "initramfs", "description", "debian_image", "customize", "root_pack", "lock", "tools")
)


def read_tools() -> dict[str, str]:
    """Versions of the programs on this machine that make an initramfs."""
    versions = {name: run([name, "--version"]).stdout.split("\n")[0].split()[-1] for name in ("cpio", "mmdebstrap")}
    return {**versions, "python": platform.python_version()}


def build_image(
    recipes: Path, name: str, cache: Path, *, lock: Path | None = None, renew: bool = False, progress: Progress
) -> Path:
    """A folder with the files of a build (see ``Description.files``), named after the image. It is cached: do not change it.

    Args:
        lock: a lock of packages; the image is built from their kept files, without network.
        renew: build also if the cache has a build of this recipe, whose packages may be outdated.
    """
    recipe, layers = read_recipe(recipes, name), recipe_layers(recipes, name)
    if lock and isinstance(recipe, Recipe):
        raise ImageError(f"cannot build image {name} from a lock: its recipe is an initramfs", "omit --lock")
    locked = read_lock(lock) if lock else ()
    key = hash_inputs(apt.SUITE, *layers, *_CODE, *([tools_source(recipes)] if recipe.tools else []))

    def build(folder: Path) -> None:
        image = folder / name
        image.mkdir()
        if not locked and not apt.read_apt_settings().security:
            progress(f"image {name}: apt has no archive of security updates configured; the image is built without them")
        if isinstance(recipe, RootRecipe):
            description = build_debian(recipe, layers, image, cache, key=key, locked=locked, progress=progress)
        else:
            description = _build_initramfs(recipe, layers[-1], image, cache, key=key, progress=progress)
        write_description(image, description)

    # The builds of a lock and from the mirror are equal if the packages are, but are found by different keys.
    cached = hash_inputs(key, format_lock(locked)) if locked else key
    return build_cached(cache, f"image-{name}", cached, build, progress=progress, renew=renew) / name


def _build_initramfs(recipe: Recipe, source: Path, image: Path, cache: Path, *, key: str, progress: Progress) -> Description:
    name, root = image.name, image.parent / "root"
    progress(f"image {name}: fetching and unpacking packages")
    # kmod: depmod runs in the root, so that the machine needs none. It loads liblzma only for a compressed module; if that
    # fails, it finds no aliases and reports no error (kmod 34).
    packages = [*recipe.packages, "kmod", "liblzma5"]
    debian.make_root(root, packages, cache=cache, log=cache / "log" / f"image-{name}.log", variant="extract", updates=True)
    progress(f"image {name}: packing the initramfs")
    version, kernel = find_kernel(root)
    shutil.copyfile(kernel, image / KERNEL)
    tools = image.parent / "tools"
    tools.mkdir()
    build_tools(source.parent, recipe.tools, tools)
    build_initramfs(root, source / recipe.init, recipe.modules, image / INITRD, tools=tools)
    versions = debian.read_extracted(root)
    remove_tree(root)
    remove_tree(tools)
    return Description(
        description=recipe.description,
        hash=key,
        kernel_version=version,
        cmdline=recipe.cmdline,
        memory=Size.parse(recipe.memory),
        console=recipe.console,
        bios=recipe.bios,
        disengages=DISENGAGE in recipe.tools,
        provenance=Provenance(recipe=name, packages=versions, tools=read_tools()),
    )
