"""Kernel modules of an initramfs: selection, order and aliases."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.initramfs import (
    filter_aliases,
    find_kernel,
    format_modules_dep,
    parse_ldd,
    parse_modules_dep,
    plan_modules,
)

DEP = """\
kernel/drivers/net/igbvf.ko.xz:
kernel/drivers/net/iavf.ko.xz: kernel/lib/libeth.ko.xz kernel/lib/lib-ie.ko.xz
kernel/lib/libeth.ko.xz: kernel/lib/lib-ie.ko.xz
kernel/lib/lib-ie.ko.xz:
"""


def test_dependencies_come_first_and_once() -> None:
    order = plan_modules(parse_modules_dep(DEP), ["iavf", "igbvf"])
    assert [Path(file).name for file in order] == ["lib-ie.ko.xz", "libeth.ko.xz", "iavf.ko.xz", "igbvf.ko.xz"]


def test_hyphen_and_underscore_are_equal() -> None:
    assert plan_modules(parse_modules_dep(DEP), ["lib_ie"]) == plan_modules(parse_modules_dep(DEP), ["lib-ie"])


def test_built_in_module_is_omitted() -> None:
    assert plan_modules(parse_modules_dep(DEP), ["virtio-pci"], frozenset({"virtio_pci"})) == ()


def test_unknown_module_is_named() -> None:
    with pytest.raises(ImageError, match="module frob does not exist"):
        plan_modules(parse_modules_dep(DEP), ["frob"])


def test_modules_dep_is_flat() -> None:
    needs = parse_modules_dep(DEP)
    text = format_modules_dep(needs, plan_modules(needs, ["iavf"]))
    assert text == "lib_ie.ko:\nlibeth.ko: lib_ie.ko\niavf.ko: libeth.ko lib_ie.ko\n"


def test_aliases_of_other_modules_are_dropped() -> None:
    text = "# Aliases\nalias pci:v8086d10CA* igbvf\nalias pci:v8086d1889* iavf\nalias fs-xfs xfs\nalias x lib-ie\n"
    assert filter_aliases(text, ["a/igbvf.ko.xz", "a/lib-ie.ko"]) == "alias pci:v8086d10CA* igbvf\nalias x lib-ie\n"


def test_root_must_have_one_kernel(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    with pytest.raises(ImageError, match="0 kernels"):
        find_kernel(tmp_path)
    (tmp_path / "boot/vmlinuz-6.1").touch()
    assert find_kernel(tmp_path) == ("6.1", tmp_path / "boot/vmlinuz-6.1")
    (tmp_path / "boot/vmlinuz-6.2").touch()
    with pytest.raises(ImageError, match="2 kernels"):
        find_kernel(tmp_path)


def test_libraries_are_read_from_ldd() -> None:
    text = (
        "\tlinux-vdso.so.1 (0x00007ffd2a7e8000)\n"
        "\tlibkmod.so.2 => /lib/x86_64-linux-gnu/libkmod.so.2 (0x00007f1b6c400000)\n"
        "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1b6c200000)\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f1b6c600000)\n"
    )
    libraries = ("/lib/x86_64-linux-gnu/libkmod.so.2", "/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2")
    assert parse_ldd(text) == libraries
    assert parse_ldd("\tnot a dynamic executable\n") == ()
    with pytest.raises(ImageError, match=r"libx.so.1 => not found"):
        parse_ldd("\tlibx.so.1 => not found\n")
