"""Builds from a lock, up to the point where Debian's programs would be needed: what is missing, or is not what was locked."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.build import build_image
from orchestrator.images.lock import LockedPackage, build_repository, format_lock, hash_file
from orchestrator.images.recipe import recipes_folder

RECIPE = """
kind = "debian"
description = "d"
packages = ["small"]
modules = []
init = "init"
cmdline = ""
memory = "1G"
disk = "1G"
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    (folder / "one").mkdir(parents=True)
    (folder / "one/image.toml").write_text(RECIPE)
    (folder / "one/init").touch()
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> LockedPackage:
    """A package in the cache. Its version has an epoch, which is escaped in the file's name."""
    tree, debs = tmp_path / "tree", tmp_path / "cache/debs"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: small\nVersion: 1:2.0\nArchitecture: all\nMaintainer: none\nDescription: none\n"
    (tree / "DEBIAN/control").write_text(control)
    debs.mkdir(parents=True)
    package = LockedPackage("small", "1:2.0", "all", "")
    run(["dpkg-deb", "--build", "--root-owner-group", tree, debs / package.file])
    return LockedPackage("small", "1:2.0", "all", hash_file(debs / package.file))


def build(recipes: Path, tmp_path: Path, *packages: LockedPackage, name: str = "one") -> None:
    lock = tmp_path / "lock"
    lock.write_text(format_lock(packages))
    build_image(recipes, name, tmp_path / "cache", lock=lock, progress=lambda _: None)


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


def test_repository_has_only_the_locked_files(tmp_path: Path, kept: LockedPackage) -> None:
    debs = tmp_path / "cache/debs"
    (debs / "other_1_all.deb").touch()
    build_repository([kept], [tmp_path / "none", debs], tmp_path / "repository")
    assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == ["Packages", "small_1+3a+2.0_all.deb"]
    index = (tmp_path / "repository/Packages").read_text()
    assert "Package: small\nVersion: 1:2.0\n" in index
    assert f"Filename: ./small_1+3a+2.0_all.deb\nSize: {(debs / kept.file).stat().st_size}\nSHA256: {kept.sha256}\n" in index


def test_package_that_is_not_kept_is_named(recipes: Path, tmp_path: Path, kept: LockedPackage) -> None:
    with pytest.raises(ImageError, match="1 of 2 packages are not kept with the locked content: gone 3\n"):
        build(recipes, tmp_path, kept, LockedPackage("gone", "3", "all", kept.sha256))
    assert left(tmp_path) == ["debs"]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_kept_file_with_another_content_is_not_used(recipes: Path, tmp_path: Path, kept: LockedPackage, damage: str) -> None:
    file = tmp_path / "cache/debs" / kept.file
    data = file.read_bytes()
    file.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ImageError, match="not kept with the locked content: small 1:2.0") as caught:
        build(recipes, tmp_path, kept)
    assert f"put the .deb files into {tmp_path}/cache/debs" in caught.value.hint
    assert left(tmp_path) == ["debs"]


def test_lock_of_another_recipe_is_refused(tmp_path: Path, kept: LockedPackage) -> None:
    with pytest.raises(ImageError, match="the lock lacks packages of the recipe: .*openssh-server"):
        build(recipes_folder(), tmp_path, kept, name="debian")
    assert left(tmp_path) == ["debs"]


def test_initramfs_is_not_built_from_a_lock(tmp_path: Path, kept: LockedPackage) -> None:
    with pytest.raises(ImageError, match="cannot build image minimal from a lock: its recipe is an initramfs"):
        build(recipes_folder(), tmp_path, kept, name="minimal")
