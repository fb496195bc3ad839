"""Installs further Debian packages into a root file system of `debian.make_root`, with the apt of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.errors import RequestError
from orchestrator.images.apt import SUITE, AptSettings, check_keyring, format_source, read_apt_settings
from orchestrator.images.cache import locked
from orchestrator.images.debian import CONTAINED, EXCLUDED
from orchestrator.images.logged import run_logged

# deb-control(5); apt-get(8) takes a final minus for the order to remove the package.
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.]", re.ASCII)

# Arguments: root, kept packages, names. Mounts are private to the process. No service of a package starts: it would run on this
# machine (policy-rc.d, as mmdebstrap does).
_INSTALL = r"""set -eu
root=$1 kept=$2; shift 2
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
archives=$root/var/cache/apt/archives
mkdir -p "$archives/partial"
cp -al "$kept/." "$archives/"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
apt-get --quiet update
apt-get --quiet --yes install -- "$@"
find "$archives" -maxdepth 1 -name '*.deb' -exec cp -nl -t "$kept" {} +
rm -rf "$root/usr/sbin/policy-rc.d" "$archives"
"""


def check_package_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names in order, each once. Raises RequestError for a name that apt would take for something else."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise RequestError(f"{name!r} is not the name of a Debian package", "use a-z, 0-9, plus, minus and dot, as in g++")
    return tuple(sorted(set(names)))


def add_packages(root: Path, packages: Sequence[str], *, cache: Path, log: Path, env: Mapping[str, str] | None = None) -> None:
    """Installs packages of SUITE and their dependencies, without recommendations. ``env`` is for maintainer scripts.

    Raises ImageError with apt's output, for example for an unknown package.
    """
    check_keyring()
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".apt-", dir=root.parent) as name:
        folder = Path(name)
        settings = read_apt_settings()
        for inner in ("state/lists/partial", "cache", "log", "empty"):
            (folder / inner).mkdir(parents=True)
        (folder / "sources.list").write_text(format_source(settings.uri, SUITE) + "\n")
        (folder / "apt.conf").write_text(build_configuration(settings, root, folder))
        with locked(cache / "debs.lock", progress=lambda _: None):
            run_logged(
                [*CONTAINED, "--", "sh", "-c", _INSTALL, "install", str(root), str(debs), *packages],
                task=f"cannot install {shlex.join(packages)}",
                program="apt-get",
                log=log,
                timeout=1800,
                env={
                    "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive",
                    **(env or {}),
                },
            )  # fmt: skip


def build_configuration(settings: AptSettings, root: Path, folder: Path) -> str:
    """An apt.conf(5) by which this machine's apt works on ``root``; dpkg runs inside. ``folder`` has the list of sources."""
    values = {
        "Dir": root, "Dir::State": folder / "state", "Dir::State::Status": root / "var/lib/dpkg/status",
        "Dir::Cache": folder / "cache", "Dir::Cache::Archives": f"{root}/var/cache/apt/archives/",
        "Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": folder / "empty",
        "Dir::Etc::Parts": folder / "empty",
        "Dir::Etc::PreferencesParts": folder / "empty", "Dir::Log": folder / "log",
        "DPkg::Chroot-Directory": root, "DPkg::Options::": "--force-unsafe-io", "DPkg::Use-Pty": "0",
        "APT::Architecture": "amd64", "APT::Architectures": "amd64", "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "root", "Acquire::Languages": "none", "Acquire::Retries": "3",
        "APT::Cmd::Pattern-Only": "1",  # a name is not a regular expression
    }  # fmt: skip
    lines = [f'{key} "{value}";' for key, value in values.items()]
    lines += [f'DPkg::Options:: "--path-exclude={pattern}";' for pattern in EXCLUDED]
    return "\n".join([*lines, *settings.options, ""])
