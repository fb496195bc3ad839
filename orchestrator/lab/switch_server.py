"""An SSH server that shows the switch of a lab to the manager in the lab, and lets it set hairpin: as a real switch does.

It runs on this machine as root, and root in the lab has its key: it runs only the programs and words listed here, never a shell.
Usage: python -m orchestrator.lab.switch_server NETNS LISTENER HOST_KEY CLIENT_KEY, where LISTENER is an inherited descriptor of
a listening socket, HOST_KEY the file of the private key, and CLIENT_KEY the public key that may log in.
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
from pathlib import Path

from orchestrator.errors import CommandError
from orchestrator.host.run import run
from orchestrator.ssh import Completed
from orchestrator.ssh.server import serve

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}"
_ALLOWED = (
    rf"ip( -[jds])* link show( type (bridge|vlan)| (master|dev) {_NAME})?",
    rf"bridge( -[jds])* (fdb show br|vlan show dev|link show dev) {_NAME}",
    r"bridge -j vlan show",
    rf"bridge link set dev {_NAME} hairpin (on|off)",
)
_COMMAND = re.compile("|".join(f"(?:{one})" for one in _ALLOWED), re.ASCII)
_SECONDS = 10.0


def parse_command(line: str) -> list[str] | None:
    """The words of a command that the server runs; None for any other line."""
    try:
        words = shlex.split(line)
    except ValueError:
        return None
    return words if _COMMAND.fullmatch(" ".join(words)) and all(" " not in word for word in words) else None


def run_command(netns: str, line: str) -> Completed:
    """In the network namespace of the switch."""
    words = parse_command(line)
    if words is None:
        return Completed(126, "", "the switch of a lab does not run this command\n")
    try:
        done = run(["nsenter", f"--net=/run/netns/{netns}", *words], timeout=_SECONDS, check=False)
    except CommandError as error:
        return Completed(127, "", f"{error.message}\n")
    return Completed(done.status, done.stdout, done.stderr)


def main() -> None:
    netns, descriptor, key, client = sys.argv[1:]
    serve(socket.socket(fileno=int(descriptor)), Path(key), client, lambda line: run_command(netns, line))


if __name__ == "__main__":
    main()
