"""Open vSwitch in namespaces of its own, with the datapath in user space: no kernel module, nothing of this machine changes.

Its programs come from the root that `lab.build.build_switch_tools` makes, the lower layer of an overlay, so it stays as it is.
The holder is the first process of a PID namespace and reads a pipe. It ends when the test ends or is killed, and with it all
mounts, interfaces and daemons.
"""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from orchestrator.host.netlink import set_link_up
from orchestrator.host.run import run
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.openvswitch import OpenVSwitch

BRIDGE = "sw"
_SCRIPT = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=$2,upperdir=upper,workdir=work" root
mkdir -p root/proc root/run root/etc/openvswitch
rm -rf root/var/run
ln -s /run root/var/run
mount --rbind /proc root/proc
mount --rbind /dev root/dev
mount -t tmpfs tmpfs root/run
mkdir -p root/run/openvswitch root/run/lldpd
read -r pid rest < /proc/self/stat
echo "$pid"
cat  # not exec: the shell reaps daemons that end
"""
_ETHERTYPE = 0x88B5  # IEEE 802 local experimental
_SOL_PACKET, _PACKET_AUXDATA, _ALL, _VLAN_VALID = 263, 8, 3, 1 << 4


@dataclass
class Wire:
    """The near end of a cable to a port of the switch: sends frames and counts those that arrive."""

    near: str
    far: str

    def __enter__(self) -> Wire:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE))
        self._socket.bind((self.near, _ETHERTYPE))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        with IPRoute() as ipr:  # the far end would go only some time after its namespace
            for index in ipr.link_lookup(ifname=self.near):
                ipr.link("del", index=index)

    def send(self, source: str, target: str, number: int, vlan: int = 0) -> None:
        tag = b"\x81\x00" + vlan.to_bytes(2, "big") if vlan else b""
        head = bytes.fromhex((target + source).replace(":", "")) + tag + _ETHERTYPE.to_bytes(2, "big")
        self._socket.send(head + number.to_bytes(4, "big") + bytes(46))

    def receive(self, number: int, timeout: float) -> int:
        """How often the frame with this number arrived, until ``timeout`` seconds after the last frame."""
        self._socket.settimeout(timeout)
        count = 0
        try:
            while True:
                data, address = self._socket.recvfrom(2048)
                count += address[2] != socket.PACKET_OUTGOING and data[14:18] == number.to_bytes(4, "big")
        except TimeoutError:
            return count


class Tap:
    """Reads the VLAN tags of the frames that arrive at a wire; they are sent after it was opened."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def __enter__(self) -> Tap:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        self._socket.bind((self._wire.near, _ALL))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def receive(self, number: int, timeout: float) -> list[int]:
        """VLANs of the frames with this number, 0 without a tag, until ``timeout`` seconds after the last frame."""
        self._socket.settimeout(timeout)
        found = []
        try:
            while True:
                data, extra, _, address = self._socket.recvmsg(2048, 64)
                # struct tpacket_auxdata of include/uapi/linux/if_packet.h; the kernel takes the tag out of the frame.
                status, tag = (struct.unpack_from("<I", extra[0][2])[0], struct.unpack_from("<H", extra[0][2], 16)[0])
                if address[2] != socket.PACKET_OUTGOING and data[14:18] == number.to_bytes(4, "big"):
                    found.append(tag & 0xFFF if status & _VLAN_VALID else 0)
        except TimeoutError:
            return sorted(found)


class Daemons:
    """``vswitchd`` can be ended and started again."""

    def __init__(self, holder: int, root: Path) -> None:
        self.holder, self._root = holder, root
        self._enter = ("nsenter", f"--target={holder}", "--mount", "--net", "--pid")
        self.prefix = (*self._enter, "chroot", str(root))
        self.driver = OpenVSwitch(BRIDGE, LocalCommands(self.prefix))

    def run(self, *words: str) -> str:
        return LocalCommands(self.prefix).run(words)

    def start(self) -> None:
        self.run("ovsdb-tool", "create", "/etc/openvswitch/conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
        self._start_daemon("ovsdb-server", "--remote=punix:/run/openvswitch/db.sock")
        self.run("ovs-vsctl", "--no-wait", "init")
        self.start_vswitchd()

    def start_vswitchd(self) -> None:
        self._start_daemon("/usr/lib/openvswitch-switch/ovs-vswitchd")

    def kill_vswitchd(self) -> None:
        self._end("ovs-vswitchd")

    def stop(self) -> None:
        for name in ("ovs-vswitchd", "ovsdb-server"):
            self._end(name)

    def plug(self, prefix: str, port: int) -> Wire:
        """A cable to a new port with this OpenFlow number."""
        wire = Wire(f"{prefix}n{port}", f"p{port}")
        with IPRoute() as ipr:
            ipr.link("add", ifname=wire.near, kind="veth", peer={"ifname": wire.far, "net_ns_pid": self.holder})
        self.run("ip", "link", "set", wire.far, "up")
        set_link_up(wire.near, up=True)
        self.run(
            "ovs-vsctl", "--timeout=20", "add-port", BRIDGE, wire.far, "--",
            "set", "interface", wire.far, f"ofport_request={port}",
        )  # fmt: skip
        return wire

    def _start_daemon(self, program: str, *options: str) -> None:
        self.run(program, *options, "--pidfile", "--detach", "--no-chdir", "--log-file=/run/openvswitch/log", "-vconsole:off")

    def _end(self, name: str) -> None:
        file = self._root / f"run/openvswitch/{name}.pid"
        script = f"if [ -e {file} ]; then pid=$(cat {file}); kill -9 $pid; while kill -0 $pid; do sleep 0.02; done; rm {file}; fi"
        run([*self._enter, "sh", "-c", script], timeout=30)


@contextmanager
def running(folder: Path, tools: Path, *, bridge: bool = True) -> Iterator[Daemons]:
    """Daemons, with an empty ``bridge``. ``tools``: the root with the programs."""
    place = folder / "ovs"
    place.mkdir()
    namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    words = ["unshare", *namespaces, "sh", "-c", _SCRIPT, "sh", str(place), str(tools)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        try:
            daemons = Daemons(int(holder.stdout.readline()), place / "root")
            daemons.start()
            if bridge:
                daemons.run("ovs-vsctl", "--timeout=20", "add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")
            yield daemons
        finally:
            holder.stdin.close()
