"""Debian root file systems built by mmdebstrap. The mirror (`apt`) does not stay in a root."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from orchestrator.images.apt import KEYRING, SUITE, AptSettings, check_keyring, format_source, read_apt_settings
from orchestrator.images.cache import locked
from orchestrator.images.logged import run_logged

BACKPORTS = f"{SUITE}-backports"

_EXTRACTED = "var/lib/dpkg/extracted"
_INSTALLED = re.compile(r"Inst (\S+) (?:\[\S*\] )?\((\S+) ")
_DEBS_LIMIT = 1 << 30  # bytes; a larger cache of packages is emptied

# Own mount and PID namespaces, and death with the parent: no mount or process outlives the build.
CONTAINED = (
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
)  # fmt: skip
# An empty network namespace: nothing can be downloaded.
_OFFLINE = ("--net",)

# Documentation would be a third of the image.
EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
)

# The machine's mirror and proxy do not belong in an image.
_FORGET = 'rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap'


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
            check_keyring()
            _limit(debs)
            settings = read_apt_settings()
            argv = ["--", *build_mmdebstrap(settings, target, packages, debs, variant=variant, suites=suites, updates=updates)]
        run_logged(
            [*CONTAINED, *argv, *(_record_extracted(packages) if variant == "extract" else ())],
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
        *_common_arguments(packages, variant), f"--keyring={KEYRING}",
        *(f"--aptopt={option}" for option in (*settings.options, 'Acquire::Retries "3";', 'Acquire::Languages "none";')),
        # It would rank the suite above its own updates.
        *(() if updates else (f'--aptopt=APT::Default-Release "{suites[-1]}";',)),
        "--skip=essential/unlink",  # keeps the packages of the essential set for the cache
        f"--setup-hook={fill}", f"--extract-hook={keep}", f"--customize-hook={keep}", f"--customize-hook={_FORGET}",
        SUITE, str(target), *(format_source(uri, suite) for uri, suite in sources),
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
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED), "--dpkgopt=force-unsafe-io",
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
