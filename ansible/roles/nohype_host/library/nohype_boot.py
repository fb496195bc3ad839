"""Finds the boot loader of a server, and gives it the words of the kernel's command line."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: nohype_boot
short_description: Find the boot loader, and change the kernel's command line
description:
  - "grub: GRUB of Debian, with a drop-in below /etc/default/grub.d and update-grub. grubby: entries that grubby(8) changes.
    kernel-install: systemd-boot and unified kernel images, from /etc/kernel/cmdline."
options:
  state: {choices: [found, present, absent, updated], default: found}
  words: {type: str, default: "", description: Words for the kernel's command line}
  former: {type: list, elements: str, default: [], description: Words of earlier runs that are not wanted any more}
  base: {type: path, default: /etc/nohype/kernel.cmdline.base, description: The words before the role}
  root: {type: path, default: /}
"""

DROP_IN = "etc/default/grub.d/nohype.cfg"
CMDLINE = "etc/kernel/cmdline"
_VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"  # of systemd's boot loader interface (systemd.io/BOOT_LOADER_INTERFACE)
_ESP = ("efi", "boot/efi", "boot")
_FREE = 64 << 20  # bytes: kernel-install writes a kernel and an initrd
# Written by the boot loader, or by dracut for one kernel; not part of the server's own words.
_OF_LOADER = re.compile(r"(BOOT_IMAGE|initrd)=")
# Lines of the base file besides the server's own words. nohype_record.py reads the second one.
_OURS, _EDITED = "# words of nohype:", "# changed by others"


def read_variable(root: Path, name: str) -> str:
    """A text variable of the firmware (UTF-16 after four bytes of attributes), empty if it does not exist."""
    try:
        data = (root / f"sys/firmware/efi/efivars/{name}-{_VENDOR}").read_bytes()
    except OSError:
        return ""
    return data[4:].decode("utf-16-le", errors="replace").rstrip("\0")


def find_loader(root: Path) -> dict[str, str]:
    """``kind`` and ``name``; or a ``problem``: the first sentence what was found, the second what to do."""
    info, stub = read_variable(root, "LoaderInfo"), read_variable(root, "StubInfo")
    has_install = any((root / folder / "kernel-install").exists() for folder in ("usr/bin", "bin"))
    unified = bool(stub) or _reads_layout(root) == "uki"
    grub = next((name for name in ("boot/grub/grub.cfg", "boot/grub2/grub.cfg") if (root / name).exists()), "")
    has_entries = not info and not grub and _has_entries(root)
    if info.startswith("systemd-boot") or (unified and not info.startswith("GRUB")) or has_entries:
        name = "unified kernel image" if unified else info or "systemd-boot"
        if not has_install:
            return {"problem": f"the server boots with {name}, but has no kernel-install. Install the package systemd-boot"}
        return {"kind": "kernel-install", "name": name, "file": CMDLINE}
    if info and not info.startswith("GRUB"):
        return {"problem": f"the boot loader {info} is not known. {_BY_HAND}"}
    if grub and (root / "usr/sbin/update-grub").exists():
        return {"kind": "grub", "name": info or "GRUB", "file": DROP_IN, "menu": grub}
    if grub and any((root / folder / "grubby").exists() for folder in ("usr/sbin", "sbin", "usr/bin")):
        return {"kind": "grubby", "name": info or "GRUB", "file": "", "menu": grub}
    if grub:
        return {"problem": f"there is /{grub}, but neither update-grub nor grubby. Install grub2-common, or grubby (Red Hat)"}
    what = "no boot loader was found: no grub.cfg below /boot, no loader entries, no unified kernel image"
    return {"problem": f"{what}. {_BY_HAND}"}


_BY_HAND = (
    "Set nohype_boot_loader to manual, and add the words of /etc/nohype/kernel.cmdline to the kernel's command line yourself"
)


def _reads_layout(root: Path) -> str:
    for name in ("etc/kernel/install.conf", "usr/lib/kernel/install.conf"):
        try:
            text = (root / name).read_text()
        except OSError:
            continue
        if match := re.search(r"^\s*layout\s*=\s*(\S+)", text, re.MULTILINE):
            return match[1]
    return ""


def _has_entries(root: Path) -> bool:
    return any((root / folder / "loader/loader.conf").exists() or (root / folder / "loader/entries").is_dir() for folder in _ESP)


def find_obstacle(root: Path, loader: dict[str, str]) -> str:
    """Why the boot loader's files cannot be written, before anything is changed."""
    if loader["kind"] == "kernel-install":
        places = ["etc", *(name for name in _ESP if (root / name).is_dir() and (_has_below(root / name)))]
    else:
        places = ["etc", "boot", str(Path(loader["menu"]).parent)]
    for name in places:
        folder = root / name
        if not os.access(folder, os.W_OK):
            return f"/{name} cannot be written (read-only?). Remount it: `mount -o remount,rw /{name}`, and check /etc/fstab"
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        if loader["kind"] == "kernel-install" and free < _FREE:
            return f"/{name} has {free >> 20} MB free, and a kernel needs {_FREE >> 20} MB. Remove old kernels"
    return ""


def _has_below(folder: Path) -> bool:
    return (folder / "loader").is_dir() or (folder / "EFI").is_dir()


def build_cmdline(before: str, words: str) -> str:
    """The server's own words, without those of the boot loader, then ours."""
    own = [word for word in before.split() if not _OF_LOADER.match(word)]
    return " ".join((*own, *words.split())) + "\n"


def build_grub(words_file: str) -> str:
    """GRUB reads the drop-in as shell (with ``set -e``) when it generates its menu: a missing file must not stop that."""
    return f'# Written by Ansible (nohype_host).\nGRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX $(cat {words_file} 2>/dev/null || :)"\n'


class Base(NamedTuple):
    """The server's own words, and those that the role has written; None if an earlier version has not noted them."""

    own: tuple[str, ...]
    ours: tuple[str, ...] | None
    edited: bool = False

    def encode(self) -> str:
        return "\n".join((" ".join(self.own), f"{_OURS} {' '.join(self.ours or ())}", *([_EDITED] if self.edited else []))) + "\n"


def parse_base(text: str) -> Base:
    lines = text.splitlines()
    ours = next((tuple(line.removeprefix(_OURS).split()) for line in lines if line.startswith(_OURS)), None)
    own = [line for line in lines if not line.startswith((_OURS, _EDITED))]
    return Base(tuple(build_cmdline("\n".join(own), "").split()), ours, _EDITED in lines)


def find_own(current: str, base: Base, ours: Sequence[str]) -> tuple[str, ...]:
    """The command line of today without the role's words; one that the server had itself stays as often as it had it."""
    own: list[str] = []
    for word in build_cmdline(current, "").split():
        if word not in ours or own.count(word) < base.own.count(word):
            own.append(word)
    return tuple(own) if current.strip() else base.own


def list_kernels(root: Path) -> list[tuple[str, str]]:
    """Release and image of the installed kernels."""
    found = []
    for folder in sorted((root / "usr/lib/modules").glob("*")):
        for image in (folder / "vmlinuz", root / f"boot/vmlinuz-{folder.name}"):
            if image.exists():
                found.append((folder.name, "/" + str(image.relative_to(root))))
                break
    return found


def has_words(arguments: str, words: Sequence[str]) -> bool:
    found = shlex.split(arguments)
    return all(word in found for word in words)


class Loader:
    """Changes the files of a boot loader, or says that it would."""

    def __init__(self, module: Any, loader: dict[str, str]) -> None:
        self.module, self.loader = module, loader
        self.root = Path(module.params["root"])

    def run(self, *argv: str) -> str:
        status, output, errors = self.module.run_command(list(argv), environ_update={"LC_ALL": "C.UTF-8"})
        if status:
            self.module.fail_json(msg=f"`{' '.join(argv)}` failed: {(errors or output).strip()[-800:]}")
        return str(output)

    def write(self, name: str, text: str) -> bool:
        """At once, so that a crash leaves a complete file: without root= in it a server does not boot."""
        file = (self.root / name).resolve()
        if file.exists() and file.read_text() == text:
            return False
        if not self.module.check_mode:
            file.parent.mkdir(parents=True, exist_ok=True)
            mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o644
            fresh = file.with_name(f".{file.name}.nohype-new")
            with fresh.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            fresh.chmod(mode)
            fresh.replace(file)
        return True

    def add(self) -> bool:
        words = self.module.params["words"]
        if self.loader["kind"] == "grub":
            return self.write(DROP_IN, build_grub("/etc/nohype/kernel.cmdline"))
        if self.loader["kind"] == "grubby":
            return self._replace_arguments(words.split(), self.module.params["former"])
        name, new = self.module.params["base"].lstrip("/"), tuple(words.split())
        base = self._read_base(new)
        # until the command line is written, it may hold the words of either run
        self.write(name, Base(base.own, tuple(dict.fromkeys((*(base.ours or ()), *new))), base.edited).encode())
        changed = self.write(CMDLINE, build_cmdline(" ".join(base.own), words))
        self.write(name, Base(base.own, new, base.edited).encode())
        return changed

    def _read_base(self, words: Sequence[str]) -> Base:
        """With the edits that others have made to the command line since the role has written it."""
        file, cmdline = self.root / self.module.params["base"].lstrip("/"), self.root / CMDLINE
        if not file.exists():
            names = (CMDLINE, "usr/lib/kernel/cmdline", "proc/cmdline")
            before = next((text for name in names if (text := self._read(name)).strip()), "")
            return Base(tuple(build_cmdline(before, "").split()), ())
        base = parse_base(file.read_text())
        own = find_own(self._read(CMDLINE), base, words if base.ours is None else base.ours)
        if own != base.own and base.ours is None:
            self.module.fail_json(
                msg=f"{cmdline} was changed since the last run, and {file} does not tell the words of that run. "
                f"Take the words of NoHype out of {cmdline}, remove {file}, and run the playbook again"
            )
        return Base(own, base.ours, base.edited or own != base.own)

    def _read(self, name: str) -> str:
        file = self.root / name
        return file.read_text() if file.exists() else ""

    def _replace_arguments(self, words: list[str], former: list[str]) -> bool:
        """isolcpus=2-3 replaces isolcpus=4-7 of an earlier run; a name that is not wanted any more is removed."""
        lines = re.findall(r'^args="(.*)"$', self.run("grubby", "--info=ALL"), re.MULTILINE)
        names = {word.split("=")[0] for word in words}
        stale = [word for word in former if word.split("=")[0] not in names and any(has_words(line, [word]) for line in lines)]
        if lines and not stale and all(has_words(line, words) for line in lines):
            return False
        if not self.module.check_mode:
            removed = [f"--remove-args={' '.join(stale)}"] if stale else []
            self.run("grubby", "--update-kernel=ALL", *removed, f"--args={' '.join(words)}")
        return True

    def remove(self) -> bool:
        """GRUB's drop-in is restored from the record."""
        words = self.module.params["words"].split()
        if self.loader["kind"] == "kernel-install":
            return self._restore_entries()
        if self.loader["kind"] != "grubby" or not words:
            return False
        lines = re.findall(r'^args="(.*)"$', self.run("grubby", "--info=ALL"), re.MULTILINE)
        if not any(has_words(line, [word]) for line in lines for word in words):
            return False
        if not self.module.check_mode:
            self.run("grubby", "--update-kernel=ALL", f"--remove-args={' '.join(words)}")
        return True

    def _restore_entries(self) -> bool:
        """Before the record restores the file: without one, kernel-install takes the words of the running kernel, with ours."""
        name = self.module.params["base"].lstrip("/")
        if not (self.root / name).exists():
            return False
        base = self._read_base(self.module.params["words"].split())
        if base.edited:
            self.write(name, base.encode())
        if not self.write(CMDLINE, build_cmdline(" ".join(base.own), "")):
            return False
        self.update()
        return True

    def update(self) -> list[str]:
        """Generates menus and images again; returns what was run."""
        commands: list[tuple[str, ...]] = []
        if self.loader["kind"] == "grub":
            commands = [("update-grub",)]
        elif (self.root / CMDLINE).exists():
            commands = [("kernel-install", "add", release, image) for release, image in list_kernels(self.root)]
        if not self.module.check_mode:
            for command in commands:
                self.run(*command)
            self._check_menu()
        return [" ".join(command) for command in commands]

    def _check_menu(self) -> None:
        """A menu that was written by hand ignores the settings, and the server would boot without them."""
        words = self.module.params["words"]
        menu = self.loader.get("menu", "")
        if self.loader["kind"] == "grub" and words and words not in (self.root / menu).read_text(errors="replace"):
            self.module.fail_json(msg=f"update-grub has written /{menu} without the words of /{DROP_IN}. {_BY_HAND}")


def main() -> None:
    spec: dict[str, Any] = {
        "state": {"choices": ["found", "present", "absent", "updated"], "default": "found"},
        "words": {"type": "str", "default": ""},
        "former": {"type": "list", "elements": "str", "default": []},
        "base": {"type": "path", "default": "/etc/nohype/kernel.cmdline.base"},
        "root": {"type": "path", "default": "/"},
    }
    module = AnsibleModule(spec, supports_check_mode=True)
    root = Path(module.params["root"])
    loader = find_loader(root)
    if problem := loader.get("problem") or find_obstacle(root, loader):
        module.fail_json(msg=problem)
    facts = {"kind": loader["kind"], "name": loader["name"], "file": loader["file"]}
    state = module.params["state"]
    if state == "found":
        module.exit_json(changed=False, **facts)
    if state == "present":
        module.exit_json(changed=Loader(module, loader).add(), **facts)
    if state == "absent":
        module.exit_json(changed=Loader(module, loader).remove(), **facts)
    commands = Loader(module, loader).update()
    module.exit_json(changed=bool(commands), commands=commands, **facts)


if __name__ == "__main__":
    main()
