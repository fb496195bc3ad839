#!/usr/bin/env python3
"""Runs a command in a new guest, brings back a file or folder and the exit status, and deletes the guest.

Example, on a NoHype host with the image debian:

    examples/ci_runner.py --address 10.9.0.50/24 --send src --fetch result -- sh -c 'make -C src test >result'
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from orchestrator.client import Client
from orchestrator.errors import NotFound, OrchestratorError
from orchestrator.values import DEFAULT_SOCKET


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for option, value in (("--name", f"job-{os.getpid()}"), ("--image", "debian"), ("--memory", "768M")):
        parser.add_argument(option, default=value, help=f"default: {value}")
    parser.add_argument("--address", required=True, help="address and prefix length of the guest's NIC")
    parser.add_argument("--send", help="file or folder that is copied to the home directory of the guest's root")
    parser.add_argument("--fetch", help="path in that directory that is copied here after the command")
    parser.add_argument("command", nargs="+")
    job = parser.parse_args()
    client = Client(Path(os.environ.get("NOHYPE_SOCKET", DEFAULT_SOCKET)))
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        request = {"name": job.name, "image": job.image, "memory": job.memory, "address": job.address}
        began = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        guest = client.create({**request, "ssh_keys": [key.with_suffix(".pub").read_text().strip()]})
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
            client.wait_ready(job.name, 300)
            report(f"guest {job.name} on CPUs {guest['cpus']} is ready", began)
            if job.send:
                nohype("copy", key, "--recursive", job.send, f"{job.name}:")
            status = nohype("ssh", key, job.name, "--", *job.command, check=False)
            report(f"the command exited with status {status}", began)
            if job.fetch:
                nohype("copy", key, "--recursive", f"{job.name}:{job.fetch}", ".")
        finally:
            client.delete(job.name)
    check_gone(client, job.name, [nic["address"] for nic in guest["nics"]])
    report("the guest is deleted, and nothing of it is left", began)
    return status


def nohype(command: str, key: Path, *words: str, check: bool = True) -> int:
    return subprocess.run(["nohype", "guest", command, "--identity", key, *words], check=check).returncode


def check_gone(client: Client, name: str, vfs: list[str]) -> None:
    try:
        raise SystemExit(f"guest {name} is left: {client.guest(name)['state']}")
    except NotFound:
        pass
    if found := [vf for pf in client.survey()["pfs"] for vf in pf["vfs"] if vf["address"] in vfs and vf["driver"] == "vfio-pci"]:
        raise SystemExit(f"virtual functions of guest {name} are left: {found}")


def report(text: str, began: float) -> None:
    print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ci_runner: ended by SIGTERM"))
    try:
        sys.exit(main())
    except (OrchestratorError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"ci_runner: {error}")
