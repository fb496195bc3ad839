"""Copies files from and to a host over SFTP. A target name exists only when its copy is complete."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import paramiko

from orchestrator.errors import ShellError
from orchestrator.ssh.login import Login
from orchestrator.ssh.transport import FAILURES, ConnectionLost, explain

_REQUESTS = 64  # of 32 KB in progress: more only need memory
_DEPTH = 64

Progress = Callable[[str, int, int], object]
"""Gets the name of a file, and how many of its bytes were copied."""


class Transfer:
    """Copies over one SFTP session. Methods raise ShellError."""

    def __init__(self, login: Login, progress: Progress) -> None:
        self._target, self._progress = login.target, progress
        try:
            client = paramiko.SFTPClient.from_transport(login.transport)
        except FAILURES as error:
            reason = explain(error)
            hint = "install an SFTP server in the guest (Debian: openssh-sftp-server)"
            raise ShellError(f"{login.target} offers no SFTP: {reason}", hint) from None
        assert client is not None  # only for a channel that was not opened
        self._sftp = client

    def upload(self, local: Path, remote: str, *, recursive: bool) -> None:
        """Copies to a file name, or into a folder that exists."""
        with self._explained(f"copy {local} to {remote}"):
            target = PurePosixPath(remote or ".")
            if self._is_remote_folder(str(target)):
                target /= local.absolute().name
            elif remote.endswith("/"):
                raise ShellError(f"{self._target}: {remote} is not a directory", "create it first")
            if local.is_dir():
                _check_recursive(str(local), recursive=recursive)
                self._upload_folder(local, target)
            else:
                self._upload_file(local, target)

    def download(self, remote: str, local: Path, *, recursive: bool) -> None:
        """Copies to a file name, or into a folder that exists."""
        with self._explained(f"copy {remote} to {local}"):
            target = local / PurePosixPath(remote).name if local.is_dir() else local
            status = self._sftp.stat(remote or ".")
            if stat.S_ISDIR(status.st_mode or 0):
                _check_recursive(remote, recursive=recursive)
                self._download_folder(remote or ".", target, 0)
            else:
                self._download_file(remote, target, status)

    def _upload_folder(self, local: Path, target: PurePosixPath) -> None:
        if not self._is_remote_folder(str(target)):
            self._sftp.mkdir(str(target), local.stat().st_mode & 0o777 | stat.S_IRWXU)
        for entry in sorted(local.iterdir()):
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise ShellError(f"{entry} is neither a regular file nor a directory", "remove it, or copy the files one by one")
            if entry.is_dir():
                self._upload_folder(entry, target / entry.name)
            else:
                self._upload_file(entry, target / entry.name)

    def _upload_file(self, local: Path, target: PurePosixPath) -> None:
        part = str(target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part"))
        with local.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ShellError(f"{local} is not a regular file", "copy a regular file")
            try:
                # Raises OSError if the host then has another size.
                self._sftp.putfo(file, part, status.st_size, self._report(target.name))
                self._sftp.chmod(part, status.st_mode & 0o777)
                self._rename(part, str(target))
            except BaseException:
                with suppress(*FAILURES):
                    self._sftp.remove(part)
                raise

    def _rename(self, part: str, target: str) -> None:
        try:
            self._sftp.posix_rename(part, target)
        except OSError:
            # Without this extension of OpenSSH a rename does not replace a file (draft-ietf-secsh-filexfer-02 6.5).
            with suppress(FileNotFoundError):
                self._sftp.remove(target)
            self._sftp.rename(part, target)

    def _download_folder(self, remote: str, target: Path, depth: int) -> None:
        if depth > _DEPTH:
            raise ShellError(f"{self._target}: {remote} is more than {_DEPTH} directories deep")
        target.mkdir(exist_ok=True)
        for entry in sorted(self._sftp.listdir_attr(remote), key=lambda entry: entry.filename):
            name, mode = entry.filename, entry.st_mode or 0
            # The names come from the guest: none may lead out of the folder.
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                raise ShellError(f"{self._target} lists an invalid file name in {remote}: {name!r}")
            if stat.S_ISDIR(mode):
                if (target / name).is_symlink():
                    raise ShellError(
                        f"{target / name} is a symbolic link, not a directory", "remove it, or copy to another directory"
                    )
                self._download_folder(f"{remote}/{name}", target / name, depth + 1)
            elif stat.S_ISREG(mode):
                self._download_file(f"{remote}/{name}", target / name, entry)
            else:
                raise ShellError(f"{self._target}: {remote}/{name} is neither a regular file nor a directory")

    def _download_file(self, remote: str, target: Path, status: paramiko.SFTPAttributes) -> None:
        if not stat.S_ISREG(status.st_mode or 0):
            raise ShellError(f"{self._target}: {remote} is not a regular file", "copy a regular file")
        part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
        mode = (status.st_mode or 0) & 0o777 & ~_read_umask()
        # Exclusive: a symbolic link of this name is not followed.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                report = self._report(target.name)
                # Raises OSError if the file has changed its size meanwhile.
                self._sftp.getfo(remote, file, report, max_concurrent_prefetch_requests=_REQUESTS)
                os.fchmod(file.fileno(), mode)
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _is_remote_folder(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(self._sftp.stat(path).st_mode or 0)
        except FileNotFoundError:
            return False

    def _report(self, name: str) -> Callable[[int, int], object]:
        return lambda done, size: self._progress(name, done, size)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            reason = error.strerror or explain(error)
            raise ShellError(f"cannot {what} on {self._target}: {name}{reason}") from None
        except (paramiko.SSHException, EOFError) as error:
            raise ConnectionLost(f"cannot {what}: connection to {self._target} lost: {explain(error)}") from None


def _check_recursive(path: str, *, recursive: bool) -> None:
    if not recursive:
        raise ShellError(f"{path} is a directory", "copy it with --recursive")


def _read_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
