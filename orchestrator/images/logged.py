"""Runs the long programs of a build. Their output goes to a log file; an error shows its last lines, not the arguments."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import format_tail, run
from orchestrator.images import without_sync

_WITHOUT_SYNC = (sys.executable, "-I", "-S", without_sync.__file__)


def run_logged(
    argv: Sequence[str | Path], *, task: str, program: str, log: Path, timeout: float, env: Mapping[str, str] | None = None
) -> None:
    """Runs a program, which need not wait for the disk, and raises ImageError if it fails.

    ``task`` starts the message ("cannot build the wheels"); ``program`` names the program, as argv may start with wrappers.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    wrapper = _WITHOUT_SYNC if shutil.which(argv[0]) else ()  # `run` reports a program that is not installed
    try:
        status = run([*wrapper, *argv], timeout=timeout, log=log, env=env, check=False).status
    except CommandError as error:  # not installed, or timed out
        raise ImageError(f"{task}: {error.message}", error.hint) from None
    if status:
        tail = format_tail(log.read_text(errors="replace"))
        raise ImageError(f"{task}: {program} exited with status {status}{tail}", f"see the whole output in {log}")
