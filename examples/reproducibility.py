#!/usr/bin/env python3
"""Measures a command in one guest alone and in several guests at the same time: does a neighbour change the result?

Writes reproducibility.png if matplotlib is installed. Example, on a NoHype host with the image debian:

    examples/reproducibility.py --guests 3 --network 10.9.0.0/24 -- sh -c 'head -c 200M /dev/zero | sha256sum'
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.values import DEFAULT_SOCKET


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for option, default in (("--guests", 2), ("--image", "debian"), ("--memory", "768M"), ("--repeat", 5)):
        parser.add_argument(option, type=type(default), default=default)
    parser.add_argument("--network", type=ipaddress.ip_network, required=True, help="the guests get its addresses from 60 on")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    client = Client(Path(os.environ.get("NOHYPE_SOCKET", DEFAULT_SOCKET)))
    names = [f"bench-{number}" for number in range(options.guests)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.guests) as pool:
        key = Path(folder, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        keys = [key.with_suffix(".pub").read_text().strip()]
        created: list[str] = []
        try:
            for number, name in enumerate(names):
                request = {"name": name, "image": options.image, "memory": options.memory, "ssh_keys": keys}
                client.create({**request, "address": f"{options.network[60 + number]}/{options.network.prefixlen}"})
                created.append(name)
            list(pool.map(lambda name: client.wait_ready(name, 600), names))
            alone = [measure(key, names[0], options.command) for _ in range(options.repeat)]
            together = [list(pool.map(lambda name: measure(key, name, options.command), names)) for _ in range(options.repeat)]
        finally:
            for name in created:
                client.delete(name)
    side_by_side = sum(together, [])
    for title, values in (("alone", alone), ("side by side", side_by_side)):
        print(f"{title:13} median {median(values):.3f} s  spread {(max(values) - min(values)) / median(values):.1%}")
    print(f"ratio         {median(side_by_side) / median(alone):.3f}")
    plot(alone, side_by_side)


def measure(key: Path, name: str, command: list[str]) -> float:
    line = f"TIMEFORMAT=%R; time {{ {shlex.join(command)} ; }} >/dev/null 2>&1"
    words = ["nohype", "guest", "ssh", "--identity", str(key), name, "--", "bash", "-c", line]
    return float(subprocess.run(words, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr)


def plot(alone: list[float], side_by_side: list[float]) -> None:
    with suppress(ImportError):
        from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

        pyplot.boxplot([alone, side_by_side], tick_labels=["alone", "side by side"])
        pyplot.ylabel("seconds")
        pyplot.savefig("reproducibility.png")


if __name__ == "__main__":
    try:
        main()
    except (OrchestratorError, subprocess.CalledProcessError) as error:
        sys.exit(f"reproducibility: {error}")
