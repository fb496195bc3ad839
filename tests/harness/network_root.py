"""A small guest image with its root on a network disk, and the servers of such disks in the lab.

Its kernel and initrd are those of the image `debian`. Its root is busybox with one script in the place of systemd.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.host.run import run
from orchestrator.images.description import CONSOLE_PROTOCOL, DISK, FILE, INITRD, KERNEL, DiskImage, write_description
from orchestrator.images.store import STORE, Image
from orchestrator.lab import lab as labs
from orchestrator.values import Size

IMAGE = "netroot"
SIZE = 16 << 20
SERVER, PORT = "10.9.0.100", 4420
NQN = "nqn.2026-11.example:netroot"
UUID = "6f1f6c3a-3d0a-4b8e-9a3e-7b1d2c5e4f60"
"""Of the namespace. A server keeps it: to a guest that connects again, another UUID is another disk."""

_ROOT_INIT = """\
#!/bin/busybox sh
# Speaks the protocol nohype-1 of guest-images/minimal: write TEXT, read, state, halt.
export PATH=/bin
exec < /dev/console > /dev/console 2>&1
busybox stty -echo -onlcr
busybox ls /nohype-disk 2> /dev/null
read -r uptime _ < /proc/uptime
root=$(busybox awk '$2 == "/" { print $1 }' /proc/mounts | busybox tail -n 1)
echo "nohype: ready name=$(busybox hostname) root=$root uptime=$uptime"
while :; do
    read -r command text || busybox sleep 1
    case $command in
        write) echo "$text" > /written && busybox sync && echo "nohype: done write" ;;
        read) busybox sync && echo 3 > /proc/sys/vm/drop_caches && echo "nohype: done read $(busybox cat /written)" ;;
        state) echo "nohype: done state $(busybox cat /sys/class/nvme/nvme*/state)" ;;
        halt) echo "nohype: done halt" && busybox poweroff -f ;;
        ?*) echo "nohype: error $command unknown command" ;;
    esac
done
"""

_NVMET = "/sys/kernel/config/nvmet"
# Everything that `start` makes, in the reverse order. No-op without a server, also after a test was killed.
_STOP = f"""
cd {_NVMET} 2>/dev/null || exit 0
rm -f ports/77/subsystems/*
rmdir ports/77 2>/dev/null
for subsystem in subsystems/{NQN}; do
    [ -d $subsystem ] || continue
    rm -f $subsystem/allowed_hosts/*
    for namespace in $subsystem/namespaces/*; do echo 0 >$namespace/enable; rmdir $namespace; done
    rmdir $subsystem
done
rmdir hosts/nqn.2026-11.example:* 2>/dev/null
true
"""


@dataclass(frozen=True)
class NvmetServer:
    """The kernel's NVMe target on the lab host, at an address of the PF. ``file`` is its disk, on the lab host."""

    lab: labs.Lab
    file: str = "/var/tmp/netroot.raw"

    def start(self, *, host: str = "", secret: str = "", uuid: str = UUID) -> None:
        """``host``: the only one that may connect, with its secret; empty for any."""
        allow = f"""
mkdir hosts/{host}
{f"echo '{secret}' >hosts/{host}/dhchap_key" if secret else ""}
ln -s {_NVMET}/hosts/{host} subsystems/{NQN}/allowed_hosts/
"""
        self._run(f"""set -e
modprobe nvmet_tcp
mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
ip address show dev nic0 | grep -q ' {SERVER}/' || ip address add {SERVER}/24 dev nic0
cd {_NVMET}
mkdir -p subsystems/{NQN}/namespaces/1 ports/77
echo {0 if host else 1} >subsystems/{NQN}/attr_allow_any_host
{allow if host else ""}
echo {uuid} >subsystems/{NQN}/namespaces/1/device_uuid
printf {self.file} >subsystems/{NQN}/namespaces/1/device_path
echo 1 >subsystems/{NQN}/namespaces/1/enable
cd ports/77
echo tcp >addr_trtype; echo ipv4 >addr_adrfam; echo {SERVER} >addr_traddr; echo {PORT} >addr_trsvcid
ln -s {_NVMET}/subsystems/{NQN} subsystems/
""")

    def stop(self) -> None:
        self._run(_STOP)

    def remove(self) -> None:
        self._run(f"{_STOP}\nip address delete {SERVER}/24 dev nic0 2>/dev/null; rm -f {self.file}; true")

    def _run(self, script: str) -> None:
        done = labs.execute(self.lab, ["sh", "-c", script], timeout=60)
        assert done.status == 0, done.stderr


def install_image(lab: labs.Lab, built: Image, target: str, name: str = IMAGE) -> None:
    """Puts the image into the lab's store, and a copy of its root into the file ``target`` of the lab host."""
    folder = STORE / name
    with TemporaryDirectory() as temporary:
        small = Path(temporary)
        make_root(built, small)
        disk = DiskImage(size=SIZE, sha256=hashlib.sha256((small / DISK).read_bytes()).hexdigest(), layout="ext4")
        fields = {"disk": disk, "ram_root": None, "memory": Size.parse("128M"), "console": CONSOLE_PROTOCOL, "ready": "console"}
        write_description(small, built.model_copy(update=fields))
        with tarfile.open(small / "image.tar", "w:gz", compresslevel=1) as tar:
            for source in (built.kernel, built.initrd, small / DISK, small / FILE):
                tar.add(source, source.name)
        with (small / "image.tar").open("rb") as file:
            line = f"rm -rf {folder} && mkdir -p {folder} && tar -xz -C {folder} && cp {folder}/{DISK} {target}"
            done = labs.execute(lab, line, timeout=240, input=file)
    assert done.status == 0, done.stderr
    assert labs.execute(lab, f"ls {folder}").stdout.split() == sorted((DISK, FILE, INITRD, KERNEL))


def make_root(built: Image, folder: Path) -> Path:
    """The root as a file in the folder."""
    root = folder / "root"
    for part in ("bin", "dev", "proc", "sys", "run", "mnt", "usr/lib/systemd"):
        (root / part).mkdir(parents=True)
    unpacked = subprocess.run(["zcat", built.initrd], check=True, capture_output=True, timeout=60).stdout
    argv = ["cpio", "-idm", "--quiet", "-D", folder, "bin/busybox"]
    subprocess.run(argv, input=unpacked, check=True, timeout=60)
    (folder / "bin/busybox").rename(root / "bin/busybox")
    init = root / "usr/lib/systemd/systemd"
    init.write_text(_ROOT_INIT)
    init.chmod(0o755)
    path = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    run(
        ["mke2fs", "-q", "-b", "4096", "-t", "ext4", "-L", "nohype-root", "-d", root, folder / DISK, f"{SIZE >> 10}k"],
        timeout=60,
        env=path,
    )
    return folder / DISK
