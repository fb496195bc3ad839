"""Copies folders to a lab host and back, as tar files over SSH.

A lab host may run anything. What it sends back is written only below the given folder: no symbolic link is followed, and only
files, folders and symbolic links are accepted.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO

from orchestrator.errors import LabError
from orchestrator.lab.lab import Lab, execute
from orchestrator.values import Size

SEND_LIMIT = Size(1 << 30)
"""The root file system of a lab has little more room."""
RECEIVE_LIMIT = Size(8 << 30)
TIMEOUT = 900
_ON_DISK = "/var/tmp"  # /tmp may be in memory
_NAMED = 5  # entries of a list of errors
_SHOWN = 500  # bytes of a program's errors
_READ_LIMIT = 1 << 17  # bytes at once, also of a header, which tarfile reads as a whole; names have up to 4 KB

_COPIED = "'(' -type f -o -type d -o -type l ')'"
# One entry per file: type, size, mode, times, inode number, name. LC_ALL=C, as comm(1) needs the order of bytes.
_LIST = f"find . -mindepth 1 -ignore_readdir_race -xdev {_COPIED} -printf '%y %s %m %T@ %C@ %i\\t%P\\0' | sort -z"
_SETUP = "export LC_ALL=C TMPDIR=/run; set -o pipefail"
_PACK = "tar --create --format=posix --pax-option=delete=atime,delete=ctime --hard-dereference --no-recursion"
_UNPACK = "tar --extract --no-same-owner --same-permissions --warning=no-unknown-keyword --warning=no-timestamp"


@contextmanager
def packed(folder: Path, *, without: Path | None = None) -> Iterator[IO[bytes]]:
    """A tar file of a folder; without sockets, devices, pipes, the content of other file systems, and the folder ``without``.

    Raises LabError if a file cannot be read, and if the files are larger than SEND_LIMIT.
    """
    with TemporaryFile(dir=_ON_DISK) as file:
        try:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                room = SEND_LIMIT.bytes
                skipped = os.stat(without) if without and without.exists() else None
                for path, name in _walk(folder, os.stat(folder).st_dev, skipped, PurePosixPath()):
                    room -= os.lstat(path).st_size
                    if room < 0:
                        raise LabError(f"cannot copy {folder}: its files are larger than {SEND_LIMIT}", "copy a smaller folder")
                    _add(tar, path, name)
        except OSError as error:
            where = error.filename or folder
            raise LabError(f"cannot copy {where}: {error.strerror or error}", "check the permissions and the disk") from None
        file.seek(0)
        yield file


def send(lab: Lab, archive: IO[bytes], target: str) -> None:
    """Unpacks a tar file in a folder of the lab host, and notes beside it what it then holds, for `receive_changed`."""
    folder, before = shlex.quote(target), shlex.quote(f"{target}.before")
    line = f"{_SETUP}; mkdir -p {folder} && cd {folder} && {_UNPACK} --file=- && {_LIST} > {before}"
    done = execute(lab, line, timeout=TIMEOUT, input=archive)
    if done.status:
        raise LabError(f"cannot copy files to {target} in lab {lab.name}: {done.stderr.strip()[-_SHOWN:]}")


def receive_changed(lab: Lab, source: str, target: Path) -> int:
    """Copies files that are new or changed since `send`; returns their number. Files that were removed stay at ``target``."""
    # Sorted by name, so that a folder comes before what is in it.
    names = f"{_LIST} | comm -z -13 {shlex.quote(f'{source}.before')} - | sed -z 's/^[^\\t]*\\t//' | sort -z"
    return _receive(lab, source, names, target)


def receive(lab: Lab, source: str, target: Path) -> int:
    """Copies a file or a folder of the lab host to ``target``, a folder; returns the number of files."""
    path = PurePosixPath(source)
    name, refusal = shlex.quote(f"./{path.name}"), shlex.quote(f"{source} is neither a file, a folder nor a symbolic link")
    check = f"[ -f {name} ] || [ -d {name} ] || [ -L {name} ] || fail {refusal}"
    return _receive(lab, str(path.parent), f"{check}\nfind {name} {_COPIED} -print0", target)


def _receive(lab: Lab, folder: str, names: str, target: Path) -> int:
    """``names``: lines of shell, the last of which writes names of files below ``folder`` that end with a zero byte."""
    # The list is written before tar(1) starts. Its status 1 is not an error: a file has changed while tar read it.
    line = f"""{_SETUP}
fail() {{ echo "$1" >&2; exit 2; }}
cd {shlex.quote(folder)} 2> /dev/null || fail {shlex.quote(f"the folder {folder} does not exist there")}
names=$(mktemp) || exit 2
trap 'rm -f "$names"' EXIT
{names} > "$names" || exit 2
{_PACK} --null --files-from="$names" --file=-"""
    errors: list[bytes] = []
    received = 0
    with TemporaryFile(dir=_ON_DISK) as file:

        def take(name: str, data: bytes) -> None:
            nonlocal received
            if name == "stderr":
                errors[:] = [b"".join([*errors, data])[-_SHOWN:]]
                return
            received += len(data)
            if received > RECEIVE_LIMIT.bytes:
                raise LabError(
                    f"cannot copy files from lab {lab.name}: they are larger than {RECEIVE_LIMIT}",
                    "remove large files in the command; a sparse file counts with its whole length",
                )
            file.write(data)

        try:
            done = execute(lab, line, timeout=TIMEOUT, stream=take)
        except OSError as error:
            raise LabError(f"cannot store files of lab {lab.name} in {_ON_DISK}: {error.strerror}", "free space there") from None
        if done.status > 1:
            text = b"".join(errors).decode(errors="replace").strip()
            raise LabError(f"cannot copy files from lab {lab.name}: {text}")
        file.seek(0)
        return unpack(file, target)


def unpack(archive: IO[bytes], target: Path) -> int:
    """Writes the entries of a tar file below a folder, for its owner; returns the number of files.

    Continues after an entry that cannot be written, and then raises LabError. Setuid bits are not kept.
    """
    try:
        _make_folder(target)
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(f"cannot write to {target}: {error.strerror}", "choose another folder") from None
    try:
        count, failed, first = _write_all(archive, root)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise LabError(f"the lab host sent an invalid tar file: {error}") from None
    finally:
        os.close(root)
    if failed:
        shown = "".join(f"\n    {text!r}"[:200] for text in first)
        what = "1 file" if failed == 1 else f"{failed} files"
        raise LabError(f"cannot write {what} of the lab to {target}:{shown}", "check the folder and its disk")
    return count


class _Limited(RawIOBase):
    """A tar file whose reader gets no large blocks: a lab host may send a header of gigabytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _READ_LIMIT:
            raise tarfile.ReadError("it has a header that is too large")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)


def _write_all(archive: IO[bytes], root: int) -> tuple[int, int, list[str]]:
    """Returns the numbers of files and of entries that cannot be written, and the errors of the first of these."""
    count = failed = 0
    first: list[str] = []
    owner = os.fstat(root)
    with tarfile.open(fileobj=_Limited(archive), mode="r:") as tar:
        while entry := tar.next():
            try:
                with _opened_parent(root, entry.name, owner) as place:
                    count += place is not None and _write(tar, entry, place, owner)
            except (OSError, ValueError, OverflowError) as error:  # ValueError: a name with a zero byte, or an invalid time
                failed += 1
                if failed <= _NAMED:
                    reason = (error.strerror if isinstance(error, OSError) else "") or error
                    first.append(f"{entry.name}: {reason}")
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all entries in memory
            tar.pax_headers = {}
    return count, failed, first


def _make_folder(target: Path) -> None:
    """For the owner of the folder that it is in: this program runs as root, its user may not."""
    if target.is_dir():
        return
    if not target.parent.is_dir():
        _make_folder(target.parent)
    target.mkdir(exist_ok=True)
    owner = target.parent.stat()
    os.chown(target, owner.st_uid, owner.st_gid)


@dataclass(frozen=True)
class _Place:
    folder: int  # descriptor
    name: str


@contextmanager
def _opened_parent(root: int, name: str, owner: os.stat_result) -> Iterator[_Place | None]:
    """The folder of an entry, created if it does not exist; None for the root. Raises OSError for a name that leads elsewhere."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        raise OSError("the name leads out of the folder")
    if not parts:
        yield None
        return
    folder = os.dup(root)
    try:
        for part in parts[:-1]:
            with suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=folder)
                os.chown(part, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield _Place(folder, parts[-1])
    finally:
        os.close(folder)


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, place: _Place, owner: os.stat_result) -> bool:
    """Returns whether the entry is a file. A file replaces another one in one step."""
    folder, mode = place.folder, entry.mode & 0o777
    if entry.isdir():
        found = _find_mode(place)
        if found is not None and not stat.S_ISDIR(found):
            os.unlink(place.name, dir_fd=folder)
            found = None
        if found is None:
            os.mkdir(place.name, mode | stat.S_IRWXU, dir_fd=folder)
            os.chown(place.name, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)
        return False
    if not (entry.isreg() or entry.issym()) or entry.issparse():
        raise OSError("neither a file, a folder nor a symbolic link")
    part = f".{secrets.token_hex(8)}.part"
    try:
        if entry.issym():
            os.symlink(entry.linkname, part, dir_fd=folder)
        else:
            _write_file(tar, entry, part, folder, mode)
        os.chown(part, owner.st_uid, owner.st_gid, dir_fd=folder, follow_symlinks=False)
        os.utime(part, (entry.mtime, entry.mtime), dir_fd=folder, follow_symlinks=False)
        os.rename(part, place.name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part, dir_fd=folder)
        raise
    return True


def _write_file(tar: tarfile.TarFile, entry: tarfile.TarInfo, name: str, folder: int, mode: int) -> None:
    content = tar.extractfile(entry)
    assert content  # of a regular file
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(content, file, _READ_LIMIT)
        if file.tell() != entry.size:
            raise tarfile.ReadError("it ends within a file")
        os.fchmod(descriptor, mode)


def _find_mode(place: _Place) -> int | None:
    try:
        return os.stat(place.name, dir_fd=place.folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _walk(folder: Path, device: int, skipped: os.stat_result | None, inside: PurePosixPath) -> Iterator[tuple[str, str]]:
    """Path and name within the archive of all entries below a folder."""
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if skipped and os.path.samestat(status, skipped):
            continue
        yield entry.path, str(inside / entry.name)
        if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
            yield from _walk(Path(entry.path), device, skipped, inside / entry.name)


def _add(tar: tarfile.TarFile, path: str, name: str) -> None:
    info = tar.gettarinfo(path, name)
    if info is None or not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        return
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    if not info.isreg():
        tar.addfile(info)
        return
    with open(path, "rb") as file:
        tar.addfile(info, file)
