"""The small programs of guest images, which `programs.py` beside the recipes writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import run

DISENGAGE = "disengage"
"""Tells the host that the guest's boot is over."""


def tools_source(recipes: Path) -> Path:
    return recipes / "programs.py"


def build_tools(recipes: Path, names: Sequence[str], folder: Path) -> None:
    """Writes the programs into an existing folder, executable. Raises ImageError."""
    source = tools_source(recipes)
    for name in names:
        if not source.is_file():
            raise ImageError(f"the recipe has tools, but {source} does not exist", "copy it from the folder guest-images")
        try:
            run([sys.executable, "-I", source, name, folder / name])
        except CommandError as error:
            raise ImageError(f"{source} cannot write {name}: {error.message}", error.hint) from None
        (folder / name).chmod(0o755)
