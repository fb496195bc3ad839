"""Builds guest images from recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.images import debian
from orchestrator.images.cache import Progress, build_cached, hash_inputs, remove_tree
from orchestrator.images.initramfs import build_initramfs, find_kernel
from orchestrator.images.recipe import read_recipe
from orchestrator.images.store import write_description

_CODE = tuple(Path(__file__).with_name(name) for name in ("build.py", "debian.py", "initramfs.py", "store.py"))


def build_image(recipes: Path, name: str, cache: Path, *, progress: Progress) -> Path:
    """Builds a guest image, or finds it in the cache.

    Args:
        recipes: folder of recipes.
        name: the recipe.
        cache: cache folder, see ``cache.cache_folder``.
        progress: called when a stage begins.

    Returns:
        The folder with ``vmlinuz``, ``initrd`` and ``image.json``; it is named like the image and must not be changed.

    Raises:
        NotFound: there is no such recipe.
        ImageError: it could not be built; nothing is left of the attempt.
    """
    recipe = read_recipe(recipes, name)
    key = hash_inputs(debian.SUITE, recipes / name, *_CODE)

    def build(folder: Path) -> None:
        root, image = folder / "root", folder / name
        image.mkdir()
        progress(f"image {name}: fetching and unpacking packages")
        # kmod: depmod is run in the root, so the machine itself needs none. It opens liblzma only when it meets a compressed
        # module, and where that fails it finds no aliases and says nothing (kmod 34).
        debian.make_root(
            root, [*recipe.packages, "kmod", "liblzma5"], cache=cache, log=cache / "log" / f"image-{name}.log", variant="extract"
        )
        progress(f"image {name}: packing the initramfs")
        version, kernel = find_kernel(root)
        shutil.copyfile(kernel, image / "vmlinuz")
        build_initramfs(root, recipes / name / recipe.init, recipe.modules, image / "initrd")
        remove_tree(root)
        write_description(
            image,
            cmdline=recipe.cmdline,
            memory=recipe.memory,
            console=recipe.console,
            kernel_version=version,
            hash=key,
            description=recipe.description,
        )

    return build_cached(cache, f"image-{name}", key, build, progress=progress) / name
