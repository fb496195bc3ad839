"""Debian root file systems built by mmdebstrap. The mirror is that of this machine's apt; it does not stay in a root."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.cache import locked
from orchestrator.images.logged import run_logged

SUITE = "trixie"
BACKPORTS = f"{SUITE}-backports"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_INDEX_FORMAT = "$(ORIGIN) $(LABEL) $(COMPONENT) $(CODENAME) $(REPO_URI)"
_OPTION = re.compile(r'(Acquire::(?:https?::|Retries|Check-Valid-Until|Check-Date)\S*) "(.+)";')
_EXTRACTED = "var/lib/dpkg/extracted"
_INSTALLED = re.compile(r"Inst (\S+) (?:\[\S*\] )?\((\S+) ")
_DEBS_LIMIT = 1 << 30  # bytes; a larger cache of packages is emptied

# Own mount and PID namespaces, and death with the parent: no mount or process outlives the build.
_CONTAINED = (
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
)  # fmt: skip
# An empty network namespace: nothing can be downloaded.
_OFFLINE = ("--net",)

# Documentation would be a third of the image.
_EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
)

# The machine's mirror and proxy do not belong in an image.
_FORGET = 'rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap'


@dataclass(frozen=True)
class AptSettings:
    """Settings of this machine's apt: URIs of a Debian archive and of one of security updates, and lines for downloads."""

    uri: str
    options: tuple[str, ...]
    security: str = ""  # empty: none is configured


def read_apt_settings() -> AptSettings:
    """Raises ImageError if apt has no Debian archive configured, and CommandError if apt is not installed."""
    targets = run(["apt-get", "indextargets", "--format", _INDEX_FORMAT]).stdout
    options = parse_apt_options(run(["apt-config", "dump"]).stdout)
    return AptSettings(parse_archive_uri(targets), options, parse_security_uri(targets))


def parse_archive_uri(targets: str) -> str:
    """The first Debian archive in the output of ``apt-get indextargets``; one with SUITE is preferred.

    Archives with other origins or labels, such as security archives, and backports lack most packages.
    """
    found: list[tuple[bool, str]] = []
    for line in targets.splitlines():
        words = line.rsplit(" ", 1)
        match words[0].split(" ") if len(words) == 2 else []:
            case ["Debian", "Debian", "main", codename] if not codename.endswith(("-backports", "-proposed-updates")):
                found.append((codename.split("-")[0] == SUITE, words[1]))
    if not found:
        raise ImageError(
            "apt has no Debian archive configured (origin Debian, component main)",
            "run `apt-get update`; on another distribution, add a deb line for a Debian archive with "
            f"[signed-by={_KEYRING}] (package debian-archive-keyring)",
        )
    return max(found, key=lambda item: item[0])[1]


def parse_security_uri(targets: str) -> str:
    """The first archive of security updates, of any release: it has those of all supported ones. Empty if there is none."""
    lines = (line.split(" ", 4) for line in targets.splitlines())
    return next((words[4] for words in lines if words[:3] == ["Debian", "Debian-Security", "main"] and len(words) == 5), "")


def parse_apt_options(dump: str) -> tuple[str, ...]:
    """The lines of ``apt-config dump`` for downloads: proxies, certificates, retries."""
    return tuple(f'{match[1]} "{match[2]}";' for line in dump.splitlines() if (match := _OPTION.fullmatch(line.strip())))


def make_root(
    target: Path,
    packages: Sequence[str],
    *,
    cache: Path,
    log: Path,
    variant: str = "essential",
    suites: Sequence[str] = (SUITE,),
    updates: bool = False,
    repository: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Builds a root file system of SUITE with the packages and their dependencies, without recommendations.

    Args:
        target: folder to fill; must be empty.
        variant: mmdebstrap's; "extract" only unpacks and runs no maintainer scripts.
        suites: sources of packages; the last has priority.
        updates: use updates of SUITE too, and security updates if this machine's apt has an archive of them. Only for one suite.
        repository: flat repository that replaces the suites; the build then has no network.
        env: environment variables for maintainer scripts.
    """
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    with locked(cache / "debs.lock", progress=lambda _: None):
        if repository:
            argv = [*_OFFLINE, "--", *build_offline_mmdebstrap(target, packages, repository, variant=variant)]
        else:
            if not _KEYRING.exists():
                hint = "run `apt-get install debian-archive-keyring`"
                raise ImageError(f"cannot verify packages: {_KEYRING} does not exist", hint)
            _limit(debs)
            settings = read_apt_settings()
            argv = ["--", *build_mmdebstrap(settings, target, packages, debs, variant=variant, suites=suites, updates=updates)]
        run_logged(
            [*_CONTAINED, *argv, *(_record_extracted(packages) if variant == "extract" else ())],
            task=f"cannot build a Debian {SUITE} root file system",
            program="mmdebstrap",
            log=log,
            timeout=3600,
            env={"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
        )
    if variant == "extract":
        _merge_usr(target)


def build_mmdebstrap(
    settings: AptSettings,
    target: Path,
    packages: Sequence[str],
    debs: Path,
    *,
    variant: str,
    suites: Sequence[str] = (SUITE,),
    updates: bool = False,
) -> list[str]:
    sources = [(settings.uri, suite) for suite in suites]
    if updates:
        sources.append((settings.uri, f"{SUITE}-updates"))
        sources += [(settings.security, f"{SUITE}-security")] if settings.security else []
    archives, kept = '"$1"/var/cache/apt/archives', shlex.quote(str(debs))
    # Links, as the cache also holds the packages of other roots; apt and mmdebstrap replace and remove files, but change none.
    fill = f"mkdir -p {archives} && cp -al {kept}/. {archives}/"
    # -n: files from the cache are not linked back
    keep = f"find {archives} -maxdepth 1 -name '*.deb' -exec cp -nl -t {kept} {{}} +"
    return [
        *_common_arguments(packages, variant), f"--keyring={_KEYRING}",
        *(f"--aptopt={option}" for option in (*settings.options, 'Acquire::Retries "3";', 'Acquire::Languages "none";')),
        # It would rank the suite above its own updates.
        *(() if updates else (f'--aptopt=APT::Default-Release "{suites[-1]}";',)),
        "--skip=essential/unlink",  # keeps the packages of the essential set for the cache
        f"--setup-hook={fill}", f"--extract-hook={keep}", f"--customize-hook={keep}", f"--customize-hook={_FORGET}",
        SUITE, str(target), *(f"deb [signed-by={_KEYRING}] {uri} {suite} main" for uri, suite in sources),
    ]  # fmt: skip


def build_offline_mmdebstrap(target: Path, packages: Sequence[str], repository: Path, *, variant: str) -> list[str]:
    """``repository`` has been compared with a lock: apt does not verify it again."""
    return [
        *_common_arguments(packages, variant), '--aptopt=APT::Sandbox::User "root";', f"--customize-hook={_FORGET}",
        SUITE, str(target), f"deb [trusted=yes] copy:{quote(str(repository))} ./",
    ]  # fmt: skip


def _common_arguments(packages: Sequence[str], variant: str) -> list[str]:
    return [
        "mmdebstrap", "--mode=root", f"--variant={variant}", "--format=directory", "--architectures=amd64",
        f"--include={','.join(packages)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED), "--dpkgopt=force-unsafe-io",
    ]  # fmt: skip


def _record_extracted(packages: Sequence[str]) -> tuple[str]:
    """dpkg knows nothing of packages that are only unpacked: apt says which it would install into this empty system."""
    names = shlex.join(packages)
    return (f'--extract-hook=APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --simulate --yes install {names} >"$1"/{_EXTRACTED}',)


def read_extracted(root: Path) -> dict[str, str]:
    """Names and versions of the packages of a root that was built with variant "extract"."""
    found = (_INSTALLED.match(line) for line in (root / _EXTRACTED).read_text().splitlines())
    return {match[1]: match[2] for match in found if match}


def _limit(debs: Path) -> None:
    if sum(file.stat().st_size for file in debs.iterdir()) > _DEBS_LIMIT:
        shutil.rmtree(debs)
        debs.mkdir()


def _merge_usr(root: Path) -> None:
    """Creates /bin, /lib and the like, which base-files creates on configuration, and removes leftovers of mmdebstrap."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("etc/apt", "var/cache/apt", "var/lib/apt"):
        shutil.rmtree(root / name, ignore_errors=True)
