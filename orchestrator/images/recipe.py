"""Recipes of guest images: folders with ``image.toml`` and the files that it names."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import ImageError, NotFound
from orchestrator.model.fields import SizeField

SHIPPED = Path("/usr/share/nohype/guest-images")
"""The recipes of an installed host, where the host role of ansible/ puts them."""

_FILE = "image.toml"


class Recipe(BaseModel):
    """The build instructions of an image."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    description: str
    packages: list[str] = Field(min_length=1)  # with kernel and busybox
    modules: list[str]  # for the initramfs; dependencies are added
    init: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # file of the recipe that becomes /init
    cmdline: str
    memory: SizeField  # minimum of a guest
    console: str | None = None  # protocol that the init speaks on the console


def recipes_folder() -> Path:
    """The recipes of the source tree; for an installed package those of the host."""
    of_tree = Path(__file__).parents[2] / "guest-images"
    return of_tree if of_tree.is_dir() else SHIPPED


def recipe_names(recipes: Path) -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in recipes.glob(f"*/{_FILE}")))


def read_recipe(recipes: Path, name: str) -> Recipe:
    names = recipe_names(recipes)
    if name not in names:
        available = f"available: {', '.join(names) or 'none'}"
        raise NotFound(f"no recipe {name!r} in {recipes}; {available}", "use --recipes DIR for another folder of recipes")
    file = recipes / name / _FILE
    try:
        recipe = Recipe.model_validate(tomllib.loads(file.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ImageError(f"cannot read {file}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ImageError(f"invalid recipe {file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not (file.parent / recipe.init).is_file():
        raise ImageError(f"invalid recipe {file}: init: {file.parent / recipe.init} does not exist")
    return recipe
