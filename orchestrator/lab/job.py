"""Runs one command in a lab of its own: for CI jobs, which want an exit status and files, and nothing left."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.errors import RequestError
from orchestrator.images.added_packages import check_package_names
from orchestrator.images.cache import cache_folder
from orchestrator.lab import control
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.files import packed, receive_changed, send
from orchestrator.lab.lab import Lab, execute, keeping_connection
from orchestrator.lab.progress import Timeline
from orchestrator.lab.spec import LabSpec
from orchestrator.lab.start import attached_lab
from orchestrator.ssh import ShellTimeout, Stream

FOLDER = "/srv/job"
TIMED_OUT = 124
"""Exit status of a command that was stopped, as of timeout(1)."""
_NAME = re.compile(r"run-[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True)
class Server:
    """The emulated server of a job."""

    spec: LabSpec
    accel: AccelChoice
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """``folder`` is copied to ``remote`` before the command, and its changed and new files to ``output`` afterwards."""

    folder: Path
    output: Path
    remote: str = FOLDER  # in the lab; the working directory of the command


@contextmanager
def job_lab(server: Server, timeline: Timeline) -> Iterator[Lab]:
    """A lab with a new name. It ends with this process; also removes what killed jobs have left."""
    packages = check_package_names(server.packages)
    control.check_name_available(name := f"run-{secrets.token_hex(4)}")
    control.remove_dead(_NAME, timeline.note)
    timeline.note(f"the lab of this job: {name}")
    with attached_lab(name, server.spec, server.accel, timeline, packages=packages) as lab:
        yield lab


def run_job(
    start: AbstractContextManager[Lab],
    command: str,
    timeline: Timeline,
    *,
    files: Files | None,
    timeout: float,
    input: bytes | IO[bytes],
    stream: Stream,
) -> int:
    """Runs a line of shell; returns its exit status, or TIMED_OUT after ``timeout`` seconds. Files are copied back in any case.

    ``start`` is the lab, as of `job_lab`; it is entered once the files are read. Raises LabError, or LabLost if the lab was lost.
    """
    with ExitStack() as stack:
        archive = stack.enter_context(_packed(files, timeline)) if files else None
        lab = stack.enter_context(keeping_connection(stack.enter_context(start)))
        if files and archive:
            with timeline.stage("files to the lab"):
                send(lab, archive, files.remote)
            command = f"cd {shlex.quote(files.remote)} || exit\n{command}"
        timeline.pause()
        try:
            status = execute(lab, command, timeout=timeout, input=input, stream=stream).status
        except ShellTimeout:
            timeline.note(f"the command was stopped after {timeout:g} s")
            status = TIMED_OUT
        if files:
            with timeline.stage("files from the lab"):
                count = receive_changed(lab, files.remote, files.output)
            timeline.note(f"{count} changed or new files were copied to {files.output}")
        return status


@contextmanager
def _packed(files: Files, timeline: Timeline) -> Iterator[IO[bytes]]:
    """Without the cache of images, which the lab does not use and which is larger than what fits."""
    _check(files)
    cache = cache_folder().resolve()
    if cache.is_dir() and files.folder.resolve() in cache.parents:
        timeline.note(f"{cache} is not copied: it is the cache of images")
    with packed(files.folder, without=cache) as archive:
        yield archive


def _check(files: Files) -> None:
    if not files.folder.is_dir():
        raise RequestError(f"{files.folder} is not a directory", "give a directory that exists")
    if files.output.exists() and not files.output.is_dir():
        raise RequestError(f"{files.output} is not a directory", "give a directory, or the name of a new one")
