"""Builds the Debian package: `python -m release.deb FOLDER [VERSION]`. The same sources and wheels give the same file.

Debian 13 has some of the required Python packages in other versions only. So the package brings all of them, the wheels that labs
and the Ansible role install too, except python3-libvirt, which must match the host's libvirt.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from click.shell_completion import get_completion_class

from orchestrator import __version__
from orchestrator.cli.main import nohype
from orchestrator.errors import OrchestratorError
from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import build_wheelhouse, source_tree
from release.manpages import read_date, write_manpages
from release.units import ROLE, build_units

MAINTAINER = "NoHype orchestrator developers <maintainers@nohype.invalid>"
PYTHON = "3.13"  # of Debian 13, as the wheels
HOME = "usr/lib/nohype"
SITE = f"{HOME}/lib/python{PYTHON}/site-packages"
_SOURCE = Path(__file__).parent / "debian"
_SCRIPTS = ("preinst", "postinst", "prerm", "postrm")

_PROGRAMS = {"nohype": ("usr/bin", "orchestrator.cli.main"), "nohyped": ("usr/sbin", "orchestrator.daemon.main")}
_START = f"""#!/{HOME}/bin/python3
import sys

from {{module}} import main

sys.exit(main())
"""
_COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/nohype",
    "zsh": "usr/share/zsh/vendor-completions/_nohype",
    "fish": "usr/share/fish/vendor_completions.d/nohype.fish",
}


def build_deb(output: Path, version: str = __version__) -> Path:
    """Writes nohype_VERSION_amd64.deb to the folder ``output``. Raises OrchestratorError, OSError, ValueError."""
    date, tree = read_date(), source_tree()
    wheels = build_wheelhouse(tree, cache_folder(), progress=print)
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"nohype_{version}_amd64.deb"
    with TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        _install_python(root, wheels)
        _install_files(root, tree, date, version)
        _write_control(root, version)
        _set_modes(root)
        # one thread: their number changes the compressed blocks
        argv = ["dpkg-deb", "--root-owner-group", "--threads-max=1", "-Zxz", "-z1", "--build", str(root), str(target)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(date)}
        subprocess.run(argv, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return target


def _install_python(root: Path, wheels: Path) -> None:
    """A virtual environment with the wheels (PEP 405, PEP 427): its interpreter is Debian's."""
    site = root / SITE
    site.mkdir(parents=True)
    with tarfile.open(wheels) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file
            with zipfile.ZipFile(file) as wheel:
                for name in wheel.namelist():
                    # NAME.data has programs and headers, which are not needed
                    if ".data/" not in name:
                        wheel.extract(name, site)
    home = root / HOME
    (home / "bin").mkdir()
    (home / "bin" / "python3").symlink_to(f"../../../bin/python{PYTHON}")
    (home / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {PYTHON}\n")
    for name, (folder, module) in _PROGRAMS.items():
        (home / "bin" / name).write_text(_START.format(module=module))
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).symlink_to(f"../lib/nohype/bin/{name}")


def _install_files(root: Path, tree: Path, date: int, version: str) -> None:
    for name, text in build_units().items():
        _write(root / "usr/lib/systemd/system" / name, text)
    _write(root / "usr/lib/sysusers.d/nohype.conf", "# operators: may open the manager's socket\ng nohype -\n")
    rules = "59-nohype-disks.rules"
    _write(root / "usr/lib/udev/rules.d" / rules, re.sub(r"\A# Written by .*\n", "", (ROLE / "files" / rules).read_text()))
    shutil.copytree(tree / "guest-images", root / "usr/share/nohype/guest-images", ignore=shutil.ignore_patterns("__pycache__"))
    for shell, path in _COMPLETIONS.items():
        kind = get_completion_class(shell)
        assert kind, shell
        _write(root / path, kind(nohype, {}, "nohype", "_NOHYPE_COMPLETE").source())
    for page in write_manpages(root / "usr/share/man", date):
        _compress(page)
    documents = root / "usr/share/doc/nohype"
    _write(documents / "copyright", (_SOURCE / "copyright").read_text())
    _write(documents / "examples" / "nohype.toml", (_SOURCE / "nohype.toml").read_text())
    _write(documents / "CHANGELOG.md", (tree / "CHANGELOG.md").read_text())
    day = format_datetime(datetime.fromtimestamp(date, UTC))
    entry = f"nohype ({version}) stable; urgency=medium\n\n  * See CHANGELOG.md.gz.\n\n -- {MAINTAINER}  {day}\n"
    _write(documents / "changelog", entry)
    for name in ("CHANGELOG.md", "changelog"):
        _compress(documents / name)
    _write(root / "usr/share/lintian/overrides/nohype", (_SOURCE / "lintian-overrides").read_text())


def _write_control(root: Path, version: str) -> None:
    size = sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir()) // 1024
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in _files(root))
    control = root / "DEBIAN"
    text = (
        (_SOURCE / "control")
        .read_text()
        .format(version=version, maintainer=MAINTAINER, size=size, depends=", ".join(read_depends()))
    )
    _write(control / "control", text)
    _write(control / "md5sums", sums)
    for name in _SCRIPTS:
        _write(control / name, (_SOURCE / name).read_text())


def read_depends() -> list[str]:
    """Debian packages: the interpreter of the wheels, and what the host role installs."""
    lines = (ROLE / "files" / "packages.txt").read_text().split("\n")
    names = {line.strip() for line in lines if line.strip() and not line.startswith("#")} - {"python3", "python3-venv"}
    major, minor = PYTHON.split(".")
    fixed = [f"python3 (>= {PYTHON}~)", f"python3 (<< {major}.{int(minor) + 1}~)", "libc6 (>= 2.34)", "systemd", "udev"]
    return fixed + sorted(names - {"systemd", "udev"})


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _compress(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


def _set_modes(root: Path) -> None:
    """Does not depend on the umask and the wheels. Scripts of guest images keep their mode."""
    for path in (root, *root.rglob("*")):
        if path.is_symlink():
            continue
        script = path.parent in (root / HOME / "bin", root / "DEBIAN") and path.name in (*_PROGRAMS, *_SCRIPTS)
        image = path.is_relative_to(root / "usr/share/nohype/guest-images") and bool(path.stat().st_mode & 0o100)
        path.chmod(0o755 if path.is_dir() or script or image else 0o644)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m release.deb FOLDER [VERSION]")
    try:
        print(build_deb(Path(sys.argv[1]), *sys.argv[2:]))
    except (OrchestratorError, OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"cannot build the Debian package: {error}")


if __name__ == "__main__":
    main()
