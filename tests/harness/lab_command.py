"""Runs `nohype` on the lab host through `fork_server`: a command then takes a tenth of the time."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import time
from pathlib import Path

from orchestrator.lab import lab as labs
from orchestrator.lab.lab import Lab, build_ssh
from orchestrator.ssh import Completed

SERVER = Path(__file__).with_name("fork_server.py")


class LabCommand:
    """A server process on the lab host, started by the first command, and again after a failure."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, words: list[str], timeout: float) -> Completed:
        """Raises LabLost if the lab does not respond, and TimeoutError if the command took too long."""
        process = self._process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps(words).encode() + b"\n")
            return Completed(*json.loads(_read_line(process, timeout)))
        except (OSError, ValueError) as error:
            self.close()
            labs.execute(self._lab, "true")
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"`nohype {shlex.join(words)}` timed out after {timeout:g} s") from None
            raise

    def close(self) -> None:
        """Stops the server. A command that it runs goes on."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        words = ["/opt/nohype/bin/python", "-c", SERVER.read_text()]
        argv = [*build_ssh(self._lab), shlex.join(words)]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def _read_line(process: subprocess.Popen[bytes], timeout: float) -> bytes:
    assert process.stdout
    deadline, line = time.monotonic() + timeout, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        data = os.read(process.stdout.fileno(), 1 << 20)
        if not data:
            raise ConnectionResetError("the server of commands on the lab host exited")
        line += data
    return line
