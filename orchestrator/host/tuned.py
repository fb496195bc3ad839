"""The daemon tuned, whose active profile sets kernel settings (tuned.conf(5))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.host.isolation import Setting
from orchestrator.host.processes import find_comm
from orchestrator.host.root import HostRoot

_PROFILES = ("etc/tuned/profiles", "etc/tuned", "usr/lib/tuned/profiles", "usr/lib/tuned")


@dataclass(frozen=True)
class Tuned:
    """The daemon tuned runs with these profiles."""

    profiles: tuple[str, ...]
    text: str  # of their files, included ones too, without comments

    def sets(self, setting: Setting) -> bool:
        return any(word in self.text for word in setting.tuned)

    def __str__(self) -> str:
        return f"tuned (profile {' '.join(self.profiles)})"


def find_tuned(host: HostRoot) -> Tuned | None:
    """None if tuned does not run, or has no profile. Raises HostError if its files cannot be read."""
    pid = host.find("run/tuned/tuned.pid")
    # The file stays if tuned is killed, and its id may be that of another program by then.
    if not pid or not pid.isdecimal() or (find_comm(host, int(pid)) or "") != "tuned":
        return None
    active = tuple((host.find("etc/tuned/active_profile") or "").split())
    lines: dict[str, tuple[str, ...]] = {}
    waiting = list(active)
    while waiting:
        if (name := waiting.pop()) not in lines:
            lines[name] = tuple(_read_profile(host, name))
            waiting += [part for line in lines[name] if (part := _find_included(line))]
    return Tuned(active, "\n".join(line for name in lines for line in lines[name])) if active else None


def _read_profile(host: HostRoot, name: str) -> Iterator[str]:
    if "/" in name or name.startswith("."):
        return
    text = next((text for folder in _PROFILES if (text := host.find(f"{folder}/{name}/tuned.conf"))), "")
    for line in text.splitlines():
        if not line.lstrip().startswith(("#", ";")):
            yield line.strip()


def _find_included(line: str) -> str:
    name, _, value = line.partition("=")
    return value.strip().lstrip("?") if name.strip() == "include" else ""
