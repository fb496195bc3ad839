"""Small disk images for the tests of imports: file systems from folders, partition tables, and qcow2."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

MB = 1 << 20
OS_RELEASE = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\n'


def make_kernel(version: str = "6.12.1-test", size: int = 8192) -> bytes:
    """A file with the header of an x86 kernel, which starts nothing."""
    data = bytearray(size)
    data[0x1FE:0x206] = b"\x55\xaa\0\0HdrS"
    struct.pack_into("<H", data, 0x20E, 0x300)
    data[0x500 : 0x500 + len(version) + 1] = version.encode() + b"\0"
    return bytes(data)


def make_initrd(text: str = "initrd") -> bytes:
    return b"\x1f\x8b" + text.encode() * 100


def make_tree(folder: Path, *versions: str, boot: str = "boot", root: bool = True) -> Path:
    """A root file system with kernels, or (without ``root``) only their folder."""
    (folder / boot).mkdir(parents=True, exist_ok=True)
    for version in versions:
        (folder / boot / f"vmlinuz-{version}").write_bytes(make_kernel(version))
        (folder / boot / f"initrd.img-{version}").write_bytes(make_initrd(version))
    if root:
        for name in ("etc", "usr/lib", "usr/bin"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "usr/lib/os-release").write_text(OS_RELEASE)
        (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
    return folder


def make_ext4(file: Path, tree: Path, *, size: int = 8 * MB, uuid: str = "11111111-2222-3333-4444-555555555555") -> Path:
    file.write_bytes(b"")
    _run("truncate", "-s", str(size), str(file))
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-U", uuid, "-L", "root", "-d", str(tree), str(file))
    return file


def make_fat(file: Path, files: Mapping[str, bytes], *, size: int = 8 * MB) -> Path:
    _run("truncate", "-s", str(size), str(file))
    _run("mformat", "-i", str(file), "-T", str(size // 512), "-h", "16", "-s", "63", "::")
    for name, data in files.items():
        source = file.with_name("fat-content")
        source.write_bytes(data)
        _run("mcopy", "-i", str(file), str(source), f"::{name}")
        source.unlink()
    return file


def make_disk(file: Path, *parts: Path | bytes, label: str = "gpt", bios_code: bool = False) -> Path:
    """A disk with a partition for each content, from 1 MB on, of its size."""
    contents = [part.read_bytes() if isinstance(part, Path) else part for part in parts]
    lines, start = [f"label: {label}"], 2048
    for content in contents:
        lines.append(f"start={start}, size={len(content) // 512}")
        start += -(-len(content) // MB) * 2048
    _run("truncate", "-s", str(start * 512 + MB), str(file))
    _run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(file), stdin="\n".join(lines))
    with file.open("r+b") as disk:
        place = MB
        for content in contents:
            disk.seek(place)
            disk.write(content)
            place += -(-len(content) // MB) * MB
        if bios_code:
            disk.seek(0)
            disk.write(b"\xeb\x63\x90")
    return file


def make_qcow2(file: Path, raw: Path, *options: str) -> Path:
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(file))
    return file


def _run(*argv: str, stdin: str = "") -> None:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60)
    assert not done.returncode, (argv, done.stderr)


def patch(file: Path, offset: int, data: bytes) -> Path:
    with file.open("r+b") as image:
        image.seek(offset)
        image.write(data)
    return file


def qcow2_header(size: int = MB, *, bits: int = 16, l1: Sequence[int] = (0,), **changes: int) -> bytes:
    """A hand-made version 3 image with the L1 table in its second cluster."""
    fields = {
        "version": 3, "backing": 0, "backing_size": 0, "crypt": 0, "l1_size": len(l1), "l1_offset": 1 << bits, "snapshots": 0,
        "refcounts": 1, "incompatible": 0, "length": 104, **changes,
    }  # fmt: skip
    head = b"QFI\xfb" + struct.pack(
        ">IQIIQIIQQIIQQQQII",
        fields["version"], fields["backing"], fields["backing_size"], bits, size, fields["crypt"], fields["l1_size"],
        fields["l1_offset"], 2 << bits, fields["refcounts"], fields["snapshots"], 0, fields["incompatible"], 0, 0, 4,
        fields["length"],
    )  # fmt: skip
    return head.ljust(1 << bits, b"\0") + struct.pack(f">{len(l1)}Q", *l1).ljust(1 << bits, b"\0")
