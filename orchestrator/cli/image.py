"""`nohype image`: builds guest images and manages the host's store of them, without the manager."""

from __future__ import annotations

import os
from pathlib import Path

import click

from orchestrator.cli.folder import Folder
from orchestrator.cli.image_import import import_command
from orchestrator.cli.image_installed import config_option, report_installed
from orchestrator.cli.image_show import build_document, format_image
from orchestrator.cli.image_users import read_users
from orchestrator.cli.output import json_option, print_json, print_table, printable
from orchestrator.cli.progress import show_progress
from orchestrator.errors import ImageError, OrchestratorError
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.install import collect, delete_image, find_unused, install_image
from orchestrator.images.recipe import recipe_names, recipes_folder
from orchestrator.images.store import STORE, find_image, link_target, list_images
from orchestrator.images.verify import verify as verify_image

_FOLDER = Folder()

store_option = click.option("--store", type=_FOLDER, default=STORE, show_default=True, help="Image store.")


@click.group()
def image() -> None:
    """Build, import, inspect and delete guest images.

    Run it on the host of the guests: its manager starts guests from the images in the store. A guest keeps the build that it was
    created with when its image is built again; builds that no image and no guest uses are removed.
    """


image.add_command(import_command)


@image.command()
@click.argument("name")
@click.option(
    "--output", type=_FOLDER, default=STORE, show_default=True, help="Image store; the image becomes the entry NAME in it."
)
@click.option("--recipes", type=_FOLDER, help="Folder of recipes. [default: guest-images of the source tree or of the host]")
@click.option(
    "--lock", type=click.Path(path_type=Path), metavar="FILE",
    help="Build without network from exactly the packages of FILE, the `packages.lock` of an earlier build.",
)  # fmt: skip
@click.option(
    "--update", is_flag=True, help="Build again, with the packages that the archive has now, although the recipe is the same."
)
@config_option
@json_option
def build(name: str, *, output: Path, recipes: Path | None, lock: Path | None, update: bool, config: Path, as_json: bool) -> None:
    """Build the guest image NAME from its recipe.

    Uses the cache if nothing has changed. Requires root. The first build downloads packages with the settings of this machine's
    apt, and keeps them: with --lock the same image can be built again, byte by byte, although the archive has newer packages.
    """
    if lock and update:
        raise click.UsageError("--lock and --update exclude each other")
    if os.geteuid():
        raise ImageError("cannot build a guest image: root is required (mmdebstrap)", "run as root (sudo)")
    with show_progress() as timeline, timeline.stage(f"image {name}"):
        built = build_image(recipes or recipes_folder(), name, cache_folder(), lock=lock, renew=update, progress=timeline.note)
        installed = install_image(built, output, name)
    report_installed(installed, output, config, as_json=as_json)


@image.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the image. [default: the name of the folder]")
@store_option
@config_option
@json_option
def install(folder: Path, *, name: str | None, store: Path, config: Path, as_json: bool) -> None:
    """Install a build that was copied from another host.

    FOLDER contains `image.json`. Its files must be those that `image.json` describes.
    """
    name = name or folder.absolute().name
    before = link_target(store / name)
    installed = install_image(folder, store, name)
    report_installed(installed, store, config, as_json=as_json, is_new=before != installed.folder.name)


@image.command("list")
@store_option
@json_option
@click.pass_context
def list_command(ctx: click.Context, *, store: Path, as_json: bool) -> None:
    """List the guest images in the store.

    Exit status 1 if one is damaged; the others are listed.
    """
    images, damaged = list_images(store)
    for error in damaged:
        click.echo(printable(f"nohype: {error}"), err=True)
    if as_json:
        print_json([image.to_json() for image in images])
    elif images:
        rows = [
            (
                image.name,
                image.kernel_version or "-",
                image.boot,
                "yes" if image.disk else "-",
                image.ready or "-",
                image.hash[:12],
            )
            for image in images
        ]
        print_table([("NAME", "KERNEL", "BOOT", "DISK", "READY", "HASH"), *rows])
    elif not damaged:
        recipes = ", ".join(recipe_names(recipes_folder())) or "none"
        click.echo(f"no guest images in {store}; recipes: {recipes}")
    if damaged:
        ctx.exit(1)


@image.command()
@click.argument("name")
@store_option
@config_option
@json_option
def show(name: str, *, store: Path, config: Path, as_json: bool) -> None:
    """Show the image NAME and the guests that use it.

    Prints how it boots, the memory and disk that it needs, how its guests report ready, its files, and what it was built from.
    """
    found = find_image(store, name)
    try:
        users, unknown = tuple(user for user in read_users(config) if user[1].name == name), ""
    except OrchestratorError as error:
        users, unknown = None, error.message
    if as_json:
        print_json(build_document(found, users))
    else:
        click.echo(printable(format_image(found, users, unknown)))


@image.command()
@click.argument("name")
@store_option
@json_option
@click.pass_context
def verify(ctx: click.Context, name: str, *, store: Path, as_json: bool) -> None:
    """Compare the files of the image NAME with their hashes.

    Reads all files. The hashes were recorded when the image was installed. Exit status 1 if a file has changed, or if no hash was
    recorded.
    """
    found = find_image(store, name)
    results = verify_image(found)
    failed = [result for result in results if result.problem]
    if as_json:
        files = [{"file": result.file, "problem": result.problem or None} for result in results]
        print_json({"name": name, "hash": found.hash, "verified": not failed, "files": files})
    else:
        print_table([("FILE", "RESULT"), *((result.file, result.problem or "ok") for result in results)])
        if failed:
            click.echo(f"image {name}: {len(failed)} of {len(results)} files are not verified; install it again")
    if failed:
        ctx.exit(1)


@image.command()
@click.argument("name")
@store_option
@config_option
@json_option
def delete(name: str, *, store: Path, config: Path, as_json: bool) -> None:
    """Delete the image NAME and its builds.

    Refused if guests were created from it.
    """
    removed = delete_image(store, name, lambda: read_users(config))
    if as_json:
        print_json({"name": name, "removed": removed})
    else:
        click.echo(f"guest image {name} deleted; builds removed: {len(removed)}")


@image.command()
@store_option
@config_option
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@json_option
def gc(*, store: Path, config: Path, dry_run: bool, as_json: bool) -> None:
    """Remove builds that no image and no guest uses.

    Also removes what interrupted installations left. Removes nothing if the guests of this host cannot be read.
    """
    removed = find_unused(store, read_users(config)) if dry_run else collect(store, lambda: read_users(config))
    if as_json:
        print_json({"dry_run": dry_run, "removed": removed})
    else:
        for name in removed:
            click.echo(f"{'unused' if dry_run else 'removed'} build {name}")
        if not removed:
            click.echo("no unused builds")
