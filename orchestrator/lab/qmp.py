"""QEMU's monitor protocol (docs/interop/qmp-spec): one command per connection."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import LabError

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s")


def ask(monitor: Path, command: str, *, arguments: Mapping[str, object] | None = None, timeout: float = 10) -> Any:
    """Executes one command; ``timeout`` is per response. The monitor serves one client at a time: others wait."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(monitor))
            with connection.makefile("rwb") as stream:
                stream.readline()  # the greeting
                _exchange(stream, "qmp_capabilities", {})
                return _exchange(stream, command, arguments or {})
    except (OSError, ValueError) as error:
        raise LabError(f"no response from QEMU's monitor {monitor} to {command}: {error}") from None


def ask_human(monitor: Path, line: str, *, timeout: float = 10) -> str:
    """Executes a line of the human monitor, for what QMP cannot do."""
    return str(ask(monitor, "human-monitor-command", arguments={"command-line": line}, timeout=timeout))


def read_ssh_port(monitor: Path) -> int:
    """The TCP port of this machine that QEMU forwards to the lab's SSH server."""
    # QMP has no command for it; the format of the human monitor's table has not changed since QEMU 0.12.
    table = ask_human(monitor, "info usernet")
    match = _FORWARD.search(table)
    if not match:
        raise LabError(f"QEMU forwards no TCP port; `info usernet`:\n{table}")
    return int(match[1])


def _exchange(stream: Any, command: str, arguments: Mapping[str, object]) -> Any:
    stream.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    stream.flush()
    while line := stream.readline():
        answer = json.loads(line)
        if "error" in answer:
            raise LabError(f"QEMU refused {command}: {answer['error'].get('desc', answer['error'])}")
        if "return" in answer:
            return answer["return"]
    raise ValueError("the connection was closed")
