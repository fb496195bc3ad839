"""How the host uses a disk, and what it contains: on loop devices of this machine (root), and on files of a fake host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import EACCES, EIO
from pathlib import Path

import pytest

from orchestrator.errors import HostError, ImageError
from orchestrator.host.block import BlockProgress, claim_device
from orchestrator.host.disk_image import write_image
from orchestrator.host.disk_use import find_device_users, find_users
from orchestrator.host.nvme import read_controller
from orchestrator.host.root import HostRoot
from orchestrator.host.scrub import find_data, scrub_device
from orchestrator.host.signatures import find_device_signatures, parse_signatures
from orchestrator.values import PciAddress
from tests.fakes.nvme import FakeNvme, add_nvme
from tests.fakes.root import FakeRoot, build_host

ADDRESS = "0000:44:00.0"
SIZE = 8 << 20
HOST = HostRoot()


def run(*words: str | Path, text: str = "") -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, input=text).stdout.strip()


@contextmanager
def attach(path: Path) -> Iterator[str]:
    """The name of a loop device on the file."""
    done = subprocess.run(["losetup", "--find", "--show", path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    device = done.stdout.strip()
    try:
        yield os.path.basename(device)
    finally:
        run("losetup", "--detach", device)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A blank loop device."""
    if os.geteuid():
        pytest.skip("loop devices need root")
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", SIZE)
    with attach(tmp_path / "disk") as name:
        yield name


@pytest.fixture
def fake(tmp_path: Path) -> FakeRoot:
    """With one NVMe controller, nvme0, that has the partition nvme0n1p1."""
    host = build_host(tmp_path / "host", "sys/devices/system/cpu/online = 0-1\n")
    add_nvme(host, ADDRESS, FakeNvme("disk0"))
    for folder in ("sys/class/block/nvme0n1/nvme0n1p1", "sys/class/block/nvme0n1p1"):
        host.add(f"{folder}/partition", "1")
        host.add(f"{folder}/dev", "259:7")
    return host


def ignore(_: BlockProgress) -> None:
    """Wants no progress."""


def users(host: HostRoot, device: str) -> list[str]:
    """Without the sentence that stands for processes that this test may not inspect, such as the init of a container."""
    return [text for text in find_device_users(host, device) if "cannot be checked: cannot read the link /proc/" not in text]


@contextmanager
def mounted(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    run("mkfs.ext4", "-q", "-F", f"/dev/{device}")
    where.mkdir()
    run("mount", f"/dev/{device}", where)
    yield f"{device} is mounted on {where}"
    run("umount", where)


@contextmanager
def mounted_elsewhere(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    run("mkfs.ext4", "-q", "-F", f"/dev/{device}")
    where.mkdir()
    line = f"mount /dev/{device} '{where}' && echo && exec cat"
    with _process("unshare", "--mount", "--propagation", "private", "sh", "-c", line) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield f"{device} is mounted on {where} in the mount namespace of process {process.pid}"


@contextmanager
def swapped(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    run("mkswap", "-q", f"/dev/{device}")
    run("swapon", f"/dev/{device}")
    yield f"{device} is used for swap"
    run("swapoff", f"/dev/{device}")


@contextmanager
def looped(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    with attach(Path(f"/dev/{device}")) as other:
        yield f"{device} is behind {other}"


@contextmanager
def opened(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    with open(f"/dev/{device}", "rb") as file, _process("cat", stdin=file.fileno(), hold=False) as process:
        yield f"{device} is opened by process {process.pid}"


@contextmanager
def opened_by_another_name(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    node = Path(f"/dev/nohype-test-{os.getpid()}")
    os.mknod(node, 0o60600, os.stat(f"/dev/{device}").st_rdev)
    stack.callback(node.unlink)
    with open(node, "rb"):
        yield f"{device} is opened by process {os.getpid()}"


@contextmanager
def claimed(device: str, where: Path, stack: ExitStack) -> Iterator[str]:
    with claim_device(HOST, device):
        yield f"{device} or a partition of it is opened for exclusive use"


@contextmanager
def _process(*words: str, stdin: int = subprocess.PIPE, hold: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"] if not hold else words, stdin=stdin, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4")
@pytest.mark.parametrize("use", [mounted, mounted_elsewhere, swapped, looped, opened, opened_by_another_name, claimed])
def test_use_of_a_disk_is_found_while_it_lasts(loop: str, tmp_path: Path, use: Callable[..., object]) -> None:
    assert users(HOST, loop) == []
    with ExitStack() as stack:
        expected = stack.enter_context(use(loop, tmp_path / "mount point", stack))  # type: ignore[arg-type]
        found = users(HOST, loop)
        assert any(text.startswith(str(expected)) for text in found), found
    assert users(HOST, loop) == []


@pytest.mark.parametrize("use", [mounted, swapped, claimed])
def test_disk_in_use_is_neither_erased_nor_written(loop: str, tmp_path: Path, use: Callable[..., object]) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4096)
    with ExitStack() as stack:
        stack.enter_context(use(loop, tmp_path / "mount point", stack))  # type: ignore[arg-type]
        before = (tmp_path / "disk").read_bytes()
        for change in (lambda: scrub_device(HOST, loop, ignore), lambda: write_image(HOST, loop, image, ignore)):
            with pytest.raises(HostError, match=f"{loop} is in use"):
                change()
        assert (tmp_path / "disk").read_bytes() == before


def test_disk_is_erased_and_written_without_nvme(loop: str, tmp_path: Path) -> None:
    data, image = os.urandom(3 << 20) + b"tail", tmp_path / "image"
    image.write_bytes(data)
    (tmp_path / "disk").write_bytes(os.urandom(SIZE))
    phases: list[str] = []
    result = scrub_device(HOST, loop, lambda progress: phases.append(progress.phase))
    assert (result.method, result.size, result.failures) == ("write-zeroes", SIZE, ())
    assert set(phases) == {"write-zeroes", "verify"}
    assert (tmp_path / "disk").read_bytes() == bytes(SIZE)
    write_image(HOST, loop, image, ignore, blank=True)
    assert (tmp_path / "disk").read_bytes() == data.ljust(SIZE, b"\0")
    assert find_data(HOST, loop, ignore) == next(index for index, byte in enumerate(data) if byte)


def test_disk_that_cannot_be_written_is_refused(tmp_path: Path, loop: str) -> None:
    run("blockdev", "--setro", f"/dev/{loop}")
    try:
        with pytest.raises(HostError, match=f"cannot (open /dev/|erase ){loop}"):
            scrub_device(HOST, loop, ignore)
        with pytest.raises(HostError, match=f"cannot (open /dev/|write ){loop}"):
            write_image(HOST, loop, tmp_path / "disk", ignore)
    finally:
        run("blockdev", "--setrw", f"/dev/{loop}")


def test_device_that_does_not_exist_is_an_error() -> None:
    for act in (scrub_device, find_data):
        with pytest.raises(HostError, match="block device nvme99n1 does not exist"):
            act(HOST, "nvme99n1", ignore)
    assert find_device_users(HOST, "nvme99n1")[0].startswith("its use cannot be checked: block device nvme99n1 does not exist")
    assert find_device_signatures(HOST, "nvme99n1")[0].startswith("the contents of nvme99n1 cannot be checked")


def test_node_of_another_device_is_refused(loop: str) -> None:
    with pytest.raises(HostError, match="is not the device null: device number 1:3, kernel's number 7:99"):
        HOST.open_device("null", "7:99", os.O_RDONLY)


def test_disk_that_is_read_at_the_same_time_is_erased(loop: str) -> None:
    # A reader without a claim, such as a monitoring program, does not prevent the work.
    with open(f"/dev/{loop}", "rb"):
        assert scrub_device(HOST, loop, ignore).method == "write-zeroes"


def make_gpt(device: str) -> str:
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", f"/dev/{device}", text="label: gpt\nsize=1M\n")
    return "gpt at offset 0x200"


def make_lvm(device: str) -> str:
    # LVM2 label header in the second sector (lib/format_text/layout.h); the checksum is wrong, as after a partial overwrite.
    write(device, 512, b"LABELONE" + (1).to_bytes(8, "little") + bytes(4) + (32).to_bytes(4, "little") + b"LVM2 001")
    return "LVM2_member at offset 0x218"


def make_raid(device: str) -> str:
    # md superblock 1.2, 4 KiB after the start (include/uapi/linux/raid/md_p.h): magic, major version, super_offset in sectors.
    block = bytearray(256)
    block[0:8] = (0xA92B4EFC).to_bytes(4, "little") + (1).to_bytes(4, "little")
    block[144:152] = (8).to_bytes(8, "little")
    block[216:220] = sum(int.from_bytes(block[at : at + 4], "little") for at in range(0, 256, 4)).to_bytes(4, "little")
    write(device, 4096, bytes(block))
    return "linux_raid_member at offset 0x1000"


def make_zfs(device: str) -> str:
    # Uberblocks of the first label, 128 KiB after the start (openzfs, include/sys/uberblock_impl.h). libblkid may not accept them
    # without the rest of the label: then they are data of an unknown format.
    for index in range(8):
        write(device, (128 << 10) + index * 1024, (0x00BAB10C).to_bytes(8, "little"))
    return f"{device} contains "


def make_random(device: str) -> str:
    write(device, SIZE - 5000, os.urandom(512))
    return "data of an unknown format between the bytes 7340032 and 8388608"


def make_luks(device: str) -> str:
    write(device, 0, b"LUKS\xba\xbe\x00\x01".ljust(592, b"\0"))
    return "crypto_LUKS at offset 0x0"


def make_swap(device: str) -> str:
    run("mkswap", "--quiet", "--label", "it's", f"/dev/{device}")
    return 'swap at offset 0xff6 (label "it\'s")'


def write(device: str, offset: int, data: bytes) -> None:
    with claim_device(HOST, device, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)


@pytest.mark.parametrize("make", [make_gpt, make_lvm, make_raid, make_zfs, make_random, make_luks, make_swap])
def test_contents_of_a_disk_are_found(loop: str, make: Callable[[str], str]) -> None:
    assert find_device_signatures(HOST, loop) == ()
    expected = make(loop)
    found = find_device_signatures(HOST, loop)
    assert any(expected in text for text in found), found
    scrub_device(HOST, loop, ignore)
    assert find_device_signatures(HOST, loop) == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"signatures": 1}', '{"signatures": [{"type": "x"}]}', '{"signatures": ["x"]}'])
def test_output_that_is_not_of_wipefs_is_an_error(text: str) -> None:
    with pytest.raises(HostError, match="cannot parse the output of wipefs"):
        parse_signatures(text)


def test_output_of_wipefs_is_read() -> None:
    assert parse_signatures("\n") == ()
    text = '{"signatures": [{"device": "sda", "offset": "0x438", "type": "ext4", "uuid": "1", "label": "\\u001b[31m"}]}'
    assert parse_signatures(text) == ("ext4 at offset 0x438 (label '\\x1b[31m')",)


def add_process(fake: FakeRoot, pid: int) -> str:
    fake.add(f"proc/{pid}/comm", "postgres")
    fake.add(f"proc/{pid}/mountinfo", "22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw")
    (fake.path / f"proc/{pid}/fd").mkdir(parents=True)
    return f"proc/{pid}"


MOUNT = "36 35 {number} / /srv/my\\040data rw,noatime shared:1 - {kind} {source} rw"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/77/mountinfo": MOUNT.format(number="259:0", kind="ext4", source="/dev/root")},
         "nvme0n1 is mounted on /srv/my data in the mount namespace of process 77"),
        ({"proc/77/mountinfo": MOUNT.format(number="0:40", kind="btrfs", source="/dev/nvme0n1p1")},
         "nvme0n1p1 is mounted on /srv/my data in the mount namespace of process 77"),
        ({"proc/77/mountinfo": "garbage"}, "its use cannot be checked: cannot parse mountinfo: 'garbage'"),
        ({"proc/swaps": "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2"}, "nvme0n1p1 is used for swap"),
        ({"sys/class/block/nvme0n1p1/holders/dm-3/x": "", "sys/class/block/dm-3/dm/name": "vg-data"},
         "nvme0n1p1 is part of dm-3 (vg-data)"),
        ({"sys/class/block/nvme0n1/holders/md127/x": ""}, "nvme0n1 is part of md127"),
        ({"sys/class/block/loop3/loop/backing_file": "/dev/nvme0n1"}, "nvme0n1 is behind loop3"),
        ({"sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path": "/dev/nvme0n1p1",
          "sys/kernel/config/nvmet/subsystems/s/namespaces/1/enable": "1"}, "nvme0n1p1 is exported by the NVMe target s"),
        ({"sys/kernel/config/nvmet/subsystems/s/passthru/device_path": "/dev/nvme0",
          "sys/kernel/config/nvmet/subsystems/s/passthru/enable": "1"}, "nvme0 is exported by the NVMe target s"),
        ({"sys/kernel/config/target/core/fileio_0/hba_info": "",
          "sys/kernel/config/target/core/fileio_0/lun/udev_path": "/dev/nvme0n1"}, "nvme0n1 is exported by the SCSI target lun"),
    ],
)  # fmt: skip
def test_use_that_a_file_of_the_kernel_shows_is_found(fake: FakeRoot, files: dict[str, str], expected: str) -> None:
    add_process(fake, 77)
    controller = read_controller(fake, PciAddress.parse(ADDRESS))
    assert find_users(fake, controller) == ()
    for name, text in files.items():
        fake.add(name, text)
    assert any(text.startswith(expected) for text in find_users(fake, controller)), find_users(fake, controller)


def test_use_of_another_disk_is_not_a_use(fake: FakeRoot) -> None:
    folder = add_process(fake, 77)
    fake.add(f"{folder}/mountinfo", MOUNT.format(number="259:9", kind="ext4", source="/dev/nvme0n10"))
    fake.add("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n11 partition 1 0 -2\n")
    fake.add("sys/class/block/loop3/loop/backing_file", "/srv/dev/nvme0n1")
    fake.add_link(f"{folder}/fd/3", "/srv/nvme0n1")
    fake.add_link(f"{folder}/fd/4", "socket:[9]")
    disabled = "sys/kernel/config/nvmet/subsystems/s/namespaces/1"
    fake.add(f"{disabled}/device_path", "/dev/nvme0n1")
    fake.add(f"{disabled}/enable", "0")
    assert find_users(fake, read_controller(fake, PciAddress.parse(ADDRESS))) == ()


@pytest.mark.parametrize("node", ["nvme0", "ng0n1", "nvme0n1p1"])
def test_program_that_has_opened_a_node_is_named(fake: FakeRoot, node: str) -> None:
    fake.add_link(f"{add_process(fake, 77)}/fd/3", f"/dev/{node}")
    expected = f"{node} is opened by process 77 (postgres)"
    assert find_users(fake, read_controller(fake, PciAddress.parse(ADDRESS))) == (expected,)


@pytest.mark.parametrize("name", ["proc/77/mountinfo", "proc/swaps", "dev/nvme0n1"])
def test_check_that_fails_counts_as_a_use(fake: FakeRoot, name: str) -> None:
    add_process(fake, 77)
    fake.add("proc/swaps", "Filename Type Size Used Priority")
    for number in (EACCES, EIO):
        fake.read_errors[name] = number
        (text,) = find_users(fake, read_controller(fake, PciAddress.parse(ADDRESS)))
        assert text.startswith("its use cannot be checked: cannot "), text


@pytest.mark.parametrize("driver", ["uio_pci_generic", "vfio-pci"])
def test_controller_of_another_driver_is_judged_by_it(fake: FakeRoot, driver: str) -> None:
    folder = f"sys/bus/pci/devices/{ADDRESS}"
    fake.add(f"sys/bus/pci/drivers/{driver}/bind")
    fake.add_link(f"{folder}/driver", f"../../drivers/{driver}")
    expected = () if driver == "vfio-pci" else (f"controller {ADDRESS}: driver {driver}, expected nvme or none",)
    controller = read_controller(fake, PciAddress.parse(ADDRESS))
    assert controller.serial is None
    fake.add(f"{folder}/enable", "0")
    assert find_users(fake, controller) == expected
    fake.add(f"{folder}/enable", "1")
    assert find_users(fake, controller) != ()


def test_image_that_is_cut_while_it_is_read_is_an_error(loop: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3 << 20))

    def cut(progress: BlockProgress) -> None:
        os.truncate(image, 1 << 20)

    with pytest.raises(ImageError, match="was changed while it was read: it ends at 1048576, expected 3145728"):
        write_image(HOST, loop, image, cut)
