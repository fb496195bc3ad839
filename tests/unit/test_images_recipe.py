"""Recipes of guest images."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ImageError, NotFound
from orchestrator.images.recipe import read_recipe, recipe_names, recipes_folder

GOOD = 'description = "d"\npackages = ["p"]\nmodules = []\ninit = "init"\ncmdline = "quiet"\nmemory = "96M"\n'


def write(folder: Path, text: str) -> Path:
    (folder / "one").mkdir()
    (folder / "one/image.toml").write_text(text)
    (folder / "one/init").write_text("#!/bin/sh\n")
    return folder


def test_shipped_recipe_is_valid() -> None:
    assert "minimal" in recipe_names(recipes_folder())
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
        (GOOD.replace('["p"]', "[]"), "packages"),
        (GOOD.replace('"quiet"', "1"), "cmdline"),
        (GOOD.replace('"96M"', '"much"'), "memory"),
        (GOOD.replace('"init"', '"../init"'), "init"),
        (GOOD.replace('"init"', '"other"'), "other"),
    ],
)
def test_invalid_recipe_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_recipe(write(tmp_path, text), "one")
