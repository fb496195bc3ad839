"""Recipes of guest images: folders with ``image.toml`` and the files that it names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import ImageError, NotFound
from orchestrator.images.description import Bios, Readiness
from orchestrator.model.fields import SizeField, describe
from orchestrator.model.target import Transport

SHIPPED = Path("/usr/share/nohype/guest-images")
"""The recipes of an installed host, where the host role of ansible/ puts them."""

OVERLAY = "overlay"
"""Folder of a recipe whose files are copied into the root."""

_FILE = "image.toml"

_Package = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@:\\-]*$")]


def _inside(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError("expected a path relative to the root, without `..`")
    return path


_Glob = Annotated[str, AfterValidator(_inside)]  # wildcards are allowed


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Cut(_Part):
    """What an image leaves out of Debian, and why."""

    reason: str = Field(min_length=1)
    units: list[_Word] = []  # of systemd: masked
    generators: list[_Word] = []  # of systemd: masked
    blacklist: list[_Word] = []  # kernel modules that no device loads
    drivers: list[_Glob] = []  # folders of kernel modules, removed except for modules that others need
    files: list[_Glob] = []  # removed


class _Common(_Part):
    description: str
    packages: list[_Package] = Field(min_length=1)
    modules: list[str]  # for the initramfs; dependencies are added
    init: _FileName  # file of the recipe that becomes /init
    cmdline: str
    memory: SizeField  # minimum of a guest
    console: str | None = None  # protocol that the init speaks on the console
    tools: list[Literal["disengage", "exits"]] = []  # programs of `images.tools`, for /bin or /usr/lib/nohype


class Recipe(_Common):
    """An image whose root is an initramfs of busybox, modules and one init."""

    kind: Literal["initramfs"] = "initramfs"
    bios: Bios = "seabios"


class RootRecipe(_Common):
    """An image whose root is a Debian system, on the guest's disk or in its memory.

    A recipe with a base adds to the base's lists, and replaces its other fields. Files of the base's folder come first.
    """

    kind: Literal["debian"]
    base: _FileName | None = None
    modules: list[_Word]  # of the initramfs that mounts the disk
    programs: list[_Glob] = []  # of the root, for the initramfs
    enable: list[_Word] = []  # units
    cut: list[Cut] = []
    disk: SizeField  # size of the file system, which grows to the size of the guest's disk
    ram: bool = True  # whether the image can boot without a disk
    ready: Readiness | None = None
    configuration: list[Literal["credentials", "cloud-init"]] = []
    network_root: list[Annotated[Transport, Field(strict=False)]] = []  # of network disks that the init can mount


def recipes_folder() -> Path:
    """The recipes of the source tree; for an installed package those of the host."""
    of_tree = Path(__file__).parents[2] / "guest-images"
    return of_tree if of_tree.is_dir() else SHIPPED


def recipe_names(recipes: Path) -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in recipes.glob(f"*/{_FILE}")))


def read_recipe(recipes: Path, name: str) -> Recipe | RootRecipe:
    names = recipe_names(recipes)
    if name not in names:
        available = f"available: {', '.join(names) or 'none'}"
        raise NotFound(f"no recipe {name!r} in {recipes}; {available}", "use --recipes DIR for another folder of recipes")
    layers = recipe_layers(recipes, name)
    file = layers[-1] / _FILE
    fields: dict[str, Any] = {}
    for layer in layers:
        fields = _merge(fields, _load(layer / _FILE))
    try:
        recipe = (RootRecipe if fields.get("kind") == "debian" else Recipe).model_validate(fields)
    except ValidationError as error:
        raise ImageError(f"invalid recipe {file}: {describe(error).removeprefix(': ')}") from None
    if find_file(layers, recipe.init) is None:
        raise ImageError(f"invalid recipe {file}: init: {layers[-1] / recipe.init} does not exist")
    return recipe


def recipe_layers(recipes: Path, name: str) -> tuple[Path, ...]:
    """The folder of a recipe, after those of the recipes that it is based on."""
    layers: list[Path] = [recipes / name]
    while (base := _load(layers[-1] / _FILE).get("base")) is not None:
        file = layers[-1] / _FILE
        if not isinstance(base, str) or base not in recipe_names(recipes):
            raise ImageError(f"invalid recipe {file}: base: {base!r} is not a recipe in {recipes}")
        if recipes / base in layers:
            raise ImageError(f"invalid recipe {file}: base: {base} is based on this recipe")
        layers.append(recipes / base)
    return tuple(reversed(layers))


def find_file(layers: tuple[Path, ...], name: str) -> Path | None:
    """The file of the last layer that has it."""
    return next((layer / name for layer in reversed(layers) if (layer / name).is_file()), None)


def _load(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ImageError(f"cannot read {file}: {error}") from None


def _merge(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**base, **fields}
    for key, value in base.items():
        if isinstance(value, list) and isinstance(fields.get(key), list):
            merged[key] = [*value, *fields[key]]
    return merged
