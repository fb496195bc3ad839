"""Installs builds into the store, and takes names and builds out of it.

Whatever interrupts an installation (SIGKILL, a power cut), a name links to a complete build: the old one or the new one. What is
left in ``.tmp-*`` is removed by the next program that changes the store.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from tempfile import mkdtemp

from orchestrator.errors import Conflict, ImageError, NotFound, RequestError
from orchestrator.host.sync import sync_path
from orchestrator.images.cache import remove_tree
from orchestrator.images.description import DISK, FILE, Description, FileRecord, hash_content, write_description
from orchestrator.images.sparse import copy_hashed, move_hashed
from orchestrator.images.store import (
    BUILDS,
    Image,
    build_folder,
    find_image,
    image_names,
    is_folder,
    link_target,
    list_builds,
    read_image,
)
from orchestrator.images.store_lock import changing_store, removing_builds
from orchestrator.images.verify import verify
from orchestrator.model.plan import ImageRef
from orchestrator.values import parse_guest_name

Users = Iterable[tuple[str, ImageRef]]
"""Names of guests with the builds that they start."""
ReadUsers = Callable[[], Users]
"""Reads the users at the time of the call; raises OrchestratorError if they cannot be known."""

_TEMPORARY = ".tmp-"
_RESTORE = "restore-"


def install_image(built: Path, store: Path, name: str, *, move: bool = False) -> Image:
    """Copies a build into the store and makes the name link to it. An installed build of the same content is kept instead.

    ``move``: takes the files of the build, which is in a private folder of the store's file system, instead of copies.
    Guests are not affected: they start the builds that they were created with, until `collect` finds no guest of a build.
    """
    check_name(name)
    source = read_image(built)
    with _temporary(store, f"install the guest image {name}") as temporary:
        _check_replaceable(store, name)
        build = _take(source, temporary / "build", name, move_hashed if move else copy_hashed)
        target = build_folder(store, build)
        is_intact = _is_intact(target)  # before the lock: it reads all files
        with removing_builds(store):
            target.parent.mkdir(exist_ok=True)
            target.parent.chmod(0o755)
            if os.path.lexists(target) and not is_intact:
                target.rename(temporary / "damaged")
            if not is_folder(target):
                (temporary / "build").rename(target)
            sync_path(target.parent)
            _link(store, name, build, temporary)
            return read_image(target, name)


def delete_image(store: Path, name: str, read_users: ReadUsers) -> tuple[str, ...]:
    """Removes the name, and the builds that nothing needs any more, as `collect`; returns these builds.

    Raises NotFound for an unknown name, Conflict if guests were created from the image.
    """
    if name not in image_names(store):
        find_image(store, name)  # raises
    with _temporary(store, f"delete the guest image {name}") as temporary, removing_builds(store):
        users = tuple(read_users())
        if guests := sorted({guest for guest, ref in users if ref.name == name}):
            message = f"guests use the image {name}: {', '.join(guests)}"
            raise Conflict(message, "delete these guests first (`nohype guest delete NAME`)")
        if not os.path.lexists(store / name):
            raise NotFound(f"no guest image {name!r} in {store}: it was deleted meanwhile")
        if is_folder(store / name):
            (store / name).rename(temporary / "old")
        else:
            (store / name).unlink()
        sync_path(store)
        return _take_unused(store, users, temporary)


def collect(store: Path, read_users: ReadUsers) -> tuple[str, ...]:
    """Removes the builds that neither a name nor a guest needs; returns their folder names.

    If ``read_users`` raises, it removes none.
    """
    if not store.is_dir():
        return ()
    with _temporary(store, "remove unused builds") as temporary, removing_builds(store):
        return _take_unused(store, tuple(read_users()), temporary)


def find_unused(store: Path, users: Users) -> tuple[str, ...]:
    """The builds that `collect` would remove."""
    kept = {link_target(store / name) for name in image_names(store)}
    kept |= {build_folder(store, ref.hash).name for _, ref in users if ref.hash}
    return tuple(name for name in list_builds(store) if name not in kept)


def check_name(name: str) -> str:
    """Raises ImageError if the manager would not accept it as an image's name."""
    try:
        return parse_guest_name(name)
    except RequestError:
        hint = "use 1 to 40 characters of a-z, 0-9 and inner hyphens"
        raise ImageError(f"invalid image name {name[:100]!r}", hint) from None


def _take(source: Image, target: Path, name: str, take: Callable[[Path, Path], tuple[int, str]]) -> str:
    """Copies or moves the files of a build, writes their hashes into its description and returns the hash of the build."""
    target.mkdir()
    target.chmod(0o755)
    records = {}
    for entry in sorted(os.scandir(source.folder), key=lambda entry: entry.name):
        if entry.name == FILE:
            continue
        if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            raise ImageError(f"cannot install the guest image {name}: {entry.path} is not a regular file", "remove it")
        size, digest = take(Path(entry.path), target / entry.name)
        records[entry.name] = FileRecord(size=size, sha256=digest)
    _compare(source, records, name)
    fields = {field: getattr(source, field) for field in Description.model_fields}
    draft = Description.model_validate({**fields, "files": records})
    build = hash_content(draft.model_dump(mode="json"))
    write_description(target, draft.model_copy(update={"hash": build}))
    (target / FILE).chmod(0o644)
    sync_path(target / FILE)
    sync_path(target)
    return build


def _compare(source: Image, records: dict[str, FileRecord], name: str) -> None:
    """What the build says of its files must be true."""
    expected = dict(source.files)
    for file, record in sorted(expected.items()):
        if records.get(file) != record:
            raise _differs(name, file, record, records.get(file))
    if source.disk and (found := records[DISK]) != (said := FileRecord(size=source.disk.size, sha256=source.disk.sha256)):
        raise _differs(name, DISK, said, found)


def _differs(name: str, file: str, expected: FileRecord, found: FileRecord | None) -> ImageError:
    shown = f"{found.size} bytes, SHA-256 {found.sha256[:12]}" if found else "no such file"
    message = f"cannot install the guest image {name}: {file} is not the file that {FILE} describes"
    return ImageError(
        f"{message}: expected {expected.size} bytes, SHA-256 {expected.sha256[:12]}; found {shown}", "build it again"
    )


def _is_intact(folder: Path) -> bool:
    try:
        return is_folder(folder) and not any(result.problem for result in verify(read_image(folder)))
    except (ImageError, OSError):
        return False


def _check_replaceable(store: Path, name: str) -> None:
    old = store / name
    if os.path.lexists(old) and link_target(old) is None and not is_folder(old):
        message = f"cannot install the guest image {name}: {old} is neither a folder nor a link to a build in {store / BUILDS}"
        raise ImageError(message, "move it away, then try again")


def _link(store: Path, name: str, build: str, temporary: Path) -> None:
    """Within `removing_builds`. A folder of an earlier version becomes a build: guests may have been created from it."""
    old = store / name
    _check_replaceable(store, name)
    is_old_folder = is_folder(old)
    link = temporary / (f"{_RESTORE}{name}" if is_old_folder else "link")
    link.symlink_to(f"{BUILDS}/{build_folder(store, build).name}")
    if is_old_folder:
        sync_path(temporary)
        _keep_build(store, old, temporary)
    os.replace(link, old)
    sync_path(store)


def _keep_build(store: Path, old: Path, temporary: Path) -> None:
    try:
        target = build_folder(store, read_image(old).hash)
    except ImageError:  # no guest can start from it
        target = temporary / "old"
    old.rename(temporary / "old" if is_folder(target) else target)


def _take_unused(store: Path, users: Users, temporary: Path) -> tuple[str, ...]:
    """Within `removing_builds`: a rename is fast, the removal of files comes later."""
    unused = find_unused(store, users)
    for name in unused:
        (store / BUILDS / name).rename(temporary / f"build-{name}")
    return unused


def _remove_leftovers(store: Path) -> None:
    """Within `changing_store`. Completes the replacement of an old folder by a link, which takes two renames."""
    for leftover in store.glob(f"{_TEMPORARY}*"):
        for link in leftover.glob(f"{_RESTORE}*") if is_folder(leftover) else ():
            name, target = link.name.removeprefix(_RESTORE), link_target(link)
            if target and is_folder(store / BUILDS / target) and not os.path.lexists(store / name):
                link.rename(store / name)
        remove_tree(leftover)


@contextmanager
def _temporary(store: Path, what: str) -> Iterator[Path]:
    """A folder in the store, which exists while no other program changes the store. Makes the store.

    Errors of the file system become ImageErrors; ``what`` is verb and object.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        with changing_store(store):
            _remove_leftovers(store)
            temporary = Path(mkdtemp(prefix=_TEMPORARY, dir=store))
            try:
                yield temporary
            finally:
                remove_tree(temporary)
    except OSError as error:
        hint = "free some space on its disk" if error.errno == ENOSPC else "run as root, or give the path of another store"
        raise ImageError(f"cannot {what} in {store}: {error.strerror or error}", hint) from None
