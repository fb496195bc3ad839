"""A root with Slurm, in namespaces, on which nothing of this machine is changed.

Slurm is that of this machine's release, installed into the upper layer of an overlay over this machine's root, or that of
Debian 13, with a root of its own. Both are cached. The holder is the first process of a PID namespace and reads a pipe: when the
test ends or is killed, all ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from orchestrator.host.run import run
from orchestrator.images.apt import SUITE
from orchestrator.images.cache import build_cached, cache_folder, hash_inputs
from orchestrator.images.debian import make_root
from orchestrator.images.wheels import build_download, read_requirements, source_tree

HERE, DEBIAN_13 = "here", "debian13"
"""Whose Slurm: that of this machine's release, or that of Debian 13."""
RELEASES = (HERE, DEBIAN_13)
PACKAGES = ("munge", "slurm-wlm", "libfaketime")
_MORE_PACKAGES = ("iproute2", "procps", "python3")
"""Of a root of its own."""
_PYTHON = "3.13"
_USER = "useradd --system --no-create-home --shell /bin/sh nohype-fleet"
_PROGRAM = """\
#!/usr/bin/python3
import sys
from orchestrator.cli.main import main
sys.exit(main())
"""
_BYTECODE = "/var/cache/nohype-bytecode"
_MOUNT = """
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4"
mount -t proc proc "$4/proc"
mount --rbind /dev "$4/dev"
mount -t tmpfs tmpfs "$4/run"
"""
_INSTALL = (
    _MOUNT
    + rf"""
printf '#!/bin/sh\nexit 101\n' > "$4/usr/sbin/policy-rc.d"
chmod 755 "$4/usr/sbin/policy-rc.d"
chroot "$4" apt-get install -y --no-install-recommends {" ".join(PACKAGES)}
chroot "$4" {_USER}
rm "$4/usr/sbin/policy-rc.d"
"""
)
# The folder of the test is at the same path, as is the source tree. Each host has a network namespace.
_HOLD = (
    _MOUNT
    + """
add_host() {
    chroot "$root" ip netns add "$1"
    chroot "$root" ip link add "$1" up type veth peer name eth0 netns "$1"
    ip route add "$2" dev "$1" src 10.77.0.1
    chroot "$root" ip -n "$1" link set lo up
    chroot "$root" ip -n "$1" link set eth0 up
    chroot "$root" ip -n "$1" addr add "$2/32" dev eth0
    chroot "$root" ip -n "$1" route add 10.77.0.1 dev eth0
    chroot "$root" ip -n "$1" route add default via 10.77.0.1 dev eth0
}
root=$4
mount --rbind /sys "$4/sys"
mount -t tmpfs tmpfs "$4/sys/bus/pci/devices"
for device in $6; do : > "$4/sys/bus/pci/devices/$device"; done
mkdir -p "$4$5"
mount --bind "$5" "$4$5"
if [ -n "$8" ]; then
    mkdir -p "$4$8"
    mount --bind "$8" "$4$8"
    mount -o remount,bind,ro "$4$8"
fi
mkdir -p "$4/run/munge" "$4/run/nohype" "$4/etc/slurm" "$4/var/lib/slurm" "$4/var/log/slurm"
mount --bind "$5/etc" "$4/etc/slurm"
mount --bind "$5/run" "$4/run/nohype"
hostname controller
cp "$5/hosts" "$4/etc/hosts"
chroot "$4" chown munge: /run/munge
chroot "$4" chown -R slurm: /var/lib/slurm /var/log/slurm
ip link set lo up
ip addr add 10.77.0.1/32 dev lo
echo 1 > /proc/sys/net/ipv4/ip_forward
for host in $7; do add_host "${host%=*}" "${host#*=}"; done
read -r pid rest < /proc/self/stat
echo ready
cat
"""
)


@dataclass(frozen=True)
class System:
    """Layers of a root with Slurm.

    Attributes:
        changes: upper layer with which a root begins; None for an empty one.
        tree: source tree that is bound into it; empty if it has that.
        program: words that run nohype in it.
    """

    lower: Path
    changes: Path | None
    tree: str
    program: tuple[str, ...]


def build_system(release: str) -> System:
    if release == HERE:
        folder = Path(os.environ.get("VIRTUAL_ENV", Path.cwd() / ".venv")) / "bin"
        return System(Path("/"), build_slurm(), "", (str(folder / "nohype"),))
    tree = str(source_tree())
    settings = (f"PYTHONPATH={tree}", f"PYTHONPYCACHEPREFIX={_BYTECODE}")  # the tree is read-only there
    return System(build_debian_13(), None, tree, ("env", *settings, "/usr/local/bin/nohype"))


def build_debian_13() -> Path:
    """A cached root of Debian 13 with Slurm, and with what nohype requires, except for libvirt; returns its folder."""
    requirements = read_requirements(source_tree())

    def build(place: Path) -> None:
        root, cache = place / "root", cache_folder()
        make_root(root, (*PACKAGES, *_MORE_PACKAGES), cache=cache, log=cache / "log" / "slurm-debian13.log")
        run(["chroot", root, *_USER.split()])
        run([sys.executable, "-m", "pip", *build_download(requirements, place / "wheels", _PYTHON)], timeout=900)
        for wheel in (place / "wheels").glob("*.whl"):
            with ZipFile(wheel) as file:
                file.extractall(root / f"usr/local/lib/python{_PYTHON}/dist-packages")
        shutil.rmtree(place / "wheels")
        (root / "usr/local/bin/nohype").write_text(_PROGRAM)
        (root / "usr/local/bin/nohype").chmod(0o755)
        (root / _BYTECODE[1:]).mkdir()
        (root / _BYTECODE[1:]).chmod(0o1777)

    key = hash_inputs(SUITE, (*PACKAGES, *_MORE_PACKAGES), requirements, _USER, _PROGRAM, _BYTECODE)
    return build_cached(cache_folder(), "slurm-debian13", key, build, progress=print, keep=1) / "root"


def build_slurm() -> Path:
    """Installs Slurm of this machine's release into a cached layer; returns its folder."""

    def build(place: Path) -> None:
        folders = [place / name for name in ("upper", "work", "root")]
        for folder in folders:
            folder.mkdir()
        words = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            _INSTALL,
            "sh",
            "/",
        ]
        run([*words, *folders], timeout=600)
        shutil.rmtree(place / "work")

    return build_cached(cache_folder(), "slurm", hash_inputs(PACKAGES, _INSTALL), build, progress=print, keep=1) / "upper"


@contextmanager
def hold_root(folder: Path, devices: Iterable[str], hosts: Mapping[str, str], system: System | None = None) -> Iterator[int]:
    """Yields the id of the holder. The root is ``folder/root``.

    Args:
        folder: on a file system that can be the upper layer of an overlay; ``etc`` is /etc/slurm, ``run`` /run/nohype, ``hosts``
            /etc/hosts.
        devices: PCI addresses that exist as files below /sys.
        hosts: names and addresses of network namespaces, which the controller reaches.
        system: None for that of this machine's release.
    """
    system = system or build_system(HERE)
    for name in ("work", "root", *(() if system.changes else ("upper",))):
        (folder / name).mkdir()
    if system.changes:  # copied, because a layer below this machine's root cannot be a layer beside it
        run(["cp", "--archive", system.changes, folder / "upper"])
    folder.chmod(0o755)
    words = [
        system.lower, folder / "upper", folder / "work", folder / "root", folder, " ".join(devices),
        " ".join(f"{name}={address}" for name, address in hosts.items()), system.tree,
    ]  # fmt: skip
    namespaces = ["--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--propagation", "private"]
    argv = ["unshare", *namespaces, "sh", "-c", _HOLD, "sh", *map(str, words)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        try:
            assert holder.stdout.readline() == b"ready\n"
            yield _find_child(holder.pid)
        finally:
            holder.stdin.close()


def _find_child(pid: int) -> int:
    """The first process of the PID namespace: unshare(1) has forked it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 10
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return int(found[0])
