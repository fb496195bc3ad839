#!/usr/bin/env python3
"""Measures a command in one guest alone and in several guests at the same time: does a neighbour change the result?

Writes reproducibility.png if matplotlib is installed. Example, on a NoHype host with the image debian:

    examples/reproducibility.py --guests 3 --network 10.9.0.0/24 -- sh -c 'head -c 200M /dev/zero | sha256sum'
"""

import argparse
import ipaddress
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.values import DEFAULT_SOCKET


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for option, value in (("--guests", 2), ("--image", "debian"), ("--memory", "768M"), ("--repeat", 5), ("--limit", 600)):
        parser.add_argument(option, type=type(value), default=value, help=f"default: {value}")
    parser.add_argument("--network", type=ipaddress.ip_network, required=True, help="the guests get its addresses from 60 on")
    parser.add_argument("command", nargs="+", help="each run may take --limit seconds")
    options = parser.parse_args()
    if options.guests < 1 or options.repeat < 1 or options.network.num_addresses < 61 + options.guests:
        parser.error("--guests and --repeat must be at least 1, and --network must have addresses for all guests")
    client = Client(Path(os.environ.get("NOHYPE_SOCKET", DEFAULT_SOCKET)))
    names = [f"bench-{number}" for number in range(options.guests)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.guests) as pool, ExitStack() as created:
        key = Path(folder, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shared = {"image": options.image, "memory": options.memory, "ssh_keys": [key.with_suffix(".pub").read_text().strip()]}
        for number, name in enumerate(names):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            client.create({**shared, "name": name, "address": f"{options.network[60 + number]}/{options.network.prefixlen}"})
            created.callback(client.delete, name)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        list(pool.map(lambda name: client.wait_ready(name, 600), names))
        alone = [measure(key, options, names[0]) for _ in range(options.repeat)]
        side_by_side = sum((list(pool.map(lambda name: measure(key, options, name), names)) for _ in range(options.repeat)), [])
    for title, values in (("alone", alone), ("side by side", side_by_side)):
        print(f"{title:13} median {median(values):.3f} s  spread {(max(values) - min(values)) / median(values):.1%}")
    print(f"ratio         {median(side_by_side) / median(alone):.3f}")
    plot(alone, side_by_side)


def measure(key: Path, options: argparse.Namespace, name: str) -> float:
    line = f"TIMEFORMAT=%R; {{ time {{ {shlex.join(options.command)} ; }} >/dev/null 2>&1 ; }} 2>&1"
    words = ["timeout", str(options.limit), "nohype", "guest", "ssh", "--identity", str(key), name, "--", "bash", "-c", line]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OrchestratorError(f"the command ended with status {done.returncode} in guest {name} (124: too slow)")
    return max(float(done.stdout), 0.001)


def plot(alone: list[float], side_by_side: list[float]) -> None:
    with suppress(ImportError):
        from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

        pyplot.boxplot([alone, side_by_side])
        pyplot.gca().set(xticklabels=["alone", "side by side"], ylabel="seconds", ylim=(0, None))
        pyplot.savefig("reproducibility.png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("reproducibility: ended by SIGTERM"))
    try:
        main()
    except (OrchestratorError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"reproducibility: {error}")
