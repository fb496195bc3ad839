"""Recipes of guest images."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ImageError, NotFound
from orchestrator.images.recipe import Recipe, RootRecipe, read_recipe, recipe_layers, recipe_names, recipes_folder
from orchestrator.values import Size

GOOD = 'description = "d"\npackages = ["pp"]\nmodules = []\ninit = "init"\ncmdline = "quiet"\nmemory = "96M"\n'


def write(folder: Path, text: str) -> Path:
    (folder / "one").mkdir()
    (folder / "one/image.toml").write_text(text)
    (folder / "one/init").write_text("#!/bin/sh\n")
    return folder


ROOT = GOOD + 'kind = "debian"\ndisk = "512M"\n'


def write_all(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "image.toml").write_text(text)
    (folder / next(iter(texts)) / "init").write_text("#!/bin/sh\n")
    return folder


def test_minimal_is_valid() -> None:
    recipe = read_recipe(recipes_folder(), "minimal")
    assert recipe.console == "nohype-1"
    assert "igbvf" in recipe.modules
    assert "\n" not in recipe.cmdline
    assert "  " not in recipe.cmdline


def test_unknown_recipe_lists_the_available_ones(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="'two'.*available: one"):
        read_recipe(write(tmp_path, GOOD), "two")


@pytest.mark.parametrize("name", ["..", ".", "", "one/../one", "../" * 5 + "etc"])
def test_path_as_name_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        read_recipe(write(tmp_path, GOOD), name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("packages = [", "cannot read"),
        (GOOD + "frob = 1\n", "frob"),
        (GOOD.replace('["pp"]', "[]"), "packages"),
        (GOOD.replace('"quiet"', "1"), "cmdline"),
        (GOOD.replace('"96M"', '"much"'), "memory"),
        (GOOD.replace('"init"', '"../init"'), "init"),
        (GOOD.replace('"init"', '"other"'), "other"),
    ],
)
def test_invalid_recipe_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_recipe(write(tmp_path, text), "one")


@pytest.mark.parametrize("name", recipe_names(recipes_folder()))
def test_shipped_recipe_is_valid(name: str) -> None:
    recipe = read_recipe(recipes_folder(), name)
    assert "\n" not in recipe.cmdline
    if isinstance(recipe, RootRecipe):
        assert len(set(recipe.packages)) == len(recipe.packages)
        units = [unit for cut in recipe.cut for unit in cut.units]
        assert len(set(units)) == len(units)
        assert not set(units) & set(recipe.enable)
        # packages that pack the root are installed in it
        assert {"linux-image-amd64", "busybox-static", "e2fsprogs", "zstd", "kmod"} <= set(recipe.packages)


def test_all_shipped_guests_keep_their_network_drivers() -> None:
    for name in recipe_names(recipes_folder()):
        recipe = read_recipe(recipes_folder(), name)
        if isinstance(recipe, RootRecipe):
            cut = {folder for cut in recipe.cut for folder in cut.drivers}
            assert not cut & {
                "drivers/net",
                "drivers/net/ethernet",
                "drivers/nvme",
                "drivers/virtio",
                "drivers/block",
                "drivers/acpi",
            }


def test_recipe_adds_to_the_lists_of_its_base(tmp_path: Path) -> None:
    above = 'base = "one"\ndescription = "e"\npackages = ["qq"]\nmemory = "1G"\n[[cut]]\nreason = "r"\n'
    folder = write_all(tmp_path, one=ROOT + '[[cut]]\nreason = "q"\n', two=above, three='base = "two"\n')
    recipe = read_recipe(folder, "three")
    assert isinstance(recipe, RootRecipe)
    assert recipe.packages == ["pp", "qq"]
    assert [cut.reason for cut in recipe.cut] == ["q", "r"]
    assert (recipe.description, Size.parse(recipe.memory), recipe.disk) == ("e", Size.parse("1G"), "512M")
    assert [layer.name for layer in recipe_layers(folder, "three")] == ["one", "two", "three"]
    assert isinstance(read_recipe(folder, "one"), RootRecipe)


def test_recipe_that_is_based_on_itself_is_an_error(tmp_path: Path) -> None:
    folder = write_all(tmp_path, one=ROOT + 'base = "two"\n', two='base = "one"\n')
    with pytest.raises(ImageError, match="base: one is based on this recipe"):
        read_recipe(folder, "one")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('base = "other"\n', "base: 'other' is not a recipe"),
        ('base = "../one"\n', "is not a recipe"),
        ("base = 1\n", "is not a recipe"),
        ('[[cut]]\nunits = ["a.service"]\n', "cut.0.reason"),
        ('[[cut]]\nreason = "r"\nfiles = ["/etc/passwd"]\n', "cut.0.files.0"),
        ('[[cut]]\nreason = "r"\nfiles = ["usr/../../etc/passwd"]\n', "cut.0.files.0"),
        ('[[cut]]\nreason = "r"\nunits = ["../a.service"]\n', "cut.0.units.0"),
        ('[[cut]]\nreason = "r"\nblacklist = ["a\\nb"]\n', "cut.0.blacklist.0"),
        ('ready = "soon"\n', "ready"),
        ('enable = ["--root=/"]\n', "enable.0"),
    ],
)
def test_invalid_root_recipe_names_the_field(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_recipe(write(tmp_path, ROOT + more), "one")


@pytest.mark.parametrize("package", ["p,q", "--help", "a b", "P", ""])
def test_package_names_are_checked(tmp_path: Path, package: str) -> None:
    with pytest.raises(ImageError, match="packages.0"):
        read_recipe(write(tmp_path, GOOD.replace('"pp"', f'"{package}"')), "one")


def test_kind_of_a_recipe_is_explicit(tmp_path: Path) -> None:
    assert type(read_recipe(write(tmp_path, GOOD), "one")) is Recipe
    (tmp_path / "one/image.toml").write_text(GOOD + 'disk = "512M"\n')
    with pytest.raises(ImageError, match="disk"):
        read_recipe(tmp_path, "one")
