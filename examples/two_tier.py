#!/usr/bin/env python3
"""Starts a service of two guests, a front end that asks a back end, and asks it over the network.

Each frame between the guests leaves the host, and the external switch returns it. Example, on a host with the image debian:

    examples/two_tier.py --network 10.9.0.0/24
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.values import DEFAULT_SOCKET

ANSWER = r"""printf 'HTTP/1.0 200 OK\r\n\r\n'; """
BACK = ANSWER + "echo \"back end $(hostname), up $(cut -d' ' -f1 /proc/uptime) s\""
FRONT = ANSWER + "echo \"front end $(hostname) asked:\"; exec 3<>/dev/tcp/%s/8080; printf 'GET /\\r\\n\\r\\n' >&3; tail -n 1 <&3"
ASK = "exec 3<>/dev/tcp/%s/8080; printf 'GET /\\r\\n\\r\\n' >&3; cat <&3"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", default="debian")
    parser.add_argument("--memory", default="768M")
    parser.add_argument("--network", type=ipaddress.ip_network, required=True, help="the guests get its addresses 70 and 71")
    parser.add_argument("--keep", action="store_true", help="do not delete the guests")
    options = parser.parse_args()
    client = Client(Path(os.environ.get("NOHYPE_SOCKET", DEFAULT_SOCKET)))
    addresses = {"back": options.network[70], "front": options.network[71]}
    created: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = key.with_suffix(".pub").read_text().strip()
        try:
            for name, address in addresses.items():
                request = {"name": name, "image": options.image, "memory": options.memory, "ssh_keys": [public]}
                client.create({**request, "address": f"{address}/{options.network.prefixlen}"})
                created.append(name)
            for name in addresses:
                client.wait_ready(name, 600)
            serve(key, "back", BACK)
            serve(key, "front", FRONT % addresses["back"])
            # From the back end, so that this machine need not reach the network of the service.
            print(run(key, "back", ASK % addresses["front"]).split("\r\n\r\n", 1)[1], end="")
        finally:
            for name in created if not options.keep else ():
                client.delete(name)


def serve(key: Path, guest: str, script: str) -> None:
    """Executes the script for each connection to port 8080."""
    words = ["systemd-run", "--quiet", "systemd-socket-activate", "--listen=8080", "--accept", "--inetd", "bash", "-c"]
    subprocess.run([*login(key, guest), *words, f"read -r _; {script}"], check=True, stdin=subprocess.DEVNULL)
    run(key, guest, "until exec 3<>/dev/tcp/127.0.0.1/8080; do sleep 0.2; done 2>/dev/null")


def run(key: Path, guest: str, script: str) -> str:
    words = [*login(key, guest), "bash", "-c", script]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL).stdout


def login(key: Path, guest: str) -> list[str]:
    return ["nohype", "guest", "ssh", "--identity", str(key), guest, "--"]


if __name__ == "__main__":
    try:
        main()
    except (OrchestratorError, subprocess.CalledProcessError) as error:
        sys.exit(f"two_tier: {error}")
