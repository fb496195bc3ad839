"""A lab host, as the fixture `nohype_lab` gives it to tests."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import LabError
from orchestrator.lab.files import packed, receive, send
from orchestrator.lab.lab import Lab, execute
from orchestrator.lab.spec import LabSpec
from orchestrator.ssh import Completed

_TIMEOUT = 600.0


class LabServer:
    """``lab`` is used with one connection (`keeping_connection`). Methods raise LabLost if the lab was lost."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @property
    def name(self) -> str:
        return self.lab.name

    @property
    def spec(self) -> LabSpec:
        return self.lab.state.spec

    @property
    def accel(self) -> str:
        """``kvm``, or ``tcg`` for emulation, which is ten to twenty times slower."""
        return self.lab.state.accel

    def run(self, *argv: str, timeout: float = _TIMEOUT, input: bytes | IO[bytes] = b"", check: bool = True) -> Completed:
        """Runs a command as root: several arguments are words, a single one is a line of shell.

        Raises LabError with the output for a status other than 0, unless ``check`` is false, and ShellTimeout.
        """
        done = execute(self.lab, argv[0] if len(argv) == 1 else argv, timeout=timeout, input=input)
        if check and done.status:
            output = (done.stderr or done.stdout).strip()[-2000:]
            raise LabError(f"{' '.join(argv)!r} in lab {self.name} exited with status {done.status}: {output}")
        return done

    def copy(self, source: str | Path, target: str) -> None:
        """Copies a file to a file name, or what is in a folder into a folder, which is created."""
        path = Path(source)
        if path.is_dir():
            with packed(path) as archive:
                send(self.lab, archive, target)
            return
        if not path.is_file():
            raise LabError(f"{path} is neither a file nor a folder", "give a file or a folder that exists")
        part = shlex.quote(f"{target}.new")
        line = f"cat > {part} && chmod {path.stat().st_mode & 0o777:o} {part} && mv -T {part} {shlex.quote(target)}"
        with path.open("rb") as file:
            done = execute(self.lab, line, timeout=_TIMEOUT, input=file)
        if done.status:
            raise LabError(f"cannot write {target} in lab {self.name}: {done.stderr.strip()[-500:]}")

    def fetch(self, source: str, target: str | Path) -> None:
        """Copies a file or a folder of the lab host into a folder of this machine."""
        receive(self.lab, source, Path(target))

    def survey(self) -> dict[str, Any]:
        """What the manager on the lab host finds there: CPUs, NUMA nodes, huge pages, NICs, disks (`nohype survey --json`)."""
        found: dict[str, Any] = json.loads(self.run("nohype", "survey", "--json").stdout)
        return found
