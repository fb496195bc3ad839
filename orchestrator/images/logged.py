"""Long programs of a build: their output goes to a log file, and an error shows its end instead of a screen of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import run

_TAIL = 12


def run_logged(
    argv: Sequence[str | Path], *, task: str, program: str, log: Path, timeout: float, env: Mapping[str, str] | None = None
) -> None:
    """Runs a program that is part of a build.

    Args:
        task: what could not be done if it fails, as the beginning of the error: "cannot make the wheels".
        program: the program's name for people; argv may begin with wrappers.
        log: file that gets its output; emptied first.
        timeout: seconds.
        env: variables added to the inherited environment.

    Raises:
        ImageError: it failed; with the last lines of its output, and where the rest is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    try:
        status = run(argv, timeout=timeout, log=log, env=env, check=False).status
    except CommandError as error:  # not installed, or out of time: the error itself says all
        raise ImageError(f"{task}: {error.message}", error.hint) from None
    if status:
        lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL:]
        text = "".join(f"\n    {line}" for line in lines)
        raise ImageError(f"{task}: {program} ended with status {status}:{text}", f"the whole output is in {log}")
