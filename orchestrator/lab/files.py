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

# One entry per file: type, size, mode, times, inode number, name. LC_ALL=C, as comm(1) needs the order of bytes.
_LIST = "find . -mindepth 1 -printf '%y %s %m %T@ %C@ %i\\t%P\\0' | sort -z"
_SETUP = "export LC_ALL=C TMPDIR=/run; set -o pipefail"
_PACK = "tar --create --format=posix --pax-option=delete=atime,delete=ctime --hard-dereference --no-recursion"
_UNPACK = "tar --extract --no-same-owner --same-permissions --warning=no-unknown-keyword --warning=no-timestamp"


@contextmanager
def packed(folder: Path) -> Iterator[IO[bytes]]:
    """A tar file of a folder; without sockets, devices, pipes, and the content of other file systems.

    Raises LabError if a file cannot be read, and if the files are larger than SEND_LIMIT.
    """
    with TemporaryFile(dir=_ON_DISK) as file:
        try:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                room = SEND_LIMIT.bytes
                for path, name in _walk(folder, os.stat(folder).st_dev, PurePosixPath()):
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
    names = f"{_LIST} | comm -z -13 {shlex.quote(f'{source}.before')} - | sed -z 's/^[^\\t]*\\t//'"
    return _receive(lab, f"cd {shlex.quote(source)} && {names} | {_PACK} --null --files-from=- --file=-", target)


def receive(lab: Lab, source: str, target: Path) -> int:
    """Copies a file or a folder of the lab host to ``target``, a folder; returns the number of files."""
    path = PurePosixPath(source)
    parent, name = shlex.quote(str(path.parent)), shlex.quote(f"./{path.name}")
    return _receive(
        lab,
        f"cd {parent} && stat {name} > /dev/null || exit 2; find {name} -print0 | {_PACK} --null --files-from=- --file=-",
        target,
    )


def _receive(lab: Lab, line: str, target: Path) -> int:
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
                raise LabError(f"cannot copy files from lab {lab.name}: they are larger than {RECEIVE_LIMIT}")
            file.write(data)

        try:
            done = execute(lab, f"{_SETUP}; {line}", timeout=TIMEOUT, stream=take)
        except OSError as error:
            raise LabError(f"cannot store files of lab {lab.name} in {_ON_DISK}: {error.strerror}", "free space there") from None
        # find(1) and tar(1) exit with 1 if a file has gone or changed meanwhile: some program may still be running.
        if done.status > 1:
            text = b"".join(errors).decode(errors="replace").strip()
            raise LabError(f"cannot copy files from lab {lab.name}: {text}")
        file.seek(0)
        return unpack(file, target)


def unpack(archive: IO[bytes], target: Path) -> int:
    """Writes the entries of a tar file below a folder, for its owner; returns the number of files.

    Continues after an entry that cannot be written, and then raises LabError. Setuid bits are not kept.
    """
    failed: list[str] = []
    count = 0
    try:
        _make_folder(target)
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(f"cannot write to {target}: {error.strerror}", "choose another folder") from None
    try:
        owner = os.fstat(root)
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for entry in tar:
                try:
                    with _opened_parent(root, entry.name) as place:
                        count += place is not None and _write(tar, entry, place, owner)
                except OSError as error:
                    failed.append(f"{entry.name}: {error.strerror or error}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise LabError(f"the lab host sent an invalid tar file: {error}") from None
    finally:
        os.close(root)
    if failed:
        shown = "".join(f"\n    {text!r}"[:200] for text in failed[:_NAMED])
        raise LabError(f"cannot write {len(failed)} files of the lab to {target}:{shown}", "check the folder and its disk")
    return count


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
def _opened_parent(root: int, name: str) -> Iterator[_Place | None]:
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
        shutil.copyfileobj(content, file)
        if file.tell() != entry.size:
            raise tarfile.ReadError("it ends within a file")
        os.fchmod(descriptor, mode)


def _find_mode(place: _Place) -> int | None:
    try:
        return os.stat(place.name, dir_fd=place.folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _walk(folder: Path, device: int, inside: PurePosixPath) -> Iterator[tuple[str, str]]:
    """Path and name within the archive of all entries below a folder."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        yield entry.path, str(inside / entry.name)
        if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_dev == device:
            yield from _walk(Path(entry.path), device, inside / entry.name)


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
