"""After a reset of the PF the driver has switched local switching on again: how long, and whether frames took that way.

Traffic between two guests runs across each reset. A frame that one guest received, but the switch never sent back, was leaked.
"""

from __future__ import annotations

import json
import threading
from ipaddress import IPv4Address
from typing import Any

import pytest

from orchestrator.audit.uplink import parse_ping
from orchestrator.host.frames import EchoFilter, FrameCounter
from orchestrator.lab import lab as labs
from orchestrator.lab import switch
from orchestrator.lab.demo import GUESTS
from orchestrator.waiting import wait_until
from tests.lab.conftest import LINK_UP, LabHost

SIZE = 250
"""Bytes of an echo; no other program of the tests uses it."""
FRAMES = 1500
LIMIT = 10.0
"""Seconds within which VEPA mode must be restored: far below the manager's periodic check, so a notification has caused it.
Usually it takes less than one, and up to two on a busy machine."""

# Polls the loopback bit of the 82576's DTXSWC until the file STOP exists; prints the intervals in which it was set, in seconds.
POLL = """
import json, mmap, os, struct, sys, time
fd = os.open(sys.argv[1] + "/device/resource0", os.O_RDWR | os.O_SYNC)
bar = mmap.mmap(fd, 0x20000)
since, found = None, []
print("ready", flush=True)
while not os.path.exists("/run/poll.stop"):
    value, = struct.unpack_from("<I", bar, 0x3500)
    now = time.monotonic()
    is_set = value != 0xFFFFFFFF and bool(value >> 31)
    if is_set and since is None:
        since = now
    if not is_set and since is not None:
        found.append(round(now - since, 4))
        since = None
    time.sleep(0.002)
if since is not None:
    found.append(999)
print(json.dumps(found))
"""
# ETHTOOL_NWAY_RST (include/uapi/linux/ethtool.h), as `ethtool -r` does
NEGOTIATE = """
import ctypes, fcntl, socket, struct
command = ctypes.create_string_buffer(struct.pack("I", 9))
request = struct.pack("16sQ16x", b"nic0", ctypes.addressof(command))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)
"""
RESETS = {
    "link down and up": f"ip link set nic0 down; {LINK_UP}",
    "MTU": "ip link set nic0 mtu 1400; sleep 2; ip link set nic0 mtu 1500",
    "negotiation": f"python3 -c '{NEGOTIATE}'",
}
FIRST, *MORE = RESETS


@pytest.fixture
def traffic(host: LabHost, guests: list[dict[str, Any]]) -> Any:
    """Starts a flood of echoes from guest to guest; the result is the number of replies."""

    class Flood:
        def __enter__(self) -> Flood:
            self._thread.start()
            return self

        def __init__(self) -> None:
            self.output = ""
            self._thread = threading.Thread(target=self._work)

        def _work(self) -> None:
            target = GUESTS[1].address.partition("/")[0]
            line = f"flood {target} {FRAMES} {SIZE}"
            done = labs.execute(host.lab, ["nohype", "guest", "tell", GUESTS[0].name, line, "--timeout", "300"], timeout=400)
            self.output = done.stdout + done.stderr

        def __exit__(self, *_: object) -> None:
            self._thread.join()

    return Flood()


@pytest.mark.parametrize("kind", [FIRST, *(pytest.param(kind, marks=pytest.mark.soak) for kind in MORE)])
def test_reset_of_the_pf_leaks_no_frame_and_vepa_is_restored(host: LabHost, traffic: Any, kind: str) -> None:
    port = switch.port(host.lab.name)
    source, target = (IPv4Address(guest.address.partition("/")[0]) for guest in GUESTS)
    replies = FrameCounter(EchoFilter(target, source, reply=True, size=SIZE), port.interface, port.netns, promiscuous=True)
    host.run(f"cat > /run/poll.py <<'END'\n{POLL}\nEND\nrm -f /run/poll.stop /run/poll.out")
    words = "--quiet --collect --unit poll --property=StandardOutput=file:/run/poll.out taskset -c 0-1"
    wait = "until grep -qs ready /run/poll.out; do sleep 0.2; done"
    host.run(f"systemd-run {words} python3 /run/poll.py /sys/class/net/nic0; {wait}")
    with replies, traffic:
        wait_until(lambda: sum(replies.count().outgoing.values()) > 50, timeout=120, interval=0.2)
        host.run(RESETS[kind])
    sent = parse_ping(traffic.output)
    done = host.run("touch /run/poll.stop; while systemctl -q is-active poll; do sleep 0.2; done; tail -n 1 /run/poll.out")
    opened = json.loads(done.stdout)
    crossed = replies.count()
    leaked = sent["received"] - sum(crossed.outgoing.values())
    print(f"\nPF reset ({kind}): local switching on for {opened} s; {sent}, {crossed}, leaked {leaked}")
    assert crossed.dropped == 0
    assert leaked <= 0, f"{leaked} replies did not come from the switch"
    assert max(opened, default=0) <= LIMIT
    assert sent["received"] > 50
