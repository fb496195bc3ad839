"""`nohype image`: builds and lists guest images, without the manager."""

from __future__ import annotations

import os
from pathlib import Path

import click

from orchestrator.cli.output import json_option, print_json, print_table
from orchestrator.cli.progress import show_progress
from orchestrator.errors import ImageError
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.install import install_image
from orchestrator.images.recipe import recipe_names, recipes_folder
from orchestrator.images.store import STORE, list_images

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def image() -> None:
    """Build and list guest images.

    Run it on the host of the guests: its manager starts guests from the images in the store.
    """


@image.command()
@click.argument("name")
@click.option(
    "--output", type=_FOLDER, default=STORE, show_default=True, help="Image store; the image becomes the folder NAME in it."
)
@click.option("--recipes", type=_FOLDER, help="Folder of recipes. [default: guest-images of the source tree or of the host]")
@json_option
def build(name: str, *, output: Path, recipes: Path | None, as_json: bool) -> None:
    """Build the guest image NAME from its recipe.

    Uses the cache if nothing has changed. Requires root. The first build downloads packages with the settings of this machine's
    apt.
    """
    if os.geteuid():
        raise ImageError("cannot build a guest image: root is required (mmdebstrap)", "run as root (sudo)")
    with show_progress() as timeline, timeline.stage(f"image {name}"):
        built = build_image(recipes or recipes_folder(), name, cache_folder(), progress=timeline.note)
        installed = install_image(built, output, name)
    if as_json:
        print_json(installed.to_json())
    else:
        click.echo(f"guest image {name}: kernel {installed.kernel_version}, in {output / name}")


@image.command("list")
@click.option("--store", type=_FOLDER, default=STORE, show_default=True, help="Store to list.")
@json_option
def list_command(*, store: Path, as_json: bool) -> None:
    """List the guest images in the store."""
    images, damaged = list_images(store)
    for error in damaged:
        click.echo(str(error), err=True)
    if as_json:
        print_json([image.to_json() for image in images])
    elif images:
        rows = [(image.name, image.kernel_version, image.console or "-", image.hash) for image in images]
        print_table([("NAME", "KERNEL", "CONSOLE", "HASH"), *rows])
    else:
        recipes = ", ".join(recipe_names(recipes_folder())) or "none"
        click.echo(f"no guest images in {store}; recipes: {recipes}")
