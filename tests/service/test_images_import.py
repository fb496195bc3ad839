"""Imports of disk images, with the real programs: what boots, what is refused, and that nothing is left of a failure."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from orchestrator.errors import ImageError, OrchestratorError, RequestError
from orchestrator.images.imported import ImportRequest, check_request, import_image
from orchestrator.images.store import Image, image_names
from orchestrator.values import Size
from orchestrator.waiting import wait_until
from tests.harness.disk_images import (
    MB,
    make_disk,
    make_ext4,
    make_fat,
    make_initrd,
    make_kernel,
    make_qcow2,
    make_tree,
    patch,
    qcow2_header,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="imports need root")

UUID = "11111111-2222-3333-4444-555555555555"
OTHER_UUID = "66666666-2222-3333-4444-555555555555"
HEAD = 1 << 16  # bytes in which most of the metadata of a small ext4 file system is


def nothing(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with two kernels, as ``root.ext4``, ``gpt.raw`` and ``gpt.qcow2``."""
    folder = tmp_path_factory.mktemp("base")
    make_ext4(folder / "root.ext4", make_tree(folder / "tree", "6.1.0-9-amd64", "6.1.0-18-amd64"), uuid=UUID)
    make_disk(folder / "gpt.raw", folder / "root.ext4")
    make_qcow2(folder / "gpt.qcow2", folder / "gpt.raw", "-c")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def take(store: Path, file: Path | None, **options: object) -> Image:
    return import_image(store, replace(ImportRequest("web", file), **options), progress=nothing)  # type: ignore[arg-type]


def refuse(store: Path, file: Path | None, message: str, **options: object) -> OrchestratorError:
    with pytest.raises(OrchestratorError, match=message) as caught:
        take(store, file, **options)
    assert leftovers(store) == []
    assert "\x1b" not in str(caught.value)
    return caught.value


def leftovers(store: Path) -> list[str]:
    """What is in the store beside locks and complete images."""
    if not store.exists():
        return []
    return sorted(
        path.name for path in store.iterdir() if path.suffix != ".lock" and path.name not in (".lock", ".builds", "web")
    )


def source(image: Image) -> str:
    assert image.provenance
    return image.provenance.source or ""


@pytest.mark.parametrize(("name", "layout"), [("root.ext4", "ext4"), ("gpt.raw", "partitioned"), ("gpt.qcow2", "partitioned")])
def test_disk_boots_the_newest_kernel_directly(base: Path, store: Path, name: str, layout: str) -> None:
    image = take(store, base / name)
    assert (image.boot, image.kernel_version) == ("direct", "6.1.0-18-amd64")
    assert image.kernel.read_bytes() == make_kernel("6.1.0-18-amd64")
    assert image.initrd.read_bytes() == make_initrd("6.1.0-18-amd64")
    assert image.cmdline == f"root=UUID={UUID} ro console=ttyS0 panic=-1"
    raw = base / ("root.ext4" if layout == "ext4" else "gpt.raw")
    assert image.disk_file.read_bytes() == raw.read_bytes()
    assert image.disk
    assert (image.disk.size, image.disk.sha256, image.disk.layout) == (raw.stat().st_size, digest(raw), layout)
    assert f"{name} ({'qcow2' if 'qcow2' in name else 'raw'}, sha256 {digest(base / name)})" in source(image)
    assert "Debian GNU/Linux 13 (trixie)" in source(image)
    assert image.provenance
    assert set(image.provenance.tools) == {"qemu-img", "debugfs", "mcopy"}
    assert leftovers(store) == []


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_boot_partition_is_found(tmp_path: Path, store: Path) -> None:
    root = make_ext4(tmp_path / "root", make_tree(tmp_path / "tree"), uuid=UUID)
    boot = make_ext4(tmp_path / "boot", make_tree(tmp_path / "files", "6.12", boot=".", root=False), uuid=OTHER_UUID)
    image = take(store, make_disk(tmp_path / "disk", boot, root, label="dos"))
    assert image.cmdline.startswith(f"root=UUID={UUID} ro")
    assert "direct boot of /vmlinuz-6.12 on partition 1" in source(image)


def test_kernel_on_a_fat_partition_is_found(tmp_path: Path, store: Path) -> None:
    root = make_ext4(tmp_path / "root", make_tree(tmp_path / "tree"), uuid=UUID)
    files = {"vmlinuz-linux": make_kernel("6.13-arch"), "initramfs-linux.img": make_initrd()}
    image = take(store, make_disk(tmp_path / "disk", make_fat(tmp_path / "esp", files), root))
    assert image.kernel.read_bytes() == files["vmlinuz-linux"]
    assert image.initrd.read_bytes() == files["initramfs-linux.img"]
    assert "partition 1 fat, partition 2 ext4" in source(image)


def test_links_inside_of_the_image_are_followed(tmp_path: Path, store: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    (tree / "usr/lib/kernel").mkdir()
    (tree / "usr/lib/kernel/k").write_bytes(make_kernel("6.12"))
    (tree / "boot/vmlinuz-6.12").symlink_to("/usr/lib/./kernel/../kernel/" + "../kernel/" * 6 + "k")  # too long for the inode
    (tree / "boot/real").write_bytes(make_initrd())
    (tree / "boot/initrd.img-6.12").symlink_to("real")
    image = take(store, make_ext4(tmp_path / "root", tree))
    assert image.kernel.read_bytes() == make_kernel("6.12")


def test_cloud_init_is_found(tmp_path: Path, store: Path) -> None:
    tree = make_tree(tmp_path / "tree", "6.12")
    (tree / "usr/bin/cloud-init").touch()
    image = take(store, make_ext4(tmp_path / "root", tree))
    assert (image.ready, image.configuration) == ("cloud-init", ())  # its initramfs does not pass a seed on
    (tree / "etc/initramfs-tools").mkdir()
    file = make_ext4(tmp_path / "root", tree)
    image = take(store, file)
    assert (image.ready, image.configuration) == ("cloud-init", ("cloud-init",))
    assert image.initrd.read_bytes().startswith(make_initrd("6.12"))
    assert b"conf/conf.d/nohype-seed" in image.initrd.read_bytes()
    image = take(store, file, ready="ssh", configuration=("credentials",), memory=Size.parse("1G"))
    assert (image.ready, image.configuration, str(image.memory)) == ("ssh", ("credentials",), "1G")


def test_given_kernel_is_used(base: Path, tmp_path: Path, store: Path) -> None:
    kernel, initrd = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(make_kernel("7.0"))
    initrd.write_bytes(make_initrd("given"))
    image = take(store, base / "gpt.raw", kernel=kernel, initrd=initrd, cmdline="quiet")
    assert (image.kernel_version, image.cmdline) == ("7.0", f"root=UUID={UUID} ro quiet")
    assert image.initrd.read_bytes() == make_initrd("given")
    image = take(store, base / "gpt.raw", kernel=kernel, initrd=initrd, cmdline="root=/dev/nvme0n1p1 rw")
    assert image.cmdline == "root=/dev/nvme0n1p1 rw"
    image = take(store, None, kernel=kernel, initrd=initrd)
    assert (image.disk, image.cmdline, str(image.memory)) == (None, "console=ttyS0 panic=-1", "256M")


@pytest.mark.parametrize("magic", [(0, b"XFSB"), (0x10040, b"_BHRfS_M"), (0x218, b"LVM2 001")])
def test_other_file_system_boots_with_firmware_if_it_can(tmp_path: Path, store: Path, magic: tuple[int, bytes]) -> None:
    content = bytearray(2 * MB)
    content[magic[0] : magic[0] + len(magic[1])] = magic[1]
    image = take(store, make_disk(tmp_path / "disk", bytes(content), bios_code=True))
    assert (image.boot, image.cmdline, image.kernel_version) == ("firmware", "", "")
    assert "firmware boot (SeaBIOS) from the guest's own disk, direct boot is not possible: no ext4 root" in source(image)
    assert not image.kernel.exists()
    refuse(store, tmp_path / "disk", "cannot boot the image directly: no ext4 root", boot="direct")
    patch(tmp_path / "disk", 0, bytes(440))
    assert "BIOS" in refuse(store, tmp_path / "disk", "no boot code for SeaBIOS").hint


def test_firmware_boot_can_be_requested(base: Path, tmp_path: Path, store: Path) -> None:
    file = make_disk(tmp_path / "disk", base / "root.ext4", bios_code=True)
    assert take(store, file, boot="firmware").boot == "firmware"
    assert take(store, file).boot == "direct"


def test_root_file_system_must_be_unambiguous(base: Path, tmp_path: Path, store: Path) -> None:
    refuse(store, make_disk(tmp_path / "disk", base / "root.ext4", base / "root.ext4"), "2 root file systems")


def test_wrong_hash_is_refused(base: Path, store: Path) -> None:
    file = base / "gpt.qcow2"
    assert take(store, file, sha256=digest(file).upper())
    error = refuse(store, file, f"wrong SHA-256 of .*: {digest(file)}, expected 0000", sha256="0" * 64)
    assert "--sha256" in error.hint


@pytest.mark.parametrize("name", ["root.ext4", "gpt.raw", "gpt.qcow2"])
@pytest.mark.parametrize("part", [0, 1, 511, 512, 70_000, -MB - MB // 2, -MB, -512, -1])
def test_truncated_image_is_refused(base: Path, tmp_path: Path, store: Path, name: str, part: int) -> None:
    content = (base / name).read_bytes()
    if name == "gpt.raw" and part in (-MB, -512) or -part >= len(content) or part >= len(content):
        pytest.skip("cuts only the end of the disk that has no partition, or nothing")
    (tmp_path / "cut").write_bytes(content[:part])
    if name == "gpt.qcow2" and part == -1:  # nearly always padding
        with suppress(OrchestratorError):
            assert take(store, tmp_path / "cut").disk_file.read_bytes() == (base / "gpt.raw").read_bytes()
    else:
        refuse(store, tmp_path / "cut", "truncated|neither|damaged|not inside the file|cannot convert")


def test_backing_file_is_never_opened(base: Path, tmp_path: Path, store: Path) -> None:
    file = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", file, "10M"], check=True)
    refuse(store, file, "backing file")
    refuse(store, file, "not a multiple of 512|neither a partition table", format="raw")


def test_external_data_file_is_refused(tmp_path: Path, store: Path) -> None:
    file, data = tmp_path / "image", tmp_path / "data"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", file, "10M"]
    subprocess.run(argv, check=True)
    refuse(store, file, "external data file")


@pytest.mark.parametrize("options", [(), ("-o", "compat=0.10"), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M"),
                                     ("-c", "-o", "compression_type=zstd"), ("-o", "lazy_refcounts=on")])  # fmt: skip
def test_kinds_of_qcow2_are_read(base: Path, tmp_path: Path, store: Path, options: tuple[str, ...]) -> None:
    image = take(store, make_qcow2(tmp_path / "image", base / "gpt.raw", *options))
    assert image.disk
    assert image.disk.sha256 == digest(base / "gpt.raw")


def test_disk_above_the_limit_is_refused(base: Path, tmp_path: Path, store: Path) -> None:
    file = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", file, "100T"], check=True)
    refuse(store, file, "the limit is 68719476736")
    refuse(store, base / "gpt.raw", "the limit is 1048576", max_size=Size.parse("1M"))
    with (tmp_path / "raw").open("wb") as raw:
        raw.truncate(65 << 30)
    refuse(store, tmp_path / "raw", "the limit is 68719476736")


def test_import_needs_the_space_of_one_copy(base: Path, tmp_path: Path, store: Path) -> None:
    """In a file system of its own, which has no room for two."""
    disk = make_disk(tmp_path / "disk", base / "root.ext4", random.Random(1).randbytes(200 * MB))
    store.mkdir()
    # 128 MB stay free for others
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={350 * MB}", "none", store], check=True)
    try:
        image = take(store, disk)
        assert image.disk
        assert image.disk.sha256 == digest(disk)
    finally:
        subprocess.run(["umount", store], check=True)


def test_image_that_unpacks_to_more_than_the_free_space_is_refused(tmp_path: Path, store: Path) -> None:
    """A small file whose compressed clusters are all the same."""
    size, cluster = 4 << 40, 1 << 21
    entries = size // (cluster * cluster // 8)
    table = ((1 << 62) | 4096).to_bytes(8, "big") * (cluster // 8)
    content = (
        qcow2_header(size, bits=21, l1=[(3 + index) * cluster for index in range(entries)]) + bytes(cluster) + table * entries
    )
    (tmp_path / "image").write_bytes(content)
    refuse(store, tmp_path / "image", "no space in .*MB are needed", max_size=Size.parse("100T"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/etc/shadow", "no kernel|does not exist"),
        ("../../../../../../etc/shadow", "no kernel|does not exist"),
        ("/proc/self/environ", "does not exist"),
        ("vmlinuz-6.12", "too many symbolic links"),
        ("../boot/../boot/vmlinuz-6.12", "too many symbolic links"),
        ("a\nb", "unusual characters"),
        ("\x1b[2J", "unusual characters"),
        ("x\"; cat <2>", "unusual characters"),
        ("missing", "does not exist"),
        ("../etc", "is a folder, expected a file"),
        ("../etc/os-release/x", "does not exist"),
    ],
)  # fmt: skip
def test_kernel_link_that_leads_nowhere_is_refused(tmp_path: Path, store: Path, target: str, message: str) -> None:
    tree = make_tree(tmp_path / "tree")
    (tree / "boot/vmlinuz-6.12").symlink_to(target)
    (tree / "boot/initrd.img-6.12").write_bytes(make_initrd())
    refuse(store, make_ext4(tmp_path / "root", tree), message)


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "empty", "text", "huge"])
def test_other_thing_as_kernel_is_refused(tmp_path: Path, store: Path, kind: str) -> None:
    tree = make_tree(tmp_path / "tree")
    kernel = tree / "boot/vmlinuz-6.12"
    (tree / "boot/initrd.img-6.12").write_bytes(make_initrd())
    make: dict[str, Callable[[], object]] = {
        "folder": kernel.mkdir,
        "FIFO": lambda: os.mkfifo(kernel),
        "device": lambda: os.mknod(kernel, 0o60600, os.makedev(8, 0)),
        "empty": kernel.touch,
        "text": lambda: kernel.write_text("hello"),
        "huge": lambda: (kernel.touch(), os.truncate(kernel, 129 * MB)),
    }
    make[kind]()
    refuse(store, make_ext4(tmp_path / "root", tree, size=160 * MB), "no kernel|bytes|not a Linux kernel|debugfs")


def test_unusual_names_do_no_harm(tmp_path: Path, store: Path) -> None:
    tree = make_tree(tmp_path / "tree", "6.12")
    forged = "x\n"  # debugfs prints one entry on two lines
    for name in (
        forged,
        "\x1b]0;title\x07",
        "vmlinuz-9;id",
        'vmlinuz-"9"',
        "vmlinuz-9 9",
        "vmlinuz-$(id)",
        "initrd.img-9;id",
        "-rf",
    ):
        (tree / "boot" / name).write_bytes(make_kernel("9"))
        (tree / name).write_text("")
    assert take(store, make_ext4(tmp_path / "root", tree)).kernel_version == "6.12"


def test_name_of_the_file_is_shown_without_escape_sequences(base: Path, tmp_path: Path, store: Path) -> None:
    file = shutil.copy(base / "root.ext4", tmp_path / os.fsdecode(b"a\x1b[2J\n\xffb"))
    assert source(take(store, Path(file))).startswith("a?[2J??b (raw")


def test_only_some_file_systems_are_searched(tmp_path: Path, store: Path) -> None:
    part = make_ext4(tmp_path / "part", make_tree(tmp_path / "tree"), size=MB)
    refuse(store, make_disk(tmp_path / "disk", *[part] * 17), "17 file systems, at most 16 are searched")


@pytest.mark.parametrize(
    ("magic", "what"),
    [(b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"hello", "neither")],
)
def test_other_format_is_named(tmp_path: Path, store: Path, magic: bytes, what: str) -> None:
    (tmp_path / "image").write_bytes(magic + bytes(4096 - len(magic)))
    refuse(store, tmp_path / "image", what)


def test_fifo_and_device_are_not_read(tmp_path: Path, store: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refuse(store, tmp_path / "fifo", "is a FIFO")
    refuse(store, Path("/dev/zero"), "is a character device")
    refuse(store, tmp_path, "is a directory")
    refuse(store, tmp_path / "missing", "No such file")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_file_system_gives_a_result_or_a_clear_error(base: Path, tmp_path: Path, store: Path, seed: int) -> None:
    """No traceback, and nothing left."""
    dice = random.Random(seed)
    content = (base / "root.ext4").read_bytes()
    for _ in range(5):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 10, 200))):
            damaged[dice.randrange(1024, HEAD * dice.choice((1, 1, 16)))] = dice.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        with suppress(ImageError):
            take(store, tmp_path / "damaged")
        assert leftovers(store) == []


@pytest.mark.parametrize("seed", range(2))
def test_damaged_qcow2_gives_a_result_or_a_clear_error(base: Path, tmp_path: Path, store: Path, seed: int) -> None:
    dice = random.Random(seed)
    content = (base / "gpt.qcow2").read_bytes()
    for _ in range(8):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 3, 50))):
            damaged[dice.randrange(4, dice.choice((112, len(content))))] = dice.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        with suppress(ImageError):
            take(store, tmp_path / "damaged")
        assert leftovers(store) == []


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGKILL,)])
def test_interrupted_import_leaves_nothing(base: Path, tmp_path: Path, store: Path, signals: tuple[signal.Signals, ...]) -> None:
    """After SIGKILL the next import removes what is left."""
    with (tmp_path / "large").open("wb") as large:
        large.truncate(40 << 30)  # takes some seconds to hash
    program = "from orchestrator.cli.main import main; import signal; signal.signal(2, signal.default_int_handler); main()"
    argv = [sys.executable, "-c", program, "image", "import", "web", str(tmp_path / "large"), "--output", str(store)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: any(store.glob(".import-*/web/disk.raw")), timeout=60, interval=0.01)
    assert process.poll() is None
    process.send_signal(signals[0])
    process.communicate(timeout=60)
    assert bool(leftovers(store)) == (signals[0] == signal.SIGKILL)
    take(store, base / "gpt.raw")
    assert leftovers(store) == []


def test_import_does_not_disturb_another(base: Path, tmp_path: Path, store: Path) -> None:
    seen = []

    def import_another(text: str) -> None:
        if "copying boot/vmlinuz" in text and not seen:
            seen.append(take(store, base / "gpt.raw"))

    import_image(store, ImportRequest("second", base / "gpt.qcow2"), progress=import_another)
    assert seen
    assert image_names(store) == ("second", "web")


def test_command_imports_and_shows(base: Path, store: Path) -> None:
    run = CliRunner().invoke
    done = run(
        nohype, ["image", "import", "web", str(base / "gpt.qcow2"), "--output", str(store), "--json"], catch_exceptions=False
    )
    assert json.loads(done.stdout)["boot"] == "direct"
    assert "copying boot/vmlinuz-6.1.0-18-amd64 out of the image" in done.stderr
    shown = run(nohype, ["image", "show", "web", "--store", str(store)], catch_exceptions=False).stdout
    assert "root on partition 1 (Debian GNU/Linux 13 (trixie)); direct boot of boot/vmlinuz-6.1.0-18-amd64" in shown
    verified = run(nohype, ["image", "verify", "web", "--store", str(store), "--json"], catch_exceptions=False)
    assert json.loads(verified.stdout)["verified"]


@pytest.mark.parametrize("words", [["--memory", "x"], ["--max-size", "0"], ["--sha256", "zz"], ["--kernel", "/dev/null"]])
def test_command_with_invalid_option_is_one_error(base: Path, store: Path, words: list[str]) -> None:
    argv = [sys.executable, "-c", "from orchestrator.cli.main import main; main()"]
    argv += ["image", "import", "web", str(base / "gpt.raw"), "--output", str(store), *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("nohype: ") == 1
    assert "Traceback" not in done.stderr
    assert not image_names(store)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImportRequest("../web", Path("x")), "invalid image name"),
        (ImportRequest("web"), "nothing to import"),
        (ImportRequest("web", Path("x"), kernel=Path("k")), "must be given together"),
        (ImportRequest("web", kernel=Path("k"), initrd=Path("i"), sha256="0" * 64), "require the image FILE"),
        (ImportRequest("web", Path("x"), boot="firmware", cmdline="quiet"), "firmware"),
        (ImportRequest("web", Path("x"), sha256="12"), "invalid SHA-256"),
        (ImportRequest("web", Path("x"), cmdline="quiet\nx"), "printable ASCII"),
        (ImportRequest("web", Path("x"), cmdline="x" * 1901), "at most 1900"),
    ],
)
def test_contradictory_request_is_refused(request_: ImportRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(request_)
