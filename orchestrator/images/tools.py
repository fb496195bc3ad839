"""The small programs of guest images, which `programs.py` beside the recipes writes, or that of this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import run
from orchestrator.images.recipe import recipes_folder

DISENGAGE = "disengage"
"""Tells the host that the guest's boot is over."""

_SOURCE = "programs.py"


def tools_source(recipes: Path) -> Path:
    """A folder with recipes of one's own need not have a copy."""
    own = recipes / _SOURCE
    return own if own.is_file() else recipes_folder() / _SOURCE


def build_tools(recipes: Path, names: Sequence[str], folder: Path) -> None:
    """Writes the programs into an existing folder, executable. Raises ImageError."""
    source = tools_source(recipes)
    for name in names:
        try:
            run([sys.executable, "-I", source, name, folder / name])
        except CommandError as error:
            raise ImageError(f"{source} cannot write {name}: {error.message}", error.hint) from None
        (folder / name).chmod(0o755)
