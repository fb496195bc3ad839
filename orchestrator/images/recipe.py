"""Recipes of guest images: a folder with ``image.toml`` and the files that it names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import ImageError, NotFound
from orchestrator.model.request import as_value_error
from orchestrator.values import Size

SHIPPED = Path("/usr/share/nohype/guest-images")
"""Where an installed host has the recipes; the host role of ansible/ puts them there."""

_FILE = "image.toml"


def _size(text: str) -> str:
    return as_value_error(lambda: str(Size.parse(text)))


class Recipe(BaseModel):
    """How an image is made.

    Attributes:
        packages: Debian packages that hold its kernel and busybox.
        modules: kernel modules that go into its initramfs, with all they need.
        init: file in the recipe's folder that becomes /init.
        cmdline: words for the kernel command line.
        memory: the least that a guest of this image starts with ("96M").
        console: protocol that its init speaks on the console; None if it speaks none.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    description: str
    packages: list[str] = Field(min_length=1)
    modules: list[str]
    init: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    cmdline: str
    memory: Annotated[str, AfterValidator(_size)]
    console: str | None = None


def recipes_folder() -> Path:
    """The recipes of this source tree, or, for an installed package, the ones that the host role put on the host."""
    of_tree = Path(__file__).parents[2] / "guest-images"
    return of_tree if of_tree.is_dir() else SHIPPED


def recipe_names(recipes: Path) -> tuple[str, ...]:
    """The names of the recipes in a folder, sorted."""
    return tuple(sorted(path.parent.name for path in recipes.glob(f"*/{_FILE}")))


def read_recipe(recipes: Path, name: str) -> Recipe:
    """Reads a recipe.

    Raises:
        NotFound: there is no such recipe.
        ImageError: the recipe is wrong; with the place in the file.
    """
    names = recipe_names(recipes)
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there are none"
        raise NotFound(f"there is no recipe for a guest image {name!r} in {recipes}: {there}", "--recipes DIR takes others")
    file = recipes / name / _FILE
    try:
        recipe = Recipe.model_validate(tomllib.loads(file.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ImageError(f"cannot read {file}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ImageError(f"{file} is wrong: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not (file.parent / recipe.init).is_file():
        raise ImageError(f"{file} names {recipe.init} as init, but {file.parent} has no such file")
    return recipe
