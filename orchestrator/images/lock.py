"""Locks of packages: the names, versions and hashes from which a root was built, and builds from the kept files of a lock.

A mirror removes a version when a newer one appears, so a lock is of use only as long as the files are kept: a lock stands beside
each build, and its files in the cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run

LOCK = "packages.lock"

_MAX_LOCK = 1 << 22  # bytes
# Debian policy, 5.6.1 and 5.6.12
_LINE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+)=(?P<version>(?:\d+:)?[0-9A-Za-z.+~-]+) (?P<architecture>amd64|all) (?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class LockedPackage:
    name: str
    version: str
    architecture: str
    sha256: str  # of the .deb file

    @property
    def file(self) -> str:
        """The name that apt gives the file in its cache."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"

    def __str__(self) -> str:
        return f"{self.name}={self.version} {self.architecture} {self.sha256}"


def read_lock(path: Path) -> tuple[LockedPackage, ...]:
    """Raises ImageError if the file cannot be read or is not a lock."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LOCK + 1)
    except OSError as error:
        raise ImageError(f"cannot read the lock {path}: {error.strerror}") from None
    if len(data) > _MAX_LOCK:
        raise ImageError(f"invalid lock {path}: larger than {_MAX_LOCK} bytes")
    return parse_lock(data.decode(errors="replace"), source=str(path))


def parse_lock(text: str, *, source: str) -> tuple[LockedPackage, ...]:
    """``source`` names the text in messages."""
    found: dict[str, LockedPackage] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise ImageError(f"invalid lock {source}: line {number}: expected `name=version architecture sha256`")
        package = LockedPackage(**match.groupdict())
        if package.name in found:
            raise ImageError(f"invalid lock {source}: line {number}: package {package.name} appears twice")
        found[package.name] = package
    if not found:
        raise ImageError(f"invalid lock {source}: it names no packages")
    return tuple(found.values())


def format_lock(packages: Iterable[LockedPackage]) -> str:
    return "".join(f"{package}\n" for package in sorted(packages, key=lambda package: package.name))


def lock_root(root: Path, folders: Sequence[Path]) -> tuple[LockedPackage, ...]:
    """The packages that are installed in a root, with the hashes of their files in the first folder that has them."""
    return tuple(_lock_package(*fields, folders) for fields in list_installed(root))


def list_installed(root: Path) -> Iterator[tuple[str, str, str]]:
    """Name, version and architecture of each package of a root."""
    argv = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", "--showformat", "${Package} ${Version} ${Architecture}\\n"]
    for line in run(argv).stdout.splitlines():
        name, version, architecture = line.split()
        yield name, version, architecture


def find_kept(package: LockedPackage, folders: Sequence[Path]) -> Path | None:
    """The file of a package in the first folder that has it with the locked content."""
    for folder in folders:
        path = folder / package.file
        if path.is_file() and hash_file(path) == package.sha256:
            return path
    return None


def build_repository(packages: Sequence[LockedPackage], folders: Sequence[Path], target: Path) -> None:
    """Makes a flat repository for apt from kept files. Raises ImageError if a file is missing or has another content."""
    missing: list[str] = []
    stanzas: list[str] = []
    target.mkdir()
    for package in packages:
        path = find_kept(package, folders)
        if path is None:
            missing.append(f"{package.name} {package.version}")
            continue
        # apt's method `copy` does not find a file with an escaped character in its name
        link = target / package.file.replace("%3a", "+3a+")
        link.hardlink_to(path)
        control = run(["dpkg-deb", "--field", path]).stdout.rstrip()
        stanzas.append(f"{control}\nFilename: ./{link.name}\nSize: {path.stat().st_size}\nSHA256: {package.sha256}\n")
    if missing:
        count = f"{len(missing)} of {len(packages)}"
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ImageError(
            f"cannot build from the lock: {count} packages are not kept with the locked content: {shown}",
            f"put the .deb files into {folders[0]}, or build without --lock",
        )
    (target / "Packages").write_text("\n".join(stanzas))


def keep_debs(packages: Iterable[LockedPackage], folders: Sequence[Path], target: Path) -> None:
    """Links the files of a lock into a folder of their own, so that they last as long as it does."""
    target.mkdir()
    for package in packages:
        path = find_kept(package, folders)
        if path is not None and not (target / package.file).exists():
            (target / package.file).hardlink_to(path)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock_package(name: str, version: str, architecture: str, folders: Sequence[Path]) -> LockedPackage:
    package = LockedPackage(name, version, architecture, "")
    for folder in folders:
        if (folder / package.file).is_file():
            return replace(package, sha256=hash_file(folder / package.file))
    raise ImageError(f"cannot lock package {name} {version}: {package.file} is not in {folders[0]}", "build the image once more")
