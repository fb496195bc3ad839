#!/usr/bin/env python3
"""Starts a service of two guests, a front end that asks a back end, and asks it over the network.

Each frame between the guests leaves the host, and the external switch returns it. Example, on a host with the image debian:

    examples/two_tier.py --network 10.9.0.0/24
"""

import argparse
import ipaddress
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.values import DEFAULT_SOCKET

ANSWER = r"""printf 'HTTP/1.0 200 OK\r\n\r\n'; """
BACK = ANSWER + "echo \"back end $(hostname), up $(cut -d' ' -f1 /proc/uptime) s\""
FRONT = ANSWER + "echo \"front end $(hostname) asked:\"; exec 3<>/dev/tcp/%s/8080; printf 'GET /\\r\\n\\r\\n' >&3; tail -n 1 <&3"
ASK = "exec 3<>/dev/tcp/%s/8080; printf 'GET /\\r\\n\\r\\n' >&3; cat <&3"  # by the back end: this machine need not reach it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for option, value in (("--image", "debian"), ("--memory", "768M")):
        parser.add_argument(option, default=value, help=f"default: {value}")
    parser.add_argument("--network", type=ipaddress.ip_network, required=True, help="the guests get its addresses 70 and 71")
    parser.add_argument("--keep", action="store_true", help="do not delete the guests")
    options = parser.parse_args()
    client = Client(Path(os.environ.get("NOHYPE_SOCKET", DEFAULT_SOCKET)))
    addresses = {"back": options.network[70], "front": options.network[71]}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as created:
        key = Path(folder, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shared = {"image": options.image, "memory": options.memory, "ssh_keys": [key.with_suffix(".pub").read_text().strip()]}
        for name, address in addresses.items():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            client.create({**shared, "name": name, "address": f"{address}/{options.network.prefixlen}"})
            if not options.keep:
                created.callback(client.delete, name)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        for name in addresses:
            client.wait_ready(name, 600)
        serve(key, "back", BACK)
        serve(key, "front", FRONT % addresses["back"])
        answer = run(key, "back", ASK % addresses["front"])
        if "back end" not in answer:
            raise OrchestratorError(f"the front end did not answer for the back end: {answer!r}")
    print(answer.partition("\n\n")[2], end="")


def serve(key: Path, guest: str, script: str) -> None:
    """Executes the script for each request to port 8080, once it is read: unread data would reset the connection."""
    # systemd-run replaces ${NAME} in the words by variables of its own, so the script has none.
    words = ["systemd-run", "--quiet", "systemd-socket-activate", "--listen=8080", "--accept", "--inetd", "bash", "-c"]
    run(key, guest, shlex.join([*words, f"while read -r line && [ \"$line\" != $'\\r' ]; do :; done; {script}"]))
    run(key, guest, "until exec 3<>/dev/tcp/127.0.0.1/8080; do sleep 0.2; done 2>/dev/null")


def run(key: Path, guest: str, script: str) -> str:
    words = ["timeout", "60", "nohype", "guest", "ssh", "--identity", str(key), guest, "--", "bash", "-c", script]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OrchestratorError(f"a command in guest {guest} ended with status {done.returncode} (124: it took more than 60 s)")
    return done.stdout


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("two_tier: ended by SIGTERM"))
    try:
        main()
    except (OrchestratorError, OSError, IndexError, subprocess.CalledProcessError) as error:
        sys.exit(f"two_tier: {error}")
