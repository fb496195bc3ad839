"""Tells which packages an installation would add, installs them, and removes those that the role has added.

The module ansible.builtin.apt would first install python3-apt, which no record has.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: nohype_packages
short_description: Plan the installation of packages, install them, and remove them again
options:
  state: {choices: [planned, present, own, removed], required: true}
  family: {choices: [Debian, RedHat], default: Debian}
  log: {type: path, description: Notes what the role installs; state own reads it}
  names: {type: list, elements: str, required: true}
  update: {type: bool, default: false, description: Read the lists of the package archives first, if they are a day old}
"""

_LISTS = "/var/lib/apt/lists"
_DAY = 86400  # seconds
_INSTALL = (
    "install", "--no-install-recommends", "--no-upgrade",
    "--option=Dpkg::Options::=--force-confdef", "--option=Dpkg::Options::=--force-confold",
)  # fmt: skip
_CONFFILES = "${Package}\n${Conffiles}\n"
# Lines of dpkg (--status-logger), before it unpacks a package; a crash in between leaves them too.
_INSTALLED = "processing: install: "
_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


def parse_added(output: str) -> list[str]:
    """New packages in the output of `apt-get --simulate install`; an upgrade has the old version in brackets."""
    return sorted(set(re.findall(r"^Inst (\S+) \(", output, re.MULTILINE)))


def parse_removed(output: str) -> set[str]:
    """Everything that `apt-get --simulate purge` would change."""
    return {name.split(":")[0] for name in re.findall(r"^(?:Remv|Purg|Inst) (\S+)", output, re.MULTILINE)}


def find_others(recorded: Sequence[str], output: str) -> list[str]:
    """Packages that other people need or have installed, and that would be removed too."""
    return sorted(parse_removed(output) - set(recorded))


def find_own(planned: Sequence[str], log: str) -> list[str]:
    """Planned packages that the role itself has installed: the others were installed by hand after a run that failed."""
    names = {line.removeprefix(_INSTALLED).split(":")[0] for line in log.splitlines() if line.startswith(_INSTALLED)}
    return [name for name in planned if name.split(":")[0] in names]


def parse_conffiles(output: str) -> list[tuple[str, str, str]]:
    """Package, path and MD5 sum as packaged, from ``dpkg-query`` with _CONFFILES; a line may end with flags (obsolete)."""
    found, package = [], ""
    for line in output.splitlines():
        if match := re.match(r" (/.*?) ([0-9a-f]{32}|newconffile)(?: |$)", line):
            found.append((package, match[1], match[2]))
        elif line.strip():
            package = line.split(":")[0]
    return found


def find_changed(output: str, root: Path = Path("/")) -> dict[str, list[str]]:
    """Settings by package that are not as packaged, or cannot be read."""
    changed: dict[str, list[str]] = {}
    for package, path, digest in parse_conffiles(output):
        try:
            same = hashlib.md5((root / path.lstrip("/")).read_bytes(), usedforsecurity=False).hexdigest() == digest
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            same = False
        if not same:
            changed.setdefault(package, []).append(path)
    return changed


class Server:
    """The package manager of the server."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, *argv: str, check: bool = True) -> tuple[int, str]:
        status, output, errors = self.module.run_command(list(argv), environ_update=_ENVIRONMENT)
        if status and check:
            self.module.fail_json(msg=f"`{' '.join(argv[:4])}` failed: {(errors or output).strip()[-800:]}")
        return status, str(output)

    def find_installed(self, names: Sequence[str]) -> list[str]:
        if self.module.params["family"] == "RedHat":
            return [name for name in names if self.run("rpm", "--query", name, check=False)[0] == 0]
        _, output = self.run("dpkg-query", "--show", "--showformat=${binary:Package} ${db:Status-Status}\n")
        found = dict(line.split(" ", 1) for line in output.splitlines())
        present = {name.split(":")[0] for name, status in found.items() if status != "not-installed"}
        return [name for name in names if name in present]

    def plan(self, names: Sequence[str]) -> list[str]:
        """With their dependencies; on Red Hat only the named packages, because dnf removes unneeded dependencies by itself."""
        if self.module.params["family"] == "RedHat":
            installed = self.find_installed(names)
            return sorted(name for name in names if name not in installed)
        return parse_added(self.run("apt-get", "--simulate", *_INSTALL, *names)[1])

    def update(self) -> None:
        """In check mode too: without lists there is no plan. dnf does so by itself."""
        if self.module.params["family"] == "Debian":
            newest = max((file.stat().st_mtime for file in Path(_LISTS).glob("*_*")), default=0)
            if newest < time.time() - _DAY:
                self.run("apt-get", "update")

    def install(self, names: Sequence[str]) -> bool:
        if not (added := self.plan(names)):
            return False
        if not self.module.check_mode:
            log = self.module.params["log"]
            if self.module.params["family"] == "RedHat":
                self.run("dnf", "--assumeyes", "--setopt=install_weak_deps=False", "install", *added)
                self.note(added)
            else:
                noted = (f"--option=Dpkg::Options::=--status-logger=cat >>{log}",) if log else ()
                self.run("apt-get", "--assume-yes", *_INSTALL, *noted, *names)
        return True

    def note(self, names: Sequence[str]) -> None:
        if self.module.params["log"]:
            with Path(self.module.params["log"]).open("a") as file:
                file.writelines(f"{_INSTALLED}{name}\n" for name in names)

    def find_own(self, names: Sequence[str]) -> list[str]:
        log = Path(self.module.params["log"])
        return find_own(names, log.read_text() if log.exists() else "")

    def remove(self, names: Sequence[str]) -> list[str]:
        """The names of other packages that need them: nothing was removed then."""
        if self.module.params["family"] == "RedHat":
            if not self.module.check_mode:
                self.run("dnf", "--assumeyes", "remove", *names)
            return []
        others = find_others(names, self.run("apt-get", "--simulate", "purge", *names)[1])
        if not others and not self.module.check_mode:
            # On a system that was made without e2fsprogs, apt calls that package essential afterwards.
            apt = ("apt-get", "--assume-yes", "--allow-remove-essential")
            changed = find_changed(self.run("dpkg-query", "--show", f"--showformat={_CONFFILES}", *names)[1])
            if changed:
                self.run(*apt, "remove", *names)
                names = [name for name in self.find_installed(names) if name not in changed]
            if names:
                self.run(*apt, "purge", *names)
            for package, paths in changed.items():
                self.module.warn(f"{', '.join(paths)} of {package} was changed since its installation: the file stays")
        return others


def main() -> None:
    names: dict[str, Any] = {"type": "list", "elements": "str", "required": True}
    spec: dict[str, Any] = {
        "state": {"choices": ["planned", "present", "own", "removed"], "required": True},
        "log": {"type": "path"},
        "update": {"type": "bool", "default": False},
        "family": {"choices": ["Debian", "RedHat"], "default": "Debian"},
        "names": names,
    }
    module = AnsibleModule(spec, supports_check_mode=True)
    server = Server(module)
    if module.params["update"]:
        server.update()
    if module.params["state"] == "present":
        module.exit_json(changed=server.install(module.params["names"]))
    if module.params["state"] == "own":
        module.exit_json(changed=False, own=server.find_own(module.params["names"]))
    if module.params["state"] == "planned":
        module.exit_json(changed=False, added=server.plan(module.params["names"]))
    present = server.find_installed(module.params["names"])
    others = server.remove(present) if present else []
    module.exit_json(changed=bool(present) and not others, removed=[] if others else present, others=others)


if __name__ == "__main__":
    main()
