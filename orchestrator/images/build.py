"""Builds guest images from recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.images import debian
from orchestrator.images.cache import Progress, build_cached, hash_inputs, remove_tree
from orchestrator.images.description import Description, write_description
from orchestrator.images.initramfs import build_initramfs, find_kernel
from orchestrator.images.recipe import read_recipe
from orchestrator.values import Size

_CODE = tuple(Path(__file__).with_name(name) for name in ("build.py", "debian.py", "initramfs.py", "description.py"))


def build_image(recipes: Path, name: str, cache: Path, *, progress: Progress) -> Path:
    """A folder with ``vmlinuz``, ``initrd`` and ``image.json``, named after the image. It is cached: do not change it."""
    recipe = read_recipe(recipes, name)
    key = hash_inputs(debian.SUITE, recipes / name, *_CODE)

    def build(folder: Path) -> None:
        root, image = folder / "root", folder / name
        image.mkdir()
        progress(f"image {name}: fetching and unpacking packages")
        # kmod: depmod runs in the root, so that the machine needs none. It loads liblzma only for a compressed module; if that
        # fails, it finds no aliases and reports no error (kmod 34).
        debian.make_root(
            root, [*recipe.packages, "kmod", "liblzma5"], cache=cache, log=cache / "log" / f"image-{name}.log", variant="extract"
        )
        progress(f"image {name}: packing the initramfs")
        version, kernel = find_kernel(root)
        shutil.copyfile(kernel, image / "vmlinuz")
        build_initramfs(root, recipes / name / recipe.init, recipe.modules, image / "initrd")
        remove_tree(root)
        description = Description(
            description=recipe.description,
            hash=key,
            kernel_version=version,
            cmdline=recipe.cmdline,
            memory=Size.parse(recipe.memory),
            console=recipe.console,
        )
        write_description(image, description)

    return build_cached(cache, f"image-{name}", key, build, progress=progress) / name
