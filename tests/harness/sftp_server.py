"""An SFTP server on a folder of this machine, which can be hostile."""

from __future__ import annotations

import os
from pathlib import Path

import paramiko


class Files(paramiko.SFTPServerInterface):
    """Serves ``root`` as the user's home directory.

    Attributes:
        lies: names that every listing has in addition.
        no_posix_rename: as a server without this extension of OpenSSH.
    """

    root: Path
    lies: tuple[str, ...] = ()
    no_posix_rename = False

    def canonicalize(self, path: str) -> str:
        return os.path.normpath(self.root / path)

    def _find(self, path: str) -> Path:
        return self.root / path

    def list_folder(self, path: str):  # type: ignore[no-untyped-def]
        try:
            found = [self._attributes(entry) for entry in self._find(path).iterdir()]
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        for name in self.lies:
            lie = paramiko.SFTPAttributes()
            lie.filename, lie.st_mode, lie.st_size = name, 0o100644, 4
            found.append(lie)
        return found

    def stat(self, path: str):  # type: ignore[no-untyped-def]
        return self._status(path, follow=True)

    def lstat(self, path: str):  # type: ignore[no-untyped-def]
        return self._status(path, follow=False)

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes):  # type: ignore[no-untyped-def]
        try:
            descriptor = os.open(self._find(path), flags, 0o600)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        handle = paramiko.SFTPHandle(flags)
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        file = os.fdopen(descriptor, "r+b" if writes else "rb")
        handle.readfile = handle.writefile = file  # type: ignore[attr-defined]
        return handle

    def remove(self, path: str) -> int:
        return self._try(lambda: self._find(path).unlink())

    def rename(self, oldpath: str, newpath: str) -> int:
        if self._find(newpath).exists():
            return paramiko.SFTP_FAILURE
        return self._try(lambda: self._find(oldpath).rename(self._find(newpath)))

    def posix_rename(self, oldpath: str, newpath: str) -> int:
        if self.no_posix_rename:
            return paramiko.SFTP_OP_UNSUPPORTED
        return self._try(lambda: self._find(oldpath).replace(self._find(newpath)))

    def mkdir(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        return self._try(lambda: self._find(path).mkdir())

    def chattr(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        return self._try(lambda: self._find(path).chmod(attr.st_mode or 0))

    def _status(self, path: str, *, follow: bool):  # type: ignore[no-untyped-def]
        try:
            return paramiko.SFTPAttributes.from_stat(self._find(path).stat(follow_symlinks=follow))
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)

    def _attributes(self, entry: Path) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(entry.lstat(), entry.name)

    def _try(self, work) -> int:  # type: ignore[no-untyped-def]
        try:
            work()
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        return paramiko.SFTP_OK


def offer_files(root: Path, **attributes: object):  # type: ignore[no-untyped-def]
    """For ``prepare`` of `ssh_server.serve`."""
    kind = type("OfferedFiles", (Files,), {"root": root, **attributes})
    return lambda transport: transport.set_subsystem_handler("sftp", paramiko.SFTPServer, kind)
