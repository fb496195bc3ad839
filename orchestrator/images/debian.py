"""Debian root file systems by mmdebstrap. The mirror is that of the machine's own apt; none is named here or left in a root."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.cache import locked
from orchestrator.images.logged import run_logged

SUITE = "trixie"
BACKPORTS = f"{SUITE}-backports"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_INDEX_FORMAT = "$(ORIGIN) $(LABEL) $(COMPONENT) $(CODENAME) $(REPO_URI)"
_OPTION = re.compile(r'(Acquire::(?:https?::|Retries|Check-Valid-Until|Check-Date)\S*) "(.+)";')
_DEBS_LIMIT = 1 << 30  # bytes; a cache of packages that has grown beyond is emptied

# Mounts and processes of a build end with it, however it ends: its own mount and PID namespace, and death with its parent.
_CONTAINED = (
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
)  # fmt: skip

# Nobody reads manuals in these roots; they would be a third of the image.
_EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
)


@dataclass(frozen=True)
class AptSettings:
    """Where packages come from.

    Attributes:
        uri: URI of a Debian archive that the machine itself uses.
        options: apt configuration lines of the machine that matter for downloads (proxy, certificates).
    """

    uri: str
    options: tuple[str, ...]


def read_apt_settings() -> AptSettings:
    """Reads the machine's own apt settings.

    Raises:
        ImageError: the machine's apt knows no Debian archive.
        CommandError: apt is not installed.
    """
    targets = run(["apt-get", "indextargets", "--format", _INDEX_FORMAT]).stdout
    return AptSettings(parse_archive_uri(targets), parse_apt_options(run(["apt-config", "dump"]).stdout))


def parse_archive_uri(targets: str) -> str:
    """The first Debian archive in the output of ``apt-get indextargets``; one that already has our suite is preferred.

    Only origin and label Debian, component main will do: backports and security archives lack most packages.

    Raises:
        ImageError: there is none.
    """
    found: list[tuple[bool, str]] = []
    for line in targets.splitlines():
        words = line.rsplit(" ", 1)
        match words[0].split(" ") if len(words) == 2 else []:
            case ["Debian", "Debian", "main", codename] if not codename.endswith(("-backports", "-proposed-updates")):
                found.append((codename.split("-")[0] == SUITE, words[1]))
    if not found:
        raise ImageError(
            "this machine's apt knows no Debian archive (origin Debian, component main)",
            "run `apt-get update`; on another distribution add a deb line for a Debian archive with "
            f"[signed-by={_KEYRING}], from the package debian-archive-keyring",
        )
    return max(found, key=lambda item: item[0])[1]


def parse_apt_options(dump: str) -> tuple[str, ...]:
    """The lines of ``apt-config dump`` that decide how packages are fetched, so that a proxy or a private CA works for us too."""
    return tuple(f'{match[1]} "{match[2]}";' for line in dump.splitlines() if (match := _OPTION.fullmatch(line.strip())))


def make_root(
    target: Path,
    packages: Sequence[str],
    *,
    cache: Path,
    log: Path,
    variant: str = "essential",
    suites: Sequence[str] = (SUITE,),
    env: Mapping[str, str] | None = None,
) -> None:
    """Makes a root file system of our suite with the packages and what they depend on (recommendations are left out).

    Args:
        target: folder to fill; made if missing, must be empty.
        cache: folder that keeps the downloaded packages (``<cache>/debs``), so that several roots fetch a package once.
        log: file that gets what mmdebstrap prints.
        variant: mmdebstrap's; "extract" unpacks only and runs no maintainer scripts.
        suites: where packages come from; of a package in several, that of the last.
        env: environment variables for the packages' maintainer scripts.

    Raises:
        ImageError: the machine lacks the archive's keys or knows no archive, or mmdebstrap failed.
    """
    if not _KEYRING.exists():
        raise ImageError(f"{_KEYRING} is not there, so packages cannot be checked", "apt-get install debian-archive-keyring")
    settings = read_apt_settings()
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    with locked(cache / "debs.lock", progress=lambda _: None):
        _limit(debs)
        argv = build_mmdebstrap(settings, target, packages, debs, variant=variant, suites=suites)
        run_logged(
            [*_CONTAINED, *argv],
            task=f"cannot make a Debian {SUITE} root file system",
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
) -> list[str]:
    """The command line of mmdebstrap; see ``make_root``."""
    archives, kept = '"$1"/var/cache/apt/archives', shlex.quote(str(debs))
    fill = f"mkdir -p {archives} && cp -a --reflink=auto {kept}/. {archives}/"
    # -n: what came from the cache need not go back
    keep = f"find {archives} -maxdepth 1 -name '*.deb' -exec cp -n --preserve=timestamps --reflink=auto -t {kept} {{}} +"
    # the machine's mirror and proxy are nobody's business in an image
    forget = 'rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap'
    return [
        "mmdebstrap", "--mode=root", f"--variant={variant}", "--format=directory", "--architectures=amd64",
        f"--include={','.join(packages)}", f"--keyring={_KEYRING}",
        *(f"--aptopt={option}" for option in (*settings.options, 'Acquire::Retries "3";', 'Acquire::Languages "none";')),
        f'--aptopt=APT::Default-Release "{suites[-1]}";',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED), "--dpkgopt=force-unsafe-io",
        "--skip=essential/unlink",  # or the packages of the essential set would not reach the cache
        f"--setup-hook={fill}", f"--extract-hook={keep}", f"--customize-hook={keep}", f"--customize-hook={forget}",
        SUITE, str(target), *(f"deb [signed-by={_KEYRING}] {settings.uri} {suite} main" for suite in suites),
    ]  # fmt: skip


def _limit(debs: Path) -> None:
    if sum(file.stat().st_size for file in debs.iterdir()) > _DEBS_LIMIT:
        shutil.rmtree(debs)
        debs.mkdir()


def _merge_usr(root: Path) -> None:
    """Makes /bin, /lib and so on, which base-files makes in a root that is set up; and drops what mmdebstrap leaves behind."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("etc/apt", "var/cache/apt", "var/lib/apt"):
        shutil.rmtree(root / name, ignore_errors=True)
