"""Wheel, sdist and Debian package: what is in them, and installation, upgrade, removal and purge in a root of Debian 13."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import __version__
from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import source_tree
from orchestrator.lab.build import build_base
from release.deb import build_deb, read_depends
from release.dist import build_dist
from release.units import ROLE, build_units
from tests.harness.crash import World
from tests.harness.guests import create, open_manager
from tests.harness.large_folder import large_folder

# Each builds or installs some ten thousand files, and may wait for a build of the lab's root.
pytestmark = pytest.mark.timeout(1800)

JUNK = ("__pycache__", ".pyc", ".venv", ".pytest_cache", "build/", ".git/", ".hypothesis")
CONFIG = '[host]\nhousekeeping = "0-1"\nuplinks = ["nic0"]\n'

Chroot = Callable[..., str]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist."""
    wheel, sdist = sorted(build_dist(tmp_path_factory.mktemp("dist")), key=lambda path: path.suffix, reverse=True)
    return wheel, sdist


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deb(tmp_path_factory.mktemp("deb"))


@pytest.fixture
def chroot(deb: Path) -> Iterator[Chroot]:
    """Runs a command in a root of Debian 13 with the packages of a host; the root is discarded. /run has no systemd."""
    if os.geteuid():
        pytest.skip("needs root for mount and chroot")
    base = build_base(source_tree(), cache_folder(), progress=print)
    with large_folder("deb") as top, hold_overlay(base, top) as holder:
        root = Path(f"/proc/{holder}/root{top}/root")
        shutil.copy(deb, root / "tmp")

        def run(*words: str, status: int = 0) -> str:
            enter = ["nsenter", f"--target={holder}", "--mount", "chroot", str(top / "root")]
            argv = [*enter, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", *words]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == status, done.stdout + done.stderr
            return done.stdout + done.stderr

        run.root = root  # type: ignore[attr-defined]
        yield run


@contextmanager
def hold_overlay(lower: Path, top: Path) -> Iterator[int]:
    """A process in whose mount namespace ``top``/root is the overlay; it ends with this process, and the mount with it."""
    for name in ("root", "upper", "work"):
        (top / name).mkdir()
    options = f"lowerdir={lower},upperdir={top}/upper,workdir={top}/work"
    script = f"mount -t overlay overlay -o {options} {top}/root && echo mounted && exec cat"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "mounted\n"
        yield process.pid


def install(chroot: Chroot, deb: Path) -> str:
    # minimal roots leave documents out
    return chroot("dpkg", "--path-include=/usr/share/doc/nohype/*", "--path-include=/usr/share/man/*", "-i", f"/tmp/{deb.name}")


def test_wheel_has_the_program_only(dist: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(dist[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"orchestrator", "nohype_orchestrator"}
    assert "orchestrator/lab/specs/numa.toml" in names
    assert "orchestrator/cli/main.py" in names
    assert not [name for name in names if any(junk in name for junk in JUNK)]


def test_sdist_is_the_source_tree(dist: tuple[Path, Path]) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=source_tree(), capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    with tarfile.open(dist[1]) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert not {name for name in tracked if name and (source_tree() / name).is_file()} - names - {".gitignore"}
    assert not [name for name in names if any(junk in name for junk in JUNK)]


def test_deb_describes_itself(deb: Path) -> None:
    about = subprocess.run(["dpkg-deb", "--info", str(deb)], capture_output=True, text=True, check=True).stdout
    assert f"Version: {__version__}\n" in about
    assert "python3-libvirt" in about
    listed = subprocess.run(["dpkg-deb", "--contents", str(deb)], capture_output=True, text=True, check=True).stdout
    for path in (
        "usr/bin/nohype", "usr/sbin/nohyped", "usr/lib/systemd/system/nohyped.service", "usr/lib/systemd/system/nohyped.socket",
        "usr/lib/sysusers.d/nohype.conf", "usr/lib/udev/rules.d/59-nohype-disks.rules",
        "usr/share/bash-completion/completions/nohype", "usr/share/zsh/vendor-completions/_nohype",
        "usr/share/fish/vendor_completions.d/nohype.fish", "usr/share/man/man1/nohype.1.gz",
        "usr/share/man/man1/nohype-guest.1.gz", "usr/share/man/man8/nohyped.8.gz", "usr/share/man/man5/nohype.toml.5.gz",
        "usr/share/nohype/guest-images/debian/image.toml", "usr/share/doc/nohype/examples/nohype.toml",
    ):  # fmt: skip
        assert f" ./{path}" in listed, path
    assert not [line for line in listed.splitlines() if "__pycache__" in line or " root/root " not in line]


def test_same_sources_give_the_same_deb(deb: Path, tmp_path: Path) -> None:
    former = os.umask(0o077)
    try:
        assert build_deb(tmp_path).read_bytes() == deb.read_bytes()
    finally:
        os.umask(former)


def test_deb_depends_on_what_the_role_installs() -> None:
    packages = (ROLE / "files" / "packages.txt").read_text()
    assert all(name in packages for name in ("qemu-system-x86", "python3-libvirt"))
    assert {"qemu-system-x86", "python3-libvirt", "libvirt-daemon-system"} <= set(read_depends())
    assert "python3-venv" not in read_depends()


def test_units_are_those_of_the_role_without_a_host() -> None:
    units = build_units()
    service = units["nohyped.service"]
    assert "\nExecStart=/usr/lib/nohype/bin/nohyped\n" in service
    assert "\nConditionPathExists=/etc/nohype/nohype.toml\n" in service
    assert "/opt/nohype" not in service
    assert "nohype-uplink" not in service
    assert "KillMode=mixed" in service
    assert "SocketGroup=nohype" in units["nohyped.socket"]


def test_templates_that_have_changed_are_refused(tmp_path: Path) -> None:
    shutil.copytree(ROLE, tmp_path / "role")
    template = tmp_path / "role" / "templates" / "nohyped.service.j2"
    template.write_text(template.read_text().replace("CPUAffinity=", "AllowedCPUs="))
    with pytest.raises(ValueError, match="CPUAffinity"):
        build_units(tmp_path / "role")


def test_installed_package_works(chroot: Chroot, deb: Path) -> None:
    install(chroot, deb)
    assert f"version {__version__}" in chroot("nohype", "--version")
    assert f"version {__version__}" in chroot("nohyped", "--version")
    assert "nohype" in chroot("getent", "group", "nohype")
    assert "recipes: bench, debian" in chroot("nohype", "image", "list")
    example = "/usr/share/doc/nohype/examples/nohype.toml"
    assert f"{example} is valid" in chroot("nohype", "config", "check", example)
    completed = chroot("env", "_NOHYPE_COMPLETE=bash_complete", "COMP_WORDS=nohype gu", "COMP_CWORD=1", "nohype")
    assert completed == "plain,guest\n"
    assert "nohype - run guests" in chroot("sh", "-c", "zcat /usr/share/man/man1/nohype.1.gz | sed 's/\\\\-/-/g'")
    assert "/usr/lib/python3/dist-packages/libvirt.py" in chroot(
        "/usr/lib/nohype/bin/python3", "-c", "import libvirt; print(libvirt.__file__)"
    )
    chroot("systemd-analyze", "verify", "nohyped.service", "nohyped.socket")
    assert "enabled\nenabled\n" in chroot("systemctl", "is-enabled", "nohyped.service", "nohyped.socket")


def test_upgrade_keeps_what_the_manager_has_written(chroot: Chroot, deb: Path) -> None:
    """dpkg calls the scripts for the same version as for a newer one."""
    install(chroot, deb)
    root: Path = chroot.root  # type: ignore[attr-defined]
    (root / "var/lib/nohype").mkdir()
    (root / "var/lib/nohype/kept").write_text("kept")
    (root / "etc/nohype/nohype.toml").write_text(CONFIG)
    install(chroot, deb)
    assert chroot("dpkg-query", "-W", "-f=${Version} ${Status}", "nohype") == f"{__version__} install ok installed"
    chroot("nohype", "--version")
    chroot("dpkg", "--remove", "nohype")
    assert (root / "var/lib/nohype/kept").read_text() == "kept"
    assert not (root / "usr/lib/nohype").exists()
    chroot("dpkg", "--purge", "nohype")
    assert not (root / "var/lib/nohype").exists()
    assert (root / "etc/nohype/nohype.toml").read_text() == CONFIG


def test_removal_is_refused_while_a_guest_runs(chroot: Chroot, deb: Path, tmp_path: Path) -> None:
    install(chroot, deb)
    root: Path = chroot.root  # type: ignore[attr-defined]
    world = World(tmp_path)
    create(open_manager(world))
    folder = root / "var/lib/nohype"
    folder.mkdir()
    for path in world.folder.glob("ledger.sqlite*"):
        if path.is_file():
            shutil.copy(path, folder)
    refused = chroot("dpkg", "--remove", "nohype", status=1)
    assert "the manager is needed by guests: web (running)" in refused
    assert "nohype guest stop" in refused
    chroot("nohype", "--version")


@pytest.mark.parametrize("path", ["opt/nohype/bin/nohyped", "etc/systemd/system/nohyped.service"])
def test_installation_is_refused_where_the_role_was_applied(chroot: Chroot, deb: Path, path: str) -> None:
    root: Path = chroot.root  # type: ignore[attr-defined]
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("of the role\n")
    refused = chroot("dpkg", "-i", f"/tmp/{deb.name}", status=1)
    assert f"the Ansible role has set up this host (/{path})" in refused
    assert not (root / "usr/lib/nohype").exists()
    (root / path).unlink()
    (root / "etc/systemd/system/nohyped.service").symlink_to("/dev/null")  # masked by the administrator
    install(chroot, deb)
