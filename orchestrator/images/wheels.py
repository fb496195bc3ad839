"""The wheelhouse: this package and its requirements as wheels for the Pythons of hosts, in one tar file."""

from __future__ import annotations

import argparse
import configparser
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import ImageError, OrchestratorError
from orchestrator.images.cache import Progress, build_cached, cache_folder, hash_inputs
from orchestrator.images.logged import run_logged

# Versions of Python, and the oldest C library with them: Debian 13; Ubuntu 24.04; Debian 12 and Rocky Linux 9.
PYTHONS = {"3.13": 41, "3.12": 39, "3.11": 34}

# The content of this package's wheel.
_SOURCES = ("orchestrator", "setup.cfg", "pyproject.toml", "README.md")


def source_tree() -> Path:
    """The source tree of this program. Raises ImageError for an installed package, which has no roles and sources."""
    tree = Path(__file__).parents[2]
    missing = [name for name in (*_SOURCES, "ansible", "guest-images") if not (tree / name).exists()]
    if missing:
        raise ImageError(f"not a source tree: {tree} lacks {', '.join(missing)}", "build labs with nohype from a checkout")
    return tree


def hash_sources(tree: Path) -> str:
    return hash_inputs(*(tree / name for name in _SOURCES))


def read_requirements(tree: Path) -> tuple[str, ...]:
    """Requirements of a host except libvirt-python, which must match the host's libvirt and comes from Debian."""
    config = configparser.ConfigParser()
    config.read(tree / "setup.cfg")
    lines = (config["options"]["install_requires"] + config["options.extras_require"]["host"]).split("\n")
    return tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("libvirt-python"))


def build_wheelhouse(tree: Path, cache: Path, *, progress: Progress) -> Path:
    """Builds this package's wheel, downloads the others with pip's settings, and packs a reproducible tar file."""
    requirements = read_requirements(tree)

    def fetch(folder: Path) -> None:
        progress("wheels: downloading the requirements")
        for python in PYTHONS:
            _pip(build_download(requirements, folder, python), cache / "log" / "wheels.log")

    def build(folder: Path) -> None:
        fetched = build_cached(cache, "wheels", hash_inputs(requirements, str(PYTHONS)), fetch, progress=progress)
        progress("wheels: building this package")
        # a copy: setuptools leaves build/ and egg-info in the tree, and packs stale files from there
        copy = folder / "source"
        copy.mkdir()
        for name in _SOURCES:
            _copy(tree / name, copy / name)
        _pip(["wheel", "--no-deps", "--quiet", f"--wheel-dir={folder}", str(copy)], cache / "log" / "wheels.log")
        shutil.rmtree(copy)
        _pack([*fetched.glob("*.whl"), *folder.glob("*.whl")], folder / "wheelhouse.tar")

    key = hash_inputs(requirements, str(PYTHONS), hash_sources(tree), Path(__file__))
    return build_cached(cache, "wheelhouse", key, build, progress=progress) / "wheelhouse.tar"


def build_download(requirements: Sequence[str], folder: Path, python: str) -> list[str]:
    """pip's arguments for wheels of a host's Python, which may differ from this one."""
    # pip does not derive older manylinux tags from newer ones, although they are compatible (PEP 600): all are listed
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(PYTHONS[python], 16, -1)] + ["manylinux2014_x86_64"]
    return [
        "download", "--quiet", "--only-binary=:all:", f"--python-version={python}", "--implementation=cp",
        *(f"--platform={platform}" for platform in platforms), f"--dest={folder}", *requirements,
    ]  # fmt: skip


def _pip(arguments: Sequence[str], log: Path) -> None:
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    run_logged(argv, task="cannot build the wheels for a host", program="pip", log=log, timeout=900)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def _pack(wheels: Sequence[Path], output: Path) -> None:
    with tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as tar:
        for wheel in sorted(wheels, key=lambda path: path.name):
            entry = tarfile.TarInfo(wheel.name)
            entry.size, entry.mode = wheel.stat().st_size, 0o644
            with wheel.open("rb") as file:
                tar.addfile(entry, file)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.images.wheels",
        description="Write a wheelhouse for the variable nohype_wheelhouse of the host role.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="tar file to write")
    output: Path = parser.parse_args(arguments).file
    try:
        shutil.copyfile(build_wheelhouse(source_tree(), cache_folder(), progress=print), output)
    except (OrchestratorError, OSError) as error:
        sys.exit(f"nohype: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
