"""Settings of this machine's apt, with which Debian root file systems are built: mirror, proxy, certificates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run

SUITE = "trixie"

# What mmdebstrap(1) takes for a suite of Debian if apt says nothing.
DEFAULT_ARCHIVE, DEFAULT_SECURITY = "http://deb.debian.org/debian", "http://security.debian.org/debian-security"

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_INDEX_FORMAT = "$(ORIGIN) $(LABEL) $(COMPONENT) $(CODENAME) $(REPO_URI)"
_OPTION = re.compile(r'(Acquire::(?:https?::|Retries|Check-Valid-Until|Check-Date)\S*) "(.+)";')


@dataclass(frozen=True)
class AptSettings:
    """Settings of this machine's apt: URIs of a Debian archive and of one of security updates, and lines for downloads."""

    uri: str
    options: tuple[str, ...]
    security: str = ""  # empty: none is configured


def read_apt_settings() -> AptSettings:
    """Raises ImageError if apt has no package lists, and CommandError if apt is not installed."""
    targets = run(["apt-get", "indextargets", "--format", _INDEX_FORMAT]).stdout
    return parse_apt_settings(targets, run(["apt-config", "dump"]).stdout)


def parse_apt_settings(targets: str, dump: str) -> AptSettings:
    """From the output of ``apt-get indextargets`` and ``apt-config dump``. Other distributions get Debian's own archives."""
    options = parse_apt_options(dump)
    if archive := parse_archive_uri(targets):
        return AptSettings(archive, options, parse_security_uri(targets))
    if not targets.strip():
        raise ImageError("apt has no package lists, which name this machine's Debian archive", "run `apt-get update`")
    return AptSettings(DEFAULT_ARCHIVE, options, DEFAULT_SECURITY)


def parse_archive_uri(targets: str) -> str:
    """The first Debian archive in the output of ``apt-get indextargets``; one with SUITE is preferred. Empty if there is none.

    Archives with other origins or labels, such as security archives, and backports lack most packages.
    """
    found: list[tuple[bool, str]] = []
    for line in targets.splitlines():
        words = line.rsplit(" ", 1)
        match words[0].split(" ") if len(words) == 2 else []:
            case ["Debian", "Debian", "main", codename] if not codename.endswith(("-backports", "-proposed-updates")):
                found.append((codename.split("-")[0] == SUITE, words[1]))
    return max(found, key=lambda item: item[0], default=(False, ""))[1]


def parse_security_uri(targets: str) -> str:
    """The first archive of security updates, of any release: it has those of all supported ones. Empty if there is none."""
    lines = (line.split(" ", 4) for line in targets.splitlines())
    return next((words[4] for words in lines if words[:3] == ["Debian", "Debian-Security", "main"] and len(words) == 5), "")


def parse_apt_options(dump: str) -> tuple[str, ...]:
    """The lines of ``apt-config dump`` for downloads: proxies, certificates, retries."""
    return tuple(f'{match[1]} "{match[2]}";' for line in dump.splitlines() if (match := _OPTION.fullmatch(line.strip())))


def format_source(uri: str, suite: str) -> str:
    """A line of sources.list(5)."""
    return f"deb [signed-by={KEYRING}] {uri} {suite} main"


def check_keyring() -> None:
    """Raises ImageError if packages of Debian cannot be verified."""
    if not KEYRING.exists():
        hint = "run `apt-get install debian-archive-keyring`"
        raise ImageError(f"cannot verify packages: {KEYRING} does not exist", hint)
