"""Lists the processes that run a guest, whichever program started them: libvirt knows only its own guests."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: nohype_guests
short_description: List the processes that run a guest, of QEMU and of other programs that use KVM
options:
  proc: {type: path, default: /proc}
"""

_QEMU = re.compile(r"qemu-(system-|kvm)")
_KVM = "anon_inode:kvm-vm"  # of each program with a virtual machine of KVM (kvm_dev_ioctl_create_vm(), virt/kvm/kvm_main.c)


def find_guests(proc: Path) -> list[str]:
    """One line per process: `PID (PROGRAM, GUEST)`. A name is known of QEMU only."""
    found = []
    for folder in sorted((path for path in proc.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)):
        try:
            program = Path(os.readlink(folder / "exe").removesuffix(" (deleted)")).name
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_qemu = bool(_QEMU.match(program))
            if (is_qemu or _has_machine(folder)) and not (is_qemu and _is_probe(words)):
                name = _read_name(words) if is_qemu else ""
                found.append(f"{folder.name} ({program}{', ' if name else ''}{name})")
        except (FileNotFoundError, ProcessLookupError):  # a kernel thread, or a process that has exited
            continue
    return found


def _has_machine(folder: Path) -> bool:
    for entry in os.scandir(folder / "fd"):
        try:
            if os.readlink(entry.path) == _KVM:
                return True
        except FileNotFoundError:  # closed meanwhile
            continue
    return False


def _is_probe(words: Sequence[str]) -> bool:
    """libvirtd starts QEMU without a machine for some seconds, to learn what it can do."""
    return any(option == "-machine" and re.match(r"none\b", value) for option, value in zip(words, words[1:]))  # noqa: B905 (Python 3.9)


def _read_name(words: Sequence[str]) -> str:
    """`-name guest=web,debug-threads=on` or `-name web`."""
    for option, value in zip(words, words[1:]):  # noqa: B905 (Python 3.9)
        if option in ("-name", "--name"):
            fields = value.split(",")
            named = [field.removeprefix("guest=") for field in fields if field.startswith("guest=")]
            return (named or fields)[0]
    return ""


def main() -> None:
    module = AnsibleModule({"proc": {"type": "path", "default": "/proc"}}, supports_check_mode=True)
    try:
        module.exit_json(changed=False, guests=find_guests(Path(module.params["proc"])))
    except OSError as error:
        module.fail_json(msg=f"the processes of the server cannot be read: {error}")


if __name__ == "__main__":
    main()
