"""`nohype image import`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from orchestrator.cli.folder import Folder
from orchestrator.cli.image_installed import config_option, report_installed
from orchestrator.cli.output import json_option, printable
from orchestrator.cli.progress import show_progress
from orchestrator.errors import ImageError
from orchestrator.images.description import Readiness
from orchestrator.images.imported import CMDLINE, MAX_SIZE, ImportRequest, import_image
from orchestrator.images.store import STORE
from orchestrator.values import Size

_FILE = click.Path(path_type=Path)
_READY = ("notify", "cloud-init", "ssh")
_CONFIGURATION = ("credentials", "cloud-init")


@click.command("import")
@click.argument("name")
@click.argument("file", type=_FILE, required=False)
@click.option("--kernel", type=_FILE, help="Kernel (vmlinuz) for direct boot.  [default: the newest in FILE]")
@click.option(
    "--initrd", type=_FILE, help="Its initramfs; without FILE it is the whole root.  [default: that of the kernel in FILE]"
)
@click.option("--cmdline", metavar="WORDS", help=f"Kernel command line; root= is added if it is missing.  [default: {CMDLINE}]")
@click.option(
    "--format",
    "kind",
    type=click.Choice(("raw", "qcow2")),
    help="Format of FILE.  [default: qcow2 if it starts as one, otherwise raw]",
)
@click.option("--sha256", metavar="HEX", help="Refuse FILE if it has another SHA-256.")
@click.option(
    "--boot", type=click.Choice(("direct", "firmware")),
    help="How guests boot: with a kernel from outside, or from their disk by SeaBIOS.  [default: direct if possible]",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", help="Minimum memory of a guest.  [default: 512M, or by the size of the initramfs]")
@click.option("--ready", type=click.Choice(_READY), help="How guests report ready.  [default: cloud-init if FILE has it]")
@click.option(
    "--configuration", type=click.Choice(_CONFIGURATION), multiple=True,
    help="How guests can be configured (repeatable).  [default: cloud-init if FILE has it]",
)  # fmt: skip
@click.option("--max-size", metavar="SIZE", default=str(MAX_SIZE), show_default=True, help="Refuse a larger disk.")
@click.option("--output", type=Folder(), default=STORE, show_default=True, help="Image store.")
@config_option
@json_option
def import_command(
    name: str,
    *,
    file: Path | None,
    kernel: Path | None,
    initrd: Path | None,
    cmdline: str | None,
    kind: Literal["raw", "qcow2"] | None,
    sha256: str | None,
    boot: Literal["direct", "firmware"] | None,
    memory: str | None,
    ready: Readiness | None,
    configuration: tuple[Literal["credentials", "cloud-init"], ...],
    max_size: str,
    output: Path,
    config: Path,
    as_json: bool,
) -> None:
    """Import a disk image or a kernel as the guest image NAME.

    FILE is a raw or qcow2 image of a disk. Without FILE, --initrd is the whole root file system.

    Kernel and initramfs are copied out of FILE, if its root file system is ext4. Otherwise its guests boot with their firmware.
    FILE is read by programs without privileges, and is never mounted. Requires root.
    """
    if os.geteuid():
        raise ImageError("cannot import a guest image: root is required (mount namespaces)", "run as root (sudo)")
    request = ImportRequest(
        name, file, kernel, initrd, kind, sha256, boot, cmdline,
        Size.parse(memory) if memory else None, ready, configuration or None, Size.parse(max_size),
    )  # fmt: skip
    with show_progress() as timeline, timeline.stage(f"image {name}"):
        image = import_image(output, request, progress=lambda text: timeline.note(printable(text)))
    report_installed(image, output, config, as_json=as_json)
    if not as_json and image.provenance:
        click.echo(f"  {image.provenance.source}")
