"""Which kernel of an image is the newest, and what its files are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.boot_files import (
    check_initrd,
    find_root_word,
    match_kernels,
    parse_os_release,
    read_kernel_version,
    version_key,
)
from orchestrator.images.partitions import Volume
from tests.harness.disk_images import make_initrd, make_kernel


@pytest.mark.parametrize(
    "versions",
    [
        ("5.10.0-30-amd64", "6.1.0-9-amd64", "6.1.0-18-amd64", "6.1.0-100-amd64", "6.12.1-amd64"),
        ("6.12.0-rc1", "6.12.0-rc10", "6.12.0", "6.12.0-1"),
        ("0-rescue-7f3a", "4.18.0-80.el8.x86_64", "4.18.0-80.1.2.el8_0.x86_64"),
        ("6.8.0-9-generic", "6.8.0-31-generic", "6.11.0-1-generic"),
    ],
)
def test_versions_are_ordered(versions: tuple[str, ...]) -> None:
    for shuffled in itertools.islice(itertools.permutations(versions), 50):
        assert tuple(sorted(shuffled, key=version_key)) == versions


@pytest.mark.parametrize("initrd", ["initrd.img-6.1", "initramfs-6.1.img", "initrd-6.1", "initramfs-6.1"])
def test_kernel_is_found_with_its_initramfs(initrd: str) -> None:
    assert match_kernels(["config-6.1", "vmlinuz-6.1", initrd, "vmlinuz-9.9"]) == [("6.1", "vmlinuz-6.1", initrd)]


def test_kernel_without_initramfs_is_left_out() -> None:
    assert not match_kernels(["vmlinuz-6.1", "initrd.img-6.2", "vmlinuz", "initrd.img"])


def test_os_release_is_parsed() -> None:
    text = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\n# comment\nBROKEN\n'
    assert parse_os_release(text) == {"PRETTY_NAME": "Debian GNU/Linux 13 (trixie)", "ID": "debian", "VERSION_ID": "13"}


@pytest.mark.parametrize("value", ["\x1b[2J", "x" * 101, "é", "a\tb"])
def test_unusual_value_of_os_release_is_left_out(value: str) -> None:
    assert parse_os_release(f'PRETTY_NAME="{value}"') == {}


def test_kernel_version_is_read_from_the_header(tmp_path: Path) -> None:
    file = tmp_path / "vmlinuz"
    file.write_bytes(make_kernel("6.12.1-amd64 (build@host) #1 SMP"))
    assert read_kernel_version(file) == "6.12.1-amd64"


@pytest.mark.parametrize("content", [b"", b"MZ" + bytes(70000), b"\x7fELF" + bytes(100), make_kernel()[:0x204]])
def test_other_file_as_kernel_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "vmlinuz"
    file.write_bytes(content)
    with pytest.raises(ImageError, match="not a Linux kernel for x86"):
        read_kernel_version(file)


def test_kernel_version_with_escape_sequence_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "vmlinuz"
    file.write_bytes(make_kernel("6.1\x1b[2J"))
    assert read_kernel_version(file) == ""


def test_initramfs_is_recognized(tmp_path: Path) -> None:
    file = tmp_path / "initrd"
    for content in (make_initrd(), b"070701" + bytes(100)):
        file.write_bytes(content)
        check_initrd(file)
    for content in (b"", b"hello", make_kernel()):
        file.write_bytes(content)
        with pytest.raises(ImageError, match="not an initramfs"):
            check_initrd(file)


def test_root_is_named_by_uuid() -> None:
    assert find_root_word(Volume(1, 0, 0, "ext4", uuid="u", partuuid="p")) == "root=UUID=u"
    assert find_root_word(Volume(1, 0, 0, "ext4", partuuid="p")) == "root=PARTUUID=p"
    with pytest.raises(ImageError, match="no UUID"):
        find_root_word(Volume(0, 0, 0, "ext4"))
