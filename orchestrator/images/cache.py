"""A cache of built folders, keyed by a hash of their inputs. A cached folder is always complete.

A build fills a temporary sibling that is renamed into place. A crash leaves only the sibling, which the next build removes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from tempfile import mkdtemp

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import run
from orchestrator.locks import lock_file

Progress = Callable[[str], None]
"""Called with one line of text when a stage of a build starts."""

_KEEP = 2
_SKIPPED = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def cache_folder() -> Path:
    """$NOHYPE_CACHE, otherwise $XDG_CACHE_HOME/nohype, otherwise ~/.cache/nohype."""
    if given := os.environ.get("NOHYPE_CACHE"):
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "nohype"


def hash_inputs(*inputs: str | Path | Iterable[str]) -> str:
    """12 hexadecimal digits over texts, lists of texts, files and folders (names, contents and executable bits, not times)."""
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, Path):
            for name, path in _walk(item):
                _feed(digest, f"{name} {os.access(path, os.X_OK):d}".encode())
                _feed(digest, path.read_bytes())
        elif isinstance(item, str):
            _feed(digest, item.encode())
        else:
            for text in item:
                _feed(digest, text.encode())
            _feed(digest, b"")
    return digest.hexdigest()[:12]


def build_cached(
    cache: Path, kind: str, key: str, build: Callable[[Path], None], *, progress: Progress, keep: int = _KEEP, renew: bool = False
) -> Path:
    """The folder ``<cache>/<kind>-<key>``, built if it does not exist. Concurrent builds of a kind wait for each other.

    ``build`` fills the empty folder that it is given; nothing is left of one that fails. ``keep`` folders of the kind stay.
    ``renew``: build also if the folder exists, and replace it if the build succeeds.
    """
    folder = cache / f"{kind}-{key}"
    try:
        if not renew and _mark_used(folder):
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{kind}.lock", progress=progress):
            if renew or not folder.is_dir():
                _build_in_sibling(cache, kind, folder, build)
            os.utime(folder)
            _prune(cache, kind, keep)
    except OSError as error:
        hint = f"set NOHYPE_CACHE to a writable folder; it is {cache} now"
        raise ImageError(f"cannot use the cache folder {cache}: {error.strerror or error}", hint) from None
    return folder


def _mark_used(folder: Path) -> bool:
    """False if the folder does not exist. ``_prune`` keeps the folders that were used last."""
    try:
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def locked(path: Path, *, progress: Progress) -> Iterator[None]:
    """Holds an exclusive lock on the file. Waits for another holder, and reports that to ``progress``."""
    try:
        descriptor = lock_file(path, mode=0o644)
    except BlockingIOError:
        progress(f"waiting for another build ({path.name})")
        descriptor = lock_file(path, mode=0o644, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Removes a folder, but no file system mounted below it: an unfinished root may have /dev bound in."""
    for _ in range(3):  # the last process of a killed build may still write for a moment
        if not run(["rm", "-rf", "--one-file-system", "--", path], timeout=300, check=False).status:
            return
    run(["rm", "-rf", "--one-file-system", "--", path], timeout=300)


def _build_in_sibling(cache: Path, kind: str, folder: Path, build: Callable[[Path], None]) -> None:
    for leftover in cache.glob(f".{kind}-tmp-*"):
        remove_tree(leftover)
    sibling = Path(mkdtemp(prefix=f".{kind}-tmp-", dir=cache))
    try:
        sibling.chmod(0o755)
        build(sibling)
        if folder.is_dir():
            folder.rename(mkdtemp(prefix=sibling.name, dir=cache))  # the next build removes it, if this one is killed here
        sibling.rename(folder)
        for leftover in cache.glob(f"{sibling.name}*"):
            remove_tree(leftover)
    except BaseException as error:
        full = _is_disk_full(error, sibling)
        remove_tree(sibling)
        if full:
            text = f"cannot build {kind} in {cache}: the disk is full"
            raise ImageError(text, "free 2 GB, or set NOHYPE_CACHE to another folder") from None
        raise


def _is_disk_full(error: BaseException, where: Path) -> bool:
    """Whether the kernel or a program reported a full disk, or less than 1 MB is free."""
    if isinstance(error, OSError) and error.errno == ENOSPC:
        return True
    if not isinstance(error, ImageError | CommandError):
        return False
    return os.strerror(ENOSPC) in str(error) or shutil.disk_usage(where).free < 1 << 20


def _prune(cache: Path, kind: str, keep: int) -> None:
    folders = [path for path in cache.glob(f"{kind}-*") if path.is_dir() and len(path.name) == len(kind) + 13]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in folders[keep:]:
        remove_tree(old)


def _walk(path: Path) -> Sequence[tuple[str, Path]]:
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise ImageError(f"the build needs {path}, which does not exist", "check that the source tree is complete")
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not _SKIPPED & set(file.parts))
    return [(str(file.relative_to(path)), file) for file in files]


def _feed(digest: hashlib._Hash, part: bytes) -> None:
    # the length distinguishes ("ab", "c") from ("a", "bc")
    digest.update(len(part).to_bytes(8, "little") + part)
