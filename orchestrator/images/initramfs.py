"""A small initramfs: busybox, kernel modules with their dependencies, and an init from a file."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.errors import ImageError
from orchestrator.host.run import run

_EPOCH = 0  # all times in the archive: the same inputs give the same bytes


def find_kernel(root: Path) -> tuple[str, Path]:
    """The version and the image file of the only kernel. Raises ImageError if there is not one kernel."""
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise ImageError(f"{root} has {len(kernels)} kernels, expected 1", "check the list of packages")
    return kernels[0].name.removeprefix("vmlinuz-"), kernels[0]


def parse_modules_dep(text: str) -> dict[str, tuple[str, ...]]:
    """modules.dep(5): file of a module → files of the modules it needs."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name: tuple(needed.split()) for name, colon, needed in lines if colon}


def module_name(file: str) -> str:
    """``kernel/drivers/net/foo-bar.ko.xz`` → ``foo_bar``, as lsmod shows it."""
    return Path(file).name.partition(".")[0].replace("-", "_")


def plan_modules(
    needs: dict[str, tuple[str, ...]], names: Sequence[str], builtin: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """The files of the named modules and their dependencies in load order, without those that are built in."""
    files = {module_name(file): file for file in needs}
    order: dict[str, None] = {}

    def add(file: str) -> None:
        for needed in needs[file]:
            add(needed)
        order.setdefault(file)

    for name in names:
        wanted = name.replace("-", "_")
        if wanted in builtin:
            continue
        if wanted not in files:
            raise ImageError(f"module {name} does not exist for this kernel", "check the list of modules in the recipe")
        add(files[wanted])
    return tuple(order)


def build_initramfs(
    root: Path, init: Path, modules: Sequence[str], output: Path, *, programs: Sequence[str] = (), tools: Path | None = None
) -> None:
    """Writes a gzip-compressed newc archive with /init, /bin/busybox, and modules for busybox's modprobe.

    ``root`` has one kernel, busybox-static and kmod; depmod is run in it if necessary. ``programs``: further files of it, which
    are copied with their shared libraries. ``tools``: a folder with static programs for /bin.
    """
    version, _ = find_kernel(root)
    library = root / "usr/lib/modules" / version
    if not (library / "modules.dep").exists():
        run(["chroot", root, "/usr/sbin/depmod", version])
    builtin = frozenset(module_name(line) for line in (library / "modules.builtin").read_text().splitlines())
    files = plan_modules(parse_modules_dep((library / "modules.dep").read_text()), modules, builtin)
    busybox = next((path for path in (root / "usr/bin/busybox", root / "bin/busybox") if path.exists()), None)
    if busybox is None:
        raise ImageError(f"busybox is missing in {root}", "add busybox-static to the packages of the recipe")
    with TemporaryDirectory(dir=output.parent, prefix=".initramfs-") as name:
        tree = Path(name)
        for folder in ("bin", "dev", "proc", "sys", "mnt"):
            (tree / folder).mkdir()
        shutil.copyfile(busybox, tree / "bin/busybox")
        (tree / "bin/sh").symlink_to("busybox")
        shutil.copyfile(init, tree / "init")
        _copy_modules(library, files, tree / "lib/modules" / version)
        for program in programs:
            _copy_program(root, program, tree)
        if tools:
            shutil.copytree(tools, tree / "bin", dirs_exist_ok=True)
        _write_archive(tree, output)


def parse_ldd(text: str) -> tuple[str, ...]:
    """ldd(1): the absolute paths of the libraries and of the loader. Raises ImageError if one is missing."""
    if missing := [line.strip() for line in text.splitlines() if line.endswith("=> not found")]:
        raise ImageError(f"a shared library is missing: {missing[0]}", "check the list of packages in the recipe")
    words = (line.partition(" (")[0].rpartition("=> ")[2].strip() for line in text.splitlines())
    return tuple(word for word in words if word.startswith("/"))


def _copy_program(root: Path, program: str, tree: Path) -> None:
    libraries = parse_ldd(run(["chroot", root, "ldd", f"/{program}"]).stdout)
    if not libraries:
        raise ImageError(f"{program} has no shared libraries", "check the list of programs in the recipe")
    for file in (program, *libraries):
        target = tree / file.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_resolve(root, file), target)


def _resolve(root: Path, file: str) -> Path:
    """The file behind the links of a root, whose targets are relative to the root."""
    done = run(["chroot", root, "readlink", "-f", f"/{file.lstrip('/')}"])
    return root / done.stdout.strip().lstrip("/")


def format_modules_dep(needs: dict[str, tuple[str, ...]], files: Sequence[str]) -> str:
    """modules.dep(5) for modules in one folder, named ``<module>.ko``."""
    lines = ((module_name(file), " ".join(f"{module_name(needed)}.ko" for needed in needs[file])) for file in files)
    return "".join(f"{name}.ko: {needed}".rstrip() + "\n" for name, needed in lines)


def filter_aliases(text: str, files: Sequence[str]) -> str:
    """The lines of modules.alias for these modules; they map devices to modules."""
    kept = {module_name(file) for file in files}
    return "".join(
        f"{line}\n"
        for line in text.splitlines()
        if line.startswith("alias ") and line.rsplit(" ", 1)[1].replace("-", "_") in kept
    )


def _copy_modules(library: Path, files: Sequence[str], target: Path) -> None:
    target.mkdir(parents=True)
    for file in files:
        (target / f"{module_name(file)}.ko").write_bytes(_read_module(library / file))
    needs = parse_modules_dep((library / "modules.dep").read_text())
    (target / "modules.dep").write_text(format_modules_dep(needs, files))
    aliases = filter_aliases((library / "modules.alias").read_text(), files)
    if files and not aliases:  # depmod reports no error if it cannot read the modules; the guest would have no driver
        raise ImageError(f"depmod found no devices for {', '.join(map(module_name, files))}", f"see {library}/modules.alias")
    (target / "modules.alias").write_text(aliases)
    (target / "modules.symbols").write_text("")  # busybox's modprobe warns if it is missing


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _write_archive(tree: Path, output: Path) -> None:
    paths = [tree, *sorted(tree.rglob("*"))]
    for path in paths:
        if not path.is_symlink():
            path.chmod(0o755)
        os.utime(path, (_EPOCH, _EPOCH), follow_symlinks=False)
    names = "".join(f"{path.relative_to(tree)}\n" for path in paths)
    plain = output.with_suffix(".cpio")
    argv = ["cpio", "--create", "--format=newc", "--reproducible", "--owner=0:0", "--quiet", f"--file={plain}"]
    run(argv, cwd=tree, input=names)
    with output.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=_EPOCH) as packed:
        packed.write(plain.read_bytes())
    plain.unlink()
