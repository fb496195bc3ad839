"""NVMe controllers: what is read of them, hand-over and return, erasing. On a real host those whose serial is nohype-diskN."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import EBUSY, EIO, ENODEV, EOPNOTSUPP
from pathlib import Path

import pytest

from orchestrator.errors import HostError, ImageError
from orchestrator.host.block import BlockProgress, claim_device
from orchestrator.host.disk_image import write_image
from orchestrator.host.disk_use import find_users
from orchestrator.host.nvme import find_block_devices, read_controller, read_controllers, read_identified
from orchestrator.host.nvme_admin import format_namespace, read_abilities, read_namespace_ids
from orchestrator.host.nvme_binding import RESERVED, detach_controller, release_controller, reserve_controller, return_controller
from orchestrator.host.pci import read_driver, read_override
from orchestrator.host.root import HostRoot
from orchestrator.host.scrub import find_data, scrub_controller
from orchestrator.host.signatures import find_signatures
from orchestrator.model.topology import NvmeController
from orchestrator.values import PciAddress
from tests.contract.conftest import Holder
from tests.fakes.nvme import FakeNvme, add_nvme, change_nvme, read_nvme
from tests.fakes.root import DEVICES, FakeRoot

PREFIX = "nohype-disk"
FIRST, SECOND = "0000:44:00.0", "0000:45:00.0"
NOWHERE = PciAddress.parse("0000:ff:1f.7")
MARKER = b"tenant data"


@pytest.fixture
def disk(host: HostRoot) -> Iterator[NvmeController]:
    """A controller to play with, bound to nvme and erased; the smallest one of a real host."""
    if isinstance(host, FakeRoot):
        for address, serial in ((FIRST, f"{PREFIX}0"), (SECOND, f"{PREFIX}1")):
            add_nvme(host, address, FakeNvme(serial))
    found = [one for one in read_controllers(host) if (one.serial or "").startswith(PREFIX) and not one.fault]
    if not found:
        pytest.skip(f"the host has no NVMe controller whose serial number starts with {PREFIX}")
    chosen = min(found, key=lambda one: (sum(namespace.size.bytes for namespace in one.namespaces), one.address))
    yield chosen
    if not isinstance(host, FakeRoot):
        assert chosen.serial
        return_controller(host, chosen.address, chosen.serial)
        scrub_controller(host, chosen.address, chosen.serial, chosen.namespaces, ignore)
        release_controller(host, chosen.address)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Of 3 MiB less a bit, with a hole of 1 MiB in the middle."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(1 << 20) + bytes(1 << 20) + os.urandom(1 << 19) + b"tail")
    return path


def ignore(_: BlockProgress) -> None:
    """Wants no progress."""


def serial_of(disk: NvmeController) -> str:
    assert disk.serial
    return disk.serial


def scrub(host: HostRoot, disk: NvmeController, report: Callable[[BlockProgress], None] = ignore) -> str:
    """The method that worked."""
    return scrub_controller(host, disk.address, serial_of(disk), disk.namespaces, report).method


def mark(host: HostRoot, disk: NvmeController, offset: int, data: bytes = MARKER) -> None:
    """Writes something a tenant might leave."""
    with claim_device(host, disk.namespaces[0].device, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)


def contents(host: HostRoot, disk: NvmeController, length: int) -> bytes:
    with claim_device(host, disk.namespaces[0].device, os.O_RDONLY) as descriptor:
        return os.pread(descriptor, length, 0)


@contextmanager
def busy(host: HostRoot, device: str) -> Iterator[None]:
    """The device is opened for exclusive use, as by a file system."""
    if isinstance(host, FakeRoot):
        host.read_errors[f"dev/{device}"] = EBUSY
        yield
        del host.read_errors[f"dev/{device}"]
        return
    with claim_device(host, device, os.O_RDONLY):
        yield


def test_controller_is_described(host: HostRoot, disk: NvmeController) -> None:
    assert disk.driver == "nvme"
    assert disk.model
    assert disk.iommu_group is not None
    assert [namespace.nsid for namespace in disk.namespaces] == [1]
    with claim_device(host, disk.namespaces[0].device, os.O_RDONLY) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_END) == disk.namespaces[0].size.bytes
    assert read_identified(host, disk.address, serial_of(disk)) == disk
    assert read_namespace_ids(host, disk) == ((1,), ())


def test_address_without_controller_is_refused(host: HostRoot, disk: NvmeController) -> None:
    other = next(name for name in host.names(DEVICES) if host.read(f"{DEVICES}/{name}/class") != "0x010802")
    for address in (NOWHERE, PciAddress.parse(other)):
        with pytest.raises(HostError) as error:
            read_controller(host, address)
        assert error.value.errno == ENODEV
    with pytest.raises(HostError, match=f"serial number {disk.serial}, expected other"):
        read_identified(host, disk.address, "other")


def test_unused_controller_has_no_users_and_no_signatures(host: HostRoot, disk: NvmeController) -> None:
    scrub(host, disk)
    assert find_users(host, disk) == ()
    assert find_signatures(host, disk) == ()


def test_controller_goes_to_vfio_and_comes_back(host: HostRoot, disk: NvmeController) -> None:
    mark = host.path / RESERVED / f"nvme-{disk.serial}"
    reserved = reserve_controller(host, disk.address, serial_of(disk))
    assert reserved == disk
    assert mark.read_text().strip() == str(disk.address)
    assert read_override(host, disk.address) == "nvme"
    for _ in range(2):
        detach_controller(host, disk.address, serial_of(disk))
        away = read_controller(host, disk.address)
        assert (away.driver, away.serial, away.namespaces, away.fault) == ("vfio-pci", None, (), "")
        assert not host.exists(f"sys/class/block/{disk.namespaces[0].device}")
    for _ in range(2):
        back = return_controller(host, disk.address, serial_of(disk))
        assert (back.serial, back.driver, back.fault) == (disk.serial, "nvme", "")
        assert [(one.nsid, one.size) for one in back.namespaces] == [(one.nsid, one.size) for one in disk.namespaces]
        assert read_override(host, disk.address) == "nvme"
    for _ in range(2):
        release_controller(host, disk.address)
        assert (read_driver(host, disk.address), read_override(host, disk.address)) == ("nvme", "")
        assert not mark.exists()


def test_busy_controller_stays_with_the_host(host: HostRoot, disk: NvmeController) -> None:
    device = disk.namespaces[0].device
    with busy(host, device):
        assert find_users(host, disk)[0] == f"{device} or a partition of it is opened for exclusive use"
        for take in (reserve_controller, detach_controller):
            with pytest.raises(HostError, match=rf"is used by the host \({device} or a partition") as error:
                take(host, disk.address, serial_of(disk))
            assert error.value.errno == EBUSY
        with pytest.raises(HostError, match=f"{device} is in use"):
            scrub(host, disk)
    assert (read_driver(host, disk.address), read_override(host, disk.address)) == ("nvme", "")


def test_block_devices_exist_only_while_the_driver_nvme_is_bound(host: HostRoot, disk: NvmeController) -> None:
    assert find_block_devices(host, disk.address) == tuple(namespace.device for namespace in disk.namespaces)
    detach_controller(host, disk.address, serial_of(disk))
    assert find_block_devices(host, disk.address) == ()
    assert find_block_devices(host, NOWHERE) == ()
    again = return_controller(host, disk.address, serial_of(disk))
    assert find_block_devices(host, disk.address) == tuple(namespace.device for namespace in again.namespaces)


def test_controller_of_a_running_guest_is_not_taken(host: HostRoot, disk: NvmeController, hold: Holder) -> None:
    detach_controller(host, disk.address, serial_of(disk))
    with hold(disk.address):
        users = find_users(host, read_controller(host, disk.address))
        assert users == (f"controller {disk.address}: a guest or a program has opened it through vfio-pci",)
        with pytest.raises(HostError, match="in use by a guest") as error:
            return_controller(host, disk.address, serial_of(disk))
        assert error.value.errno == EBUSY
    return_controller(host, disk.address, serial_of(disk))


def test_scrub_leaves_only_zeros(host: HostRoot, disk: NvmeController) -> None:
    size = disk.namespaces[0].size.bytes
    seen: list[BlockProgress] = []
    for offset in (0, size // 2 + 7, size - len(MARKER)):
        mark(host, disk, offset)
        assert find_data(host, disk.namespaces[0].device, ignore) == offset
        assert scrub(host, disk, seen.append) == "format"
        assert find_data(host, disk.namespaces[0].device, ignore) is None
    assert {one.phase for one in seen} == {"format", "verify"}
    assert seen[-1].done == seen[-1].total == size


def test_signature_is_found_on_the_disk(host: HostRoot, disk: NvmeController) -> None:
    device = disk.namespaces[0].device
    mark(host, disk, 0, b"LABELONE".rjust(520, b"\0"))
    assert find_signatures(host, disk) == (f"{device} contains data of an unknown format between the bytes 0 and 1048576",)
    scrub(host, disk)
    subprocess.run(["mkswap", "-q", host.path / "dev" / device], check=True)
    assert find_signatures(host, disk) == (f"{device} contains swap at offset 0xff6",)
    scrub(host, disk)
    assert find_signatures(host, disk) == ()


def test_image_is_written_and_the_rest_stays_blank(host: HostRoot, disk: NvmeController, image: Path) -> None:
    device, data = disk.namespaces[0].device, image.read_bytes()
    scrub(host, disk)
    write_image(host, device, image, ignore, blank=True)
    assert contents(host, disk, len(data) + 1000) == data + bytes(1000)
    mark(host, disk, 1 << 20, b"x" * (1 << 20))
    write_image(host, device, image, ignore)
    assert contents(host, disk, len(data)) == data, "zeros of the image are written too"


def test_disk_that_was_not_blank_is_noticed(host: HostRoot, disk: NvmeController, image: Path) -> None:
    mark(host, disk, 1 << 20)
    with pytest.raises(HostError, match="does not return what was written: the byte at offset 1048576 differs"):
        write_image(host, disk.namespaces[0].device, image, ignore, blank=True)


def test_image_that_does_not_fit_changes_nothing(host: HostRoot, disk: NvmeController, image: Path) -> None:
    scrub(host, disk)
    os.truncate(image, disk.namespaces[0].size.bytes + 1)
    with pytest.raises(ImageError, match="is larger than"):
        write_image(host, disk.namespaces[0].device, image, ignore)
    assert find_data(host, disk.namespaces[0].device, ignore) is None


def test_image_with_another_hash_is_refused(host: HostRoot, disk: NvmeController, image: Path) -> None:
    with pytest.raises(ImageError, match="expected 00"):
        write_image(host, disk.namespaces[0].device, image, ignore, sha256="00")
    with pytest.raises(ImageError, match="cannot open image"):
        write_image(host, disk.namespaces[0].device, image.parent / "none", ignore)


def test_report_ends_the_work(host: HostRoot, disk: NvmeController) -> None:
    def stop(progress: BlockProgress) -> None:
        raise KeyboardInterrupt(progress.phase)

    with pytest.raises(KeyboardInterrupt, match="format"):
        scrub(host, disk, stop)
    assert find_users(host, disk) == ()


def test_namespaces_other_than_the_claimed_ones_are_refused(host: HostRoot, disk: NvmeController) -> None:
    more = (*disk.namespaces, replace(disk.namespaces[0], nsid=2))
    with pytest.raises(HostError, match=r"active namespaces 1, inactive none, block devices for 1, expected 1,2"):
        scrub_controller(host, disk.address, serial_of(disk), more, ignore)
    longer = (replace(disk.namespaces[0], size=replace(disk.namespaces[0].size, bytes=1 << 40)),)
    with pytest.raises(HostError, match="expected 1T in blocks of"):
        scrub_controller(host, disk.address, serial_of(disk), longer, ignore)


def test_invalid_command_has_its_status(host: HostRoot, disk: NvmeController) -> None:
    assert read_abilities(host, disk).format
    with pytest.raises(HostError, match="cannot format namespace 1: status 0x"):
        format_namespace(host, disk, 1, 15)


@pytest.mark.parametrize(
    ("lies", "method"),
    [((), "format"), (("format",), "write-zeroes"), (("format", "write-zeroes"), "overwrite")],
)  # fmt: skip
def test_method_that_lies_is_followed_by_the_next(
    fake: FakeRoot, disk: NvmeController, lies: tuple[str, ...], method: str
) -> None:
    change_nvme(fake, str(disk.address), FakeNvme(serial_of(disk), lies=lies))
    mark(fake, disk, 1000)
    result = scrub_controller(fake, disk.address, serial_of(disk), disk.namespaces, ignore)
    assert result.method == method
    assert [text.partition(":")[0] for text in result.failures] == list(lies)
    assert all("reported success, but the byte at offset 1000" in text for text in result.failures)


def test_controller_without_format_is_scrubbed(fake: FakeRoot, disk: NvmeController) -> None:
    change_nvme(fake, str(disk.address), FakeNvme(serial_of(disk), formats=False))
    mark(fake, disk, 1000)
    assert scrub(fake, disk) == "write-zeroes"
    with pytest.raises(HostError, match="status 0x1") as error:
        format_namespace(fake, disk, 1, 0)
    assert error.value.errno == EOPNOTSUPP


def test_block_size_that_a_guest_has_changed_is_restored(fake: FakeRoot, disk: NvmeController) -> None:
    detach_controller(fake, disk.address, serial_of(disk))
    change_nvme(fake, str(disk.address), FakeNvme(serial_of(disk), block_size=4096))
    assert return_controller(fake, disk.address, serial_of(disk)).namespaces[0].block_size == 4096
    scrub(fake, disk)
    assert read_nvme(fake, str(disk.address)).block_size == 512


def test_inactive_namespace_is_refused(fake: FakeRoot, disk: NvmeController) -> None:
    change_nvme(fake, str(disk.address), FakeNvme(serial_of(disk), inactive=(2,)))
    with pytest.raises(HostError, match="inactive 2"):
        scrub(fake, disk)
    with pytest.raises(HostError, match="inactive namespaces: 2"):
        reserve_controller(fake, disk.address, serial_of(disk))


@pytest.mark.parametrize(("serial", "name"), [("a b#1", "nvme-a b#1"), ("..", "nvme-.."), ("../x'y", "nvme-.._x_y")])
def test_serial_number_is_a_safe_file_name(fake: FakeRoot, disk: NvmeController, serial: str, name: str) -> None:
    set_file("nvme/nvme0/serial", serial)(fake)
    reserve_controller(fake, disk.address, serial)
    assert [file.name for file in (fake.path / RESERVED).iterdir()] == [name]
    release_controller(fake, disk.address)
    assert not list((fake.path / RESERVED).iterdir())


def test_exchanged_disk_is_refused(fake: FakeRoot, disk: NvmeController) -> None:
    detach_controller(fake, disk.address, serial_of(disk))
    change_nvme(fake, str(disk.address), FakeNvme("other"))
    with pytest.raises(HostError, match="serial number other, expected nohype-disk0"):
        return_controller(fake, disk.address, serial_of(disk))


def test_failing_reads_are_an_error_with_the_offset(fake: FakeRoot, disk: NvmeController) -> None:
    fake.read_errors[f"sys/class/block/{disk.namespaces[0].device}/size"] = EIO
    assert "cannot be read" in read_controllers(fake)[0].fault
    with pytest.raises(HostError, match="Input/output error"):
        scrub(fake, disk)


def set_file(name: str, text: str) -> Callable[[FakeRoot], None]:
    return lambda fake: fake.add(f"{DEVICES}/{FIRST}/{name}", text)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (set_file("nvme/nvme0/state", "dead"), "its state is dead, expected live"),
        (set_file("nvme/nvme0/serial", ""), "is empty or not printable"),
        (set_file("nvme/nvme0/serial", "two\nlines"), "is empty or not printable"),
        (set_file("nvme/nvme0/serial", "x" * 21), "is empty or not printable"),
        (set_file("nvme/nvme0/serial", f"{PREFIX}1"), f"2 controllers have the serial number {PREFIX}1"),
        (set_file("sriov_numvfs", "2"), "it has SR-IOV virtual functions"),
        (set_file("numa_node", "x"), "cannot be read: cannot parse"),
        (set_file("class", ""), None),
        (lambda fake: fake.add("sys/class/block/nvme0n1/ro", "1"), "nvme0n1 cannot be written"),
        (lambda fake: fake.add("sys/class/block/nvme0n1/nsid", "?"), "is not a number"),
        (lambda fake: fake.read_errors.update({"sys/class/block/nvme0n1/size": EIO}), "Input/output error"),
        (lambda fake: fake.read_errors.update({f"{DEVICES}/{FIRST}/class": EIO}), "Input/output error"),
        (lambda fake: [fake.add(f"sys/class/nvme-subsystem/nvme-subsys0/{name}/state") for name in ("nvme0", "nvme7")],
         "can also be reached through nvme7"),
    ],
)  # fmt: skip
def test_odd_controller_is_named_and_harms_no_other(
    fake: FakeRoot, disk: NvmeController, change: Callable[[FakeRoot], None], fault: str | None
) -> None:
    change(fake)
    found = {str(one.address): one for one in read_controllers(fake)}
    if fault is None:
        assert FIRST not in found
    else:
        assert fault in found[FIRST].fault
    assert not found[SECOND].fault or "2 controllers" in found[SECOND].fault


def test_model_is_printable(fake: FakeRoot, disk: NvmeController) -> None:
    set_file("nvme/nvme0/model", "Disk\x1b[31m\n2")(fake)
    assert read_controller(fake, disk.address).model == "Disk?[31m?2"


def test_sriov_capability_alone_is_not_a_fault(fake: FakeRoot, disk: NvmeController) -> None:
    fake.add(f"{DEVICES}/{FIRST}/sriov_totalvfs", "32")
    fake.add(f"{DEVICES}/{FIRST}/sriov_numvfs", "0")
    detach_controller(fake, disk.address, serial_of(disk))
    return_controller(fake, disk.address, serial_of(disk))
    fake.add(f"{DEVICES}/{FIRST}/sriov_numvfs", "2")
    with pytest.raises(HostError, match="SR-IOV virtual functions"):
        detach_controller(fake, disk.address, serial_of(disk))
    assert read_driver(fake, disk.address) == "nvme"


def test_namespace_of_native_multipath_is_the_disk(fake: FakeRoot, disk: NvmeController) -> None:
    folder = f"{DEVICES}/{FIRST}/nvme/nvme0"
    fake.add(f"{folder}/nvme0c0n1/hidden", "1")
    (fake.path / folder / "nvme0n1" / "nsid").unlink()
    (fake.path / folder / "nvme0n1").rmdir()
    assert read_controller(fake, disk.address) == disk
