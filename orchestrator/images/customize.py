"""Turns a fresh Debian root into the root of guests: files of the recipe, units, cuts; and nothing that identifies a machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.initramfs import find_kernel, parse_modules_dep
from orchestrator.images.recipe import OVERLAY, Cut, RootRecipe

EPOCH = 1760000000
"""Unix time; no file of a root is newer, so that two builds are equal."""

# Maintainer scripts make these once per root: all guests of an image would share them. Of the build machine: the host name and
# the name servers. With their time of day: logs and caches.
_IDENTITY = (
    "etc/ssh/ssh_host_*",
    "etc/machine-id",
    "var/lib/dbus/machine-id",
    "etc/nvme/hostid",
    "etc/nvme/hostnqn",
    "etc/iscsi/initiatorname.iscsi",
    "etc/hostname",
    "etc/resolv.conf",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/log/**/*",
    "var/cache/apt/**/*",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/*",
    "var/lib/apt/lists/**/*",
    "var/lib/dpkg/*-old",
    "tmp/**/*",
    "var/tmp/**/*",
    "run/**/*",
    "boot/**/*",  # kernel and initramfs are files of the image
)
_NULL = "/dev/null"


def customize(root: Path, recipe: RootRecipe, layers: Sequence[Path]) -> None:
    """``layers`` are the folders of the recipe and its bases, the base first."""
    for layer in layers:
        if (layer / OVERLAY).is_dir():
            _copy_overlay(layer / OVERLAY, root)
    if recipe.enable:
        run(["chroot", root, "systemctl", "--quiet", "enable", *recipe.enable])
    for cut in recipe.cut:
        _apply(root, cut)
    if any(cut.drivers for cut in recipe.cut):
        run(["chroot", root, "depmod", find_kernel(root)[0]])


def remove_identity(root: Path) -> None:
    """To be called after the last program has run in the root."""
    for pattern in _IDENTITY:
        for path in find_in_root(root, pattern):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
    (root / "etc/machine-id").touch()  # empty: systemd takes the UUID of the virtual machine
    (root / "etc/machine-id").chmod(0o444)
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    for name in ("etc/.updated", "var/.updated"):  # systemd need not build its caches again at the first boot
        (root / name).touch()


def clamp_times(root: Path) -> None:
    """Sets the times of all newer files to EPOCH."""
    for path in (root, *root.rglob("*")):
        if path.lstat().st_mtime > EPOCH:
            os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def find_in_root(root: Path, pattern: str) -> list[Path]:
    """The paths that match a pattern, the deepest first; never through a symbolic link of the root."""
    if set(pattern) & set("*?["):
        paths = list(root.glob(pattern))
    else:  # glob() does not find a dangling link without a wildcard
        paths = [root / pattern] if os.path.lexists(root / pattern) else []
    found = [path for path in paths if _is_inside(root, path)]
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def plan_removed_modules(needs: dict[str, tuple[str, ...]], folders: Iterable[str]) -> tuple[str, ...]:
    """The files of the modules below the folders that no module outside them needs.

    ``needs`` is of parse_modules_dep(); folders are relative to ``kernel/`` and may have wildcards.
    """
    patterns = [f"kernel/{folder.rstrip('/')}/*" for folder in folders]
    dropped = {file for file in needs if any(fnmatchcase(file, pattern) for pattern in patterns)}
    # modules.dep lists the indirect dependencies too
    needed = {other for file, others in needs.items() if file not in dropped for other in others}
    return tuple(sorted(dropped - needed))


def _apply(root: Path, cut: Cut) -> None:
    system = root / "etc/systemd"
    for folder, names in ((system / "system", cut.units), (system / "system-generators", cut.generators)):
        _make_folder(folder)
        for name in names:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(_NULL)
    if cut.blacklist:
        with (root / "etc/modprobe.d/nohype.conf").open("a") as file:
            file.writelines(f"blacklist {name}\n" for name in cut.blacklist)
    if cut.drivers:
        _remove_modules(root, cut.drivers)
    for pattern in cut.files:
        for path in _expect_some(root, pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _remove_modules(root: Path, folders: Sequence[str]) -> None:
    library = root / "usr/lib/modules" / find_kernel(root)[0]
    needs = parse_modules_dep((library / "modules.dep").read_text())
    for file in plan_removed_modules(needs, folders):
        (library / file).unlink(missing_ok=True)


def _expect_some(root: Path, pattern: str) -> list[Path]:
    found = find_in_root(root, pattern)
    if not found:  # a list that has gone stale would keep what it names
        raise ImageError(f"cannot cut {pattern}: no file of the root matches", "remove the line from the recipe")
    return found


def _copy_overlay(source: Path, root: Path) -> None:
    """Copies files as root's, readable by all and executable as in the source: a checkout keeps no other modes."""
    for path in _walk(source):
        target = root / path.relative_to(source)
        if not _is_inside(root, target):
            raise ImageError(f"cannot copy {path}: {target.parent} leads out of the root through a symbolic link")
        _make_folder(target.parent)
        shutil.copyfile(path, target)
        os.chown(target, 0, 0)
        target.chmod(0o755 if os.access(path, os.X_OK) else 0o644)


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir()
        path.chmod(0o755)


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _is_inside(root: Path, path: Path) -> bool:
    return path.parent.resolve().is_relative_to(root.resolve())
