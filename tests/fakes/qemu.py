"""Stands in for QEMU where a test is about the life of a lab and not about what runs in it: is there in a tenth of a second.

It holds the tap, serves the monitor, writes a console, and lets SSH in with the keys of the lab's credential, as a lab host does.
Its behaviour is chosen by the environment variable STAND_IN, words with commas between:

die         ends at once with an error, as QEMU does with a wrong option
mute        SSH never answers, as of a host that hangs in its boot
panic       ends by itself before SSH answers
stubborn    ignores SIGTERM
abort       when the file `abort` is beside the console, fails as an assertion of QEMU does
fail        fails likewise a second after its start
full        says that it has stopped for want of disk space
ready=WORD  prints the `ready` line of a guest with virt=WORD on the console, and serves nothing
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.harness.ssh_server import serve  # noqa: E402


def option(name: str, prefix: str) -> str:
    """The value of an option that starts with a prefix, up to the first comma."""
    words = sys.argv[1:]
    for word, value in zip(words, words[1:], strict=False):
        if word == name and value.startswith(prefix):
            return value.removeprefix(prefix).split(",")[0]
    return ""


def read_credential(path: Path) -> dict[str, str]:
    """What systemd-tmpfiles would write: path to text."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[1]: base64.b64decode(words[6]).decode() for words in lines if "~" in words[0]}


def serve_monitor(path: str, port: int, status: str) -> None:
    """As much of QMP as a lab uses."""
    table = f"Hub -1 (management):\r\n  TCP[HOST_FORWARD]  3  127.0.0.1 {port}  10.0.2.15 22  0  0\r\n"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            with listener.accept()[0] as connection, connection.makefile("rwb") as stream:
                stream.write(b'{"QMP": {}}\r\n')
                stream.flush()
                for line in stream:
                    answer = {"human-monitor-command": table, "query-status": {"status": status}}.get(
                        json.loads(line)["execute"], {}
                    )
                    stream.write(json.dumps({"return": answer}).encode() + b"\r\n")
                    stream.flush()


def main() -> None:
    modes = os.environ.get("STAND_IN", "").split(",")
    console = Path(option("-serial", "file:"))
    if "die" in modes:
        print("qemu-system-x86_64: -device nonsense: 'nonsense' is not a valid device model name", flush=True)
        sys.exit(1)
    console.write_text("[    0.000000] Linux version 6.12 of the stand-in\n")
    for mode in modes:
        if mode.startswith("ready="):
            console.write_text(f"nohype: ready name=guest cpus=2 virt={mode.removeprefix('ready=')} link=none\n")
    if "fail" in modes:
        threading.Timer(1, os.abort).start()
    if "stubborn" in modes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if monitor := option("-qmp", "unix:"):
        files = read_credential(console.with_name("tmpfiles.extra"))
        listener = socket.create_server(("127.0.0.1", 0))
        status = "io-error" if "full" in modes else "running"
        threading.Thread(target=serve_monitor, args=(monitor, listener.getsockname()[1], status), daemon=True).start()
        if "panic" in modes:
            time.sleep(1)
            console.write_text("[    1.000000] Kernel panic - not syncing: stand-in\n")
            sys.exit(0)
        if "mute" not in modes:
            keys = files["/etc/ssh/ssh_host_ed25519_key"], files["/root/.ssh/authorized_keys"].strip()
            threading.Thread(target=serve, args=(listener, *keys), daemon=True).start()
    while "abort" in modes:
        if console.with_name("abort").exists():
            print("ERROR:system/cpus.c:276:cpu_interrupt: assertion failed: (bql_locked())", flush=True)
            os.abort()
        time.sleep(0.02)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
