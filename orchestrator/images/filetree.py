"""Reads folders and files of the file systems in an image: ext4 with debugfs, FAT with mtools, both in the sandbox.

The programs get inode numbers, or names of a few safe characters: no text from an image becomes a part of a command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.images.partitions import Volume
from orchestrator.images.sandbox import Limits, run_confined
from orchestrator.values import Size

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~-]{0,254}")
_LINE = re.compile(r"/(\d+)/(\d{6})/\d+/\d+/([^/]*)/(\d*)/")  # inode, mode, owner, group, name, size
_LINK = re.compile(r'^Fast link dest: "([^"\n]*)"$', re.MULTILINE)
_ROOT = 2  # inode of an ext4 root folder
_MAX_LINKS = 20
_MAX_LINK_TEXT = 4096


@dataclass(frozen=True)
class Entry:
    name: str
    kind: str  # "file", "folder", "link" or "special"
    size: int  # bytes; 0 if the program does not tell
    inode: int = 0  # of ext4


@dataclass(frozen=True)
class FileTree:
    """A file system in the raw image ``disk``, a file of the folder ``work``."""

    work: Path
    disk: str
    volume: Volume
    _listed: dict[int, tuple[Entry, ...]] = field(default_factory=dict, compare=False, repr=False)

    def list(self, path: str) -> tuple[Entry, ...]:
        """Entries with safe names of a folder; () if it does not exist. Links on the way are followed."""
        if self.volume.kind == "fat":
            return self._list_fat(path)
        entry = self.find(path)
        return self._list_inode(entry.inode) if entry and entry.kind == "folder" else ()

    def find(self, path: str) -> Entry | None:
        """The file or folder, with links followed inside of the image; None if it does not exist.

        Raises ImageError for a link that leads nowhere allowed: an endless chain, or a target with unsafe characters.
        """
        if self.volume.kind == "fat":
            folder, _, name = path.strip("/").rpartition("/")
            return next((entry for entry in self._list_fat(folder) if entry.name == name), None)
        todo, done, links = path.strip("/").split("/"), [Entry("", "folder", 0, _ROOT)], 0
        while todo:
            name = todo.pop(0)
            if name in ("", "."):
                continue
            if name == "..":
                done = done[:-1] or done  # the parent of the root is the root: no link leaves the image
                continue
            if done[-1].kind != "folder":
                return None
            entry = next((entry for entry in self._list_inode(done[-1].inode) if entry.name == name), None)
            if entry is None:
                return None
            if entry.kind != "link":
                done.append(entry)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise ImageError(f"cannot read {path} of the image: too many symbolic links (a loop?)")
            target = self._read_link(path, entry)
            done = done[:1] if target.startswith("/") else done
            todo = [*target.split("/"), *todo]
        return done[-1]

    def read_text(self, path: str, *, limit: int = 64 << 10) -> str:
        """The text of a small file; empty if it does not exist or is not a file."""
        entry = self.find(path)
        if entry is None or entry.kind != "file" or entry.size > limit:
            return ""
        return self._run(f"cat <{entry.inode}>", Limits(output=limit)) if self.volume.kind == "ext4" else ""

    def copy(self, path: str, target: str, *, limit: int) -> None:
        """Copies a file into the file ``target`` of ``work``. Raises ImageError unless all of a regular file was read."""
        entry = self.find(path)
        if entry is None or entry.kind != "file":
            found = f"is a {entry.kind}, expected a file" if entry else "does not exist in this file system"
            raise ImageError(f"cannot copy {path} out of the image: it {found}")
        if entry.size > limit:
            raise ImageError(f"cannot copy {path} out of the image: {entry.size} bytes, the limit is {Size(limit)}")
        limits = Limits(output=limit)
        if self.volume.kind == "fat":
            source = ["mcopy", "-n", "-i", self._place("@@"), f"::/{path.strip('/')}", "-"]
            done = run_confined(self.work, source, limits=limits, output=target)
        else:
            argv = ["debugfs", "-R", f"cat <{entry.inode}>", self._place("?offset=")]
            done = run_confined(self.work, argv, limits=limits, output=target)
        size = (self.work / target).stat().st_size
        if done.status or self._find_problem(done.stderr) or not size or (entry.size and size != entry.size):
            expected = f", expected {entry.size}" if entry.size else ""
            raise ImageError(
                f"cannot copy {path} out of the image: {size} bytes were read{expected} (damaged file system?)",
                "check the image with e2fsck or fsck.fat where it was made",
            )

    def _list_inode(self, inode: int) -> tuple[Entry, ...]:
        if inode in self._listed:
            return self._listed[inode]
        entries = []
        for line in self._run(f"ls -p <{inode}>", Limits()).splitlines():
            if (match := _LINE.fullmatch(line)) and _SAFE.fullmatch(match[3]):
                entries.append(Entry(match[3], _kind(int(match[2], 8)), int(match[4] or 0), int(match[1])))
        self._listed[inode] = tuple(entries)
        return self._listed[inode]

    def _read_link(self, path: str, entry: Entry) -> str:
        status = self._run(f"stat <{entry.inode}>", Limits())
        match = _LINK.search(status)
        if match or "Fast link dest:" in status:  # kept in the inode
            target = match[1] if match else ""
        else:
            target = self._run(f"cat <{entry.inode}>", Limits(output=_MAX_LINK_TEXT))
        parts = [part for part in target.split("/") if part not in ("", ".", "..")]
        if not parts or len(target) > _MAX_LINK_TEXT or not all(_SAFE.fullmatch(part) for part in parts):
            raise ImageError(f"cannot read {path} of the image: the target of its symbolic link has unusual characters")
        return target

    def _list_fat(self, path: str) -> tuple[Entry, ...]:
        argv = ["mdir", "-b", "-a", "-i", self._place("@@"), f"::/{path.strip('/')}"]
        entries = []
        for line in run_confined(self.work, argv, limits=Limits()).stdout.splitlines():
            folder, name = line.endswith("/"), line.rstrip("/").rpartition("/")[2]
            if line.startswith("::/") and _SAFE.fullmatch(name):
                entries.append(Entry(name, "folder" if folder else "file", 0))
        return tuple(entries)

    def _run(self, command: str, limits: Limits) -> str:
        done = run_confined(self.work, ["debugfs", "-R", command, self._place("?offset=")], limits=limits)
        if problem := self._find_problem(done.stderr):
            raise ImageError(
                f"cannot read {self.volume.name} of the image: damaged file system: {problem}",
                "check the image with e2fsck where it was made",
            )
        return done.stdout

    @staticmethod
    def _find_problem(stderr: str) -> str:
        """debugfs exits with 0 after most errors. It prints its version first."""
        return next((line[:200] for line in stderr.splitlines() if line and not line.startswith("debugfs 1.")), "")

    def _place(self, separator: str) -> str:
        return f"/work/{self.disk}{separator}{self.volume.start}"


def _kind(mode: int) -> str:
    return {0o100000: "file", 0o040000: "folder", 0o120000: "link"}.get(mode & 0o170000, "special")
