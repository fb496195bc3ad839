"""Records on the server what was there before the role changes it, and restores that.

The record is a folder: record.json, the contents of files in originals/, and before.json, a listing to compare with at the end.
An entry that exists is never replaced, so what a second run records is still the state before the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: nohype_record
short_description: Record the state before a change, and restore it
options:
  state: {choices: [recorded, sealed, checked, undone, accounts, compared], default: recorded}
  folder: {type: path, default: /var/lib/nohype-setup}
  root: {type: path, default: /}
  paths: {type: list, elements: path, description: Files, links and folders that will be changed}
  trees: {type: list, elements: path, description: Folders that belong to NoHype as a whole if they do not exist yet}
  accounts: {type: list, elements: str, description: Users and groups that will be created}
  packages: {type: list, elements: str, description: Packages that will be installed}
  begin: {type: bool, default: false, description: The first call of a run}
"""

# Changed by programs that manage accounts, libraries and time, also where nothing is left of a package.
_VOLATILE = frozenset(
    f"etc/{name}"
    for name in (
        ".pwd.lock", ".updated", "adjtime", "group", "group-", "gshadow", "gshadow-", "ld.so.cache", "machine-id", "mtab",
        "passwd", "passwd-", "resolv.conf", "shadow", "shadow-", "subgid", "subgid-", "subuid", "subuid-",
    )
)  # fmt: skip
_LISTED = ("etc", "opt", "usr/local")
_LARGE = 16 << 20  # bytes: of larger files the listing has size and time only
MOUNTS = Path("/proc/self/mountinfo")
CMDLINE, CMDLINE_BASE = "/etc/kernel/cmdline", "/etc/nohype/kernel.cmdline.base"
_EDITED = "# changed by others"  # in the base: nohype_boot.py writes it
_NOTES = ("sealed", "foreign", "waited")  # of an entry, besides what was there

_EMPTY = {"version": 1, "open": False, "files": {}, "trees": [], "accounts": {}, "packages": []}

Entry = dict[str, Any]


def read_entry(path: Path) -> Entry:
    """What is there: kind, mode, owner, and the digest of a file or the target of a link."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return {"kind": "absent"}
    if stat.S_ISLNK(found.st_mode):
        return {"kind": "link", "target": os.readlink(path)}
    owner = {"mode": stat.S_IMODE(found.st_mode), "uid": found.st_uid, "gid": found.st_gid}
    if stat.S_ISREG(found.st_mode):
        digest = hashlib.sha256()  # the server's Python may be too old for file_digest
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        return {"kind": "file", **owner, "digest": digest.hexdigest()}
    return {"kind": "folder" if stat.S_ISDIR(found.st_mode) else "other", **owner}


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    fresh = path.with_name(f".{path.name}.nohype-new")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.chmod(mode)
    fresh.replace(path)


class Record:
    """The record of one server. Each change is on disk when a method returns."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        file = folder / "record.json"
        self.exists = file.exists()
        self.data: dict[str, Any] = json.loads(file.read_text()) if self.exists else dict(_EMPTY, files={}, accounts={})
        if self.data["version"] != 1:
            raise ValueError(f"{file} was written by another version ({self.data['version']}): use the playbooks of that version")
        self._text = self._encode() if self.exists else ""

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def save(self, *, dry: bool) -> bool:
        """Whether something is new."""
        text = self._encode()
        if text == self._text:
            return False
        if not dry:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self.folder / "record.json", text.encode())
            self._text = text
        return True

    def _encode(self) -> str:
        return json.dumps(self.data, indent=1, sort_keys=True) + "\n"

    def add(self, given: dict[str, Any], *, dry: bool) -> bool:
        """Adds what is not recorded yet. With ``begin``: whether the last run was interrupted."""
        interrupted = bool(self.data["open"])
        if given["begin"]:
            if not interrupted:
                self._mark_foreign()
            self.data["open"] = True
        if not self.exists and not dry:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self.folder / "before.json", json.dumps(list_server(self.root), sort_keys=True).encode())
            self.exists = True
        new = [path for path in given["trees"] if not self.at(path).exists()]
        self.data["trees"] = sorted({*self.data["trees"], *new})
        # with the folders above, which Ansible creates too
        above = [
            str(folder) for path in (*new, *given["paths"]) for folder in Path(path).parents if not self.at(str(folder)).exists()
        ]
        for path in (*above, *given["paths"]):
            if path not in self.data["files"] and not any(f"{path}/".startswith(f"{tree}/") for tree in self.data["trees"]):
                self._add_path(path, dry=dry)
        for kind, known in (("users", self.names("passwd")), ("groups", self.names("group"))):
            present = self.data["accounts"].setdefault(kind, {})
            for name in given["accounts"]:
                present.setdefault(name, name in known)
        self.data["packages"] = sorted({*self.data["packages"], *given["packages"]})
        self.save(dry=dry)
        return interrupted

    def _mark_foreign(self) -> None:
        """Files that existed before the role, and that another program has changed since the last run."""
        for path, entry in self.data["files"].items():
            if entry["kind"] != "absent" and "sealed" in entry and read_entry(self.at(path)) != entry["sealed"]:
                entry["foreign"] = True

    def names(self, database: str) -> set[str]:
        file = self.at(f"/etc/{database}")
        return {line.split(":")[0] for line in file.read_text().splitlines()} if file.exists() else set()

    def _add_path(self, path: str, *, dry: bool) -> None:
        found = read_entry(self.at(path))
        if found["kind"] == "other":
            raise ValueError(f"{path} is neither a file nor a folder nor a link: move it away")
        if found["kind"] == "file" and not dry:
            originals = self.folder / "originals"
            originals.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(originals / found["digest"], self.at(path).read_bytes())
        self.data["files"][path] = found

    def seal(self, *, dry: bool) -> bool:
        """Remembers what the role has written: a later difference was made by another program or person."""
        for path, entry in self.data["files"].items():
            if not entry.get("foreign"):
                entry["sealed"] = read_entry(self.at(path))
        self.data["open"] = False
        return self.save(dry=dry)

    def undo(self, *, dry: bool) -> tuple[list[str], list[str], list[str]]:
        """Restores all paths, the deepest first; returns what was restored, why what was left, and folders that others use.

        What is restored leaves the record: packages that are removed afterwards take their files along. A folder whose files
        are still there at the next call holds files of others: it stays, which is no failure.
        """
        done: list[str] = []
        left: list[str] = []
        used: list[str] = []
        paths = sorted(self.data["files"], key=lambda name: (-name.count("/"), name))
        folders = [path for path in paths if read_entry(self.at(path))["kind"] == "folder"]
        for path in paths:
            if path not in folders:
                self._undo_path(path, done, left, dry=dry)
        for path in self.data["trees"]:
            problem = remove_tree(self.at(path), dry=dry)
            if problem is not None:
                (left if problem else done).append(problem or path)
        for path in folders:
            self._undo_folder(path, done, left, used, dry=dry)
        self.save(dry=dry)
        return done, left, used

    def _undo_path(self, path: str, done: list[str], left: list[str], *, dry: bool) -> None:
        entry, found = self.data["files"][path], read_entry(self.at(path))
        original = {key: value for key, value in entry.items() if key not in _NOTES}
        if found == original:
            del self.data["files"][path]
            return
        foreign = entry.get("foreign") or (not self.data["open"] and "sealed" in entry and found != entry["sealed"])
        if foreign and not self._has_own_words(path, original, found):
            left.append(f"{path} was changed since: compare it with {self._describe(original)}")
            return
        if self.data["open"] and found["kind"] == "file" and found != entry.get("sealed") and not dry:
            kept = self.folder / "kept" / path.lstrip("/")
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.at(path), kept)
        problem = "" if dry else self._restore(path, original, found)
        (left if problem else done).append(problem or path)
        if not problem:
            del self.data["files"][path]

    def _undo_folder(self, path: str, done: list[str], left: list[str], used: list[str], *, dry: bool) -> None:
        """After what is in it. One that did not exist is removed if it is empty."""
        entry = self.data["files"][path]
        if entry["kind"] != "absent":
            if entry["kind"] == "folder":
                del self.data["files"][path]
            else:
                left.append(f"{path} is now a folder, and was: {entry['kind']}")
            return
        names = [] if dry else sorted(item.name for item in self.at(path).iterdir())
        if names:
            (used if "waited" in entry else left).append(f"{path} is not empty: it holds {', '.join(names)}")
            entry["waited"] = True
            return
        if not dry:
            self.at(path).rmdir()
        done.append(path)
        del self.data["files"][path]

    def _has_own_words(self, path: str, original: Entry, found: Entry) -> bool:
        """Whether nohype_boot has taken its words out of the command line already, and nothing else has changed there."""
        base = self.at(CMDLINE_BASE)
        if path != CMDLINE or found["kind"] != "file" or original["kind"] not in ("absent", "file"):
            return False
        if original["kind"] == "file":
            before = (self.folder / "originals" / original["digest"]).read_text()
        else:
            before = base.read_text() if base.exists() else _EDITED
        own = [line for line in before.splitlines() if not line.startswith("# ")]
        return _EDITED not in before.splitlines() and split_words(" ".join(own)) == split_words(self.at(path).read_text())

    def _describe(self, original: Entry) -> str:
        is_file = original["kind"] == "file"
        return f"{self.folder}/originals/{original['digest']}" if is_file else f"the original ({original['kind']})"

    def _restore(self, path: str, original: Entry, found: Entry) -> str:
        """The problem, or an empty text."""
        target = self.at(path)
        if found["kind"] == "other":
            return f"{path} is now neither a file nor a link, and was: {original['kind']}"
        if original["kind"] == "absent":
            target.unlink()
        elif original["kind"] == "folder":
            return f"{path} is gone, or no folder any more"
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            if original["kind"] == "link":
                fresh = target.with_name(f".{target.name}.nohype-new")
                with contextlib.suppress(FileNotFoundError):
                    fresh.unlink()
                fresh.symlink_to(original["target"])
                fresh.replace(target)
            else:
                write_atomically(target, (self.folder / "originals" / original["digest"]).read_bytes(), original["mode"])
                os.chown(target, original["uid"], original["gid"])
        return ""

    def compare(self) -> list[str]:
        """What differs from the listing before the first run."""
        file = self.folder / "before.json"
        before, now = json.loads(file.read_text()), list_server(self.root)
        lines = []
        for kind in before:
            for name in sorted({*before[kind], *now[kind]}):
                if kind == "files" and not name.startswith(tuple(f"{top}/" for top in _LISTED)):
                    continue  # of an earlier version
                old, new = before[kind].get(name), now[kind].get(name)
                if old != new:
                    lines.append(f"{kind} {name}: {'changed' if old and new else 'is gone' if old else 'is new'}")
        return lines


def remove_tree(path: Path, *, dry: bool) -> str | None:
    """Removes a folder of NoHype; returns a problem, an empty text if it was removed, None if it does not exist."""
    if path.is_symlink():
        return f"{path} is a link now, to {path.readlink()}: remove both yourself"
    if not path.exists():
        return None
    if not path.is_dir():
        return f"{path} is no folder any more: remove it yourself"
    try:
        if below := [mount for mount in list_mounts() if mount.is_relative_to(path.resolve())]:
            return f"{path} holds a mount ({below[0]}): unmount it and remove the folder"
        if not dry:
            shutil.rmtree(path)
    except OSError as error:
        return f"{path} cannot be removed: {error}"
    return ""


def list_mounts() -> list[Path]:
    """Mount points, also those of bind mounts, which os.path.ismount does not see; spaces are octal numbers in the table."""
    if not MOUNTS.exists():
        raise OSError("/proc is not mounted in this root: mount it, and run undo.yml again")
    fields = (line.split(" ")[4] for line in MOUNTS.read_text().splitlines())
    return [Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)) for field in fields]


def split_words(cmdline: str) -> list[str]:
    """Without those of the boot loader, which nohype_boot leaves out."""
    return [word for word in cmdline.split() if not word.startswith(("BOOT_IMAGE=", "initrd="))]


def list_server(root: Path) -> dict[str, dict[str, str]]:
    """The names of users, groups and installed packages, and the settings with a digest of their contents."""
    files: dict[str, str] = {}
    for top in _LISTED:
        for folder, folders, names in os.walk(root / top):
            for name in (*names, *folders):
                path = Path(folder, name)
                key = str(path.relative_to(root))
                if key not in _VOLATILE and not key.startswith("etc/ssl/certs"):
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        files[key] = _describe_file(path)
    accounts = {}
    for kind, database in (("users", "passwd"), ("groups", "group")):
        file = root / "etc" / database
        accounts[kind] = {line.split(":")[0]: "present" for line in file.read_text().splitlines()} if file.exists() else {}
    return {"files": files, **accounts, "packages": list_packages(root)}


def _describe_file(path: Path) -> str:
    found = path.lstat()
    if stat.S_ISREG(found.st_mode) and found.st_size > _LARGE:
        return f"file of {found.st_size} bytes, {found.st_mtime_ns}"
    entry = read_entry(path)
    return f"{entry['kind']} {entry.get('digest', '')}{entry.get('target', '')}"


def list_packages(root: Path) -> dict[str, str]:
    """From the database of dpkg, which is a text; empty on other systems."""
    file = root / "var/lib/dpkg/status"
    found: dict[str, str] = {}
    name = ""
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        if line.startswith("Package: "):
            name = line.removeprefix("Package: ")
        elif line.startswith("Status: ") and not line.endswith("not-installed"):
            found[name] = line.removeprefix("Status: ")
    return found


def find_leftover_accounts(record: Record) -> dict[str, list[str]]:
    """Users and groups that the role or its packages have created, and that still exist."""
    left = {}
    for kind, database in (("users", "passwd"), ("groups", "group")):
        known = record.names(database)
        ours = [name for name, was_there in record.data["accounts"].get(kind, {}).items() if not was_there]
        left[kind] = sorted(known.intersection(ours))
    return left


def main() -> None:
    names: dict[str, Any] = {"type": "list", "elements": "str", "default": []}
    spec: dict[str, Any] = dict.fromkeys(("paths", "trees", "accounts", "packages"), names)
    spec["state"] = {"choices": ["recorded", "sealed", "checked", "undone", "accounts", "compared"], "default": "recorded"}
    spec["folder"] = {"type": "path", "default": "/var/lib/nohype-setup"}
    spec["root"] = {"type": "path", "default": "/"}
    spec["begin"] = {"type": "bool", "default": False}
    module = AnsibleModule(spec, supports_check_mode=True)
    given, dry = module.params, module.check_mode
    try:
        record = Record(Path(given["folder"]), Path(given["root"]))
        state = given["state"]
        if state == "recorded":
            module.exit_json(changed=False, interrupted=record.add(given, dry=dry))
        if state == "sealed":
            record.seal(dry=dry)
            module.exit_json(changed=False)
        if state != "checked" and not record.exists:
            module.fail_json(msg=f"{given['folder']} holds no record: the playbook site.yml has never run on this server")
        if state == "undone":
            done, left, used = record.undo(dry=dry)
            for line in used:
                module.warn(f"{line}. It stays")
            module.exit_json(changed=bool(done), restored=done, left=left, used=used)
        if state == "accounts":
            module.exit_json(changed=False, accounts=find_leftover_accounts(record))
        if state == "compared":
            module.exit_json(changed=False, differences=record.compare())
        module.exit_json(changed=False, exists=record.exists, record=record.data)
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"the record in {given['folder']} cannot be used: {error}")


if __name__ == "__main__":
    main()
