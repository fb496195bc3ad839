"""A Debian 13 root file system with this source tree, in which commands run natively: Python 3.13, libvirt of Debian 13."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from orchestrator.host.run import run
from orchestrator.images.apt import SUITE
from orchestrator.images.cache import build_cached, cache_folder, hash_inputs
from orchestrator.images.debian import make_root
from orchestrator.images.wheels import build_download, source_tree

# Arguments: root, tree, wheels, line. Mounts are private, and end with the namespaces. Nothing is downloaded inside.
_ENTER = """set -e
root=$1 tree=$2 wheels=$3
mount -t overlay -o "lowerdir=$root,upperdir=$4/upper,workdir=$4/work" overlay "$4/root"
root=$4/root
for name in dev sys; do mount --rbind /$name $root/$name; done
mount -t proc proc $root/proc
mount -t tmpfs tmpfs $root/run
mount -t tmpfs tmpfs $root/tmp
mkdir -p $root/srv/tree $root/srv/wheels
mount --bind $tree $root/srv/tree
mount --bind $wheels $root/srv/wheels
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
  PIP_NO_INDEX=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/srv/wheels PIP_CONFIG_FILE=/dev/null \
  chroot $root sh -c "cd /srv/tree && $5"
"""
_NOT_COPIED = (".git", ".venv", "build", "dist")


def read_packages() -> list[str]:
    """Packages that `make setup` installs with apt."""
    match = re.search(r"^PACKAGES := ((?:.*\\\n)*.*)", (source_tree() / "Makefile").read_text(), re.MULTILINE)
    assert match
    return match[1].replace("\\\n", " ").split()


def read_requirements() -> tuple[str, ...]:
    """What `make setup` installs with pip, except libvirt-python, which is Debian's, and what pip builds this package with."""
    config = configparser.ConfigParser()
    config.read(source_tree() / "setup.cfg")
    lines = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values(), "setuptools>=77"])
    names = (line.strip() for line in lines.splitlines() if line.strip())
    return tuple(name for name in names if not name.startswith(("libvirt-python", "nohype-orchestrator")))


@dataclass(frozen=True)
class Debian13:
    """``changes`` gets the files that commands change."""

    root: Path
    tree: Path
    wheels: Path
    changes: Path

    def run(self, line: str, *, timeout: float) -> subprocess.CompletedProcess[str]:
        """Runs a line of shell in the source tree."""
        argv = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER, "enter"]
        words = [*argv, self.root, self.tree, self.wheels, self.changes, line]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout)


def build_debian13(folder: Path) -> Debian13:
    """``folder`` is empty, and not on an overlay file system; the root file system and the wheels are cached."""
    cache, packages, requirements = cache_folder(), [*read_packages(), "make", "git"], read_requirements()

    def fetch(place: Path) -> None:
        run([sys.executable, "-m", "pip", *build_download(requirements, place, "3.13")], timeout=900)

    def build(place: Path) -> None:
        make_root(place / "root", packages, cache=cache, log=cache / "log" / "debian13.log")

    wheels = build_cached(cache, "debian13-wheels", hash_inputs(requirements), fetch, progress=print, keep=1)
    root = build_cached(cache, "debian13-root", hash_inputs(SUITE, packages), build, progress=print, keep=1) / "root"
    for name in ("upper", "work", "root", "tree"):
        (folder / name).mkdir()
    tree = source_tree()
    run(["cp", "-a", *(path for path in tree.iterdir() if path.name not in _NOT_COPIED), folder / "tree"], timeout=300)
    return Debian13(root, folder / "tree", wheels, folder)
