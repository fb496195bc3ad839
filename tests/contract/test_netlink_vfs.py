"""The VFs of one interface, as the kernel writes them: hundreds of them, and answers that can't be read.

Messages are made as net/core/rtnetlink.c does (rtnl_fill_vfinfo()), since few kernels have such a PF. That a message of that
size comes through is shown with the real kernel, by an interface with hundreds of names.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EMSGSIZE
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from orchestrator.errors import HostError
from orchestrator.host.netlink import enforce_vf, read_links, read_vfs, sockets, vfs
from orchestrator.model.topology import Link, VfState
from orchestrator.values import MacAddress

NAME = f"nv{os.getpid()}"
VF, SKIP_STATS = 1, 8  # include/uapi/linux/rtnetlink.h


def attribute(kind: int, payload: bytes) -> bytes:
    """An attribute; its length is what is left of it in 16 bits."""
    return struct.pack("<HH", (4 + len(payload)) & 0xFFFF, kind) + payload + b"\0" * (-len(payload) % 4)


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def build_vf(index: int, *, stats: bool) -> bytes:
    mac = bytes([2, 0x4E, 0x48, 0, index >> 8, index & 255])
    body = attribute(1, numbers(index) + mac + bytes(26)) + attribute(13, bytes([255] * 6) + bytes(26))
    body += attribute(2, numbers(index, 0, 0)) + attribute(6, numbers(index, 0, 0)) + attribute(3, numbers(index, 0))
    body += attribute(4, numbers(index, 1)) + attribute(5, numbers(index, 0)) + attribute(7, numbers(index, 0))
    body += attribute(9, numbers(index, 0))
    body += attribute(8, b"".join(attribute(kind, bytes(8)) for kind in range(8))) if stats else b""
    return attribute(1, body + attribute(12, attribute(1, numbers(index, 0, 0) + b"\x81\0\0\0")))


def build_link(count: int, *, stats: bool = False, told: int | None = None) -> bytes:
    """RTM_NEWLINK of a PF with VFs; ``told`` is how many it says that it has."""
    found = b"".join(build_vf(index, stats=stats) for index in range(count))
    body = attribute(3, b"nic0\0") + attribute(1, bytes.fromhex("525400000100")) + attribute(33, b"\1")
    body += attribute(21, numbers(count if told is None else told)) + attribute(22, found) + attribute(16, b"\6")
    body = struct.pack("<BxHiII", 0, 1, 2, 0x11043, 0) + body
    return struct.pack("<IHHII", 16 + len(body), 16, 0, 1, 0) + body


class FakeSocket:
    """Answers as the kernel of one PF, nic0."""

    def __init__(self, answer: bytes | Exception) -> None:
        self._answer = answer
        self.masks: list[tuple[str, int]] = []

    def link(self, command: str, **fields: Any) -> tuple[Any, ...]:
        if command == "set":
            raise NetlinkError(95)
        self.masks.append((command, fields["ext_mask"]))
        if command == "dump":
            return (parse(build_link(0)),)
        if isinstance(self._answer, Exception):
            raise self._answer
        return (parse(self._answer),)


def parse(raw: bytes) -> Any:
    message = ifinfmsg(raw)
    message.decode()
    return message


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the kernel answers; returns the socket."""

    def use(raw: bytes | Exception) -> FakeSocket:
        socket = FakeSocket(raw)

        @contextmanager
        def open_fake(**_: object) -> Iterator[FakeSocket]:
            yield socket

        monkeypatch.setattr(sockets, "IPRoute", open_fake)
        return socket

    return use


@pytest.mark.parametrize("count", [1, 7, 64, 128, 221, 222, 256, 300, 333])
def test_hundreds_of_vfs_are_read_without_their_counters(answer: Any, count: int) -> None:
    socket = answer(build_link(count))
    found = read_vfs("nic0")
    assert [vf.index for vf in found] == list(range(count))
    assert found[-1] == VfState(count - 1, MacAddress(f"02:4e:48:00:{(count - 1) >> 8:02x}:{(count - 1) & 255:02x}"))
    assert socket.masks == [("dump", SKIP_STATS), ("get", VF | SKIP_STATS)], "one interface alone is asked for its VFs"


@pytest.mark.parametrize("count", [222, 230, 256])
def test_an_older_kernel_sends_counters_and_an_answer_that_cannot_be_read(answer: Any, count: int) -> None:
    """296 bytes a VF, so that the length passes 16 bits."""
    answer(build_link(count, stats=True))
    with pytest.raises(HostError, match="cannot read the VFs of nic0: cannot parse the kernel's reply") as caught:
        read_vfs("nic0")
    assert "vfs_per_uplink" in caught.value.hint


@pytest.mark.parametrize("count", [64, 221])
def test_an_older_kernels_counters_do_no_harm_below_that(answer: Any, count: int) -> None:
    answer(build_link(count, stats=True))
    assert len(read_vfs("nic0")) == count


@pytest.mark.parametrize(
    "raw", [build_link(340), build_link(5, told=9), build_link(64)[:3000], NetlinkError(EMSGSIZE), struct.error(), IndexError()]
)
def test_an_answer_that_is_cut_or_refused_is_an_error_of_the_host(answer: Any, raw: bytes | Exception) -> None:
    answer(raw)
    for work in (lambda: read_vfs("nic0"), lambda: enforce_vf("nic0", VfState(0))):
        with pytest.raises(HostError, match="nic0"):
            work()


def test_what_a_driver_refuses_is_told_by_attribute(answer: Any) -> None:
    answer(build_link(2))
    refused = enforce_vf("nic0", VfState(1, None, vlan=7))
    assert {name: error.errno for name, error in refused.items()} == {"vlan": 95, "mac": 95}
    assert "VF 1 of nic0: mac 00:00:00:00:00:00" in refused["mac"].message


def test_what_a_driver_has_not_taken_is_told_too(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(build_link(2))
    monkeypatch.setattr(FakeSocket, "link", lambda self, command, **_: (parse(build_link(2 if command == "get" else 0)),))
    refused = enforce_vf("nic0", VfState(1))
    assert list(refused) == ["mac"]
    assert "mac is 02:4e:48:00:00:01, expected none" in refused["mac"].message


@pytest.mark.netns
def test_a_message_of_that_size_comes_through() -> None:
    """An interface with so many names is a message as big as that of 256 VFs."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network interfaces need root")
    with IPRoute() as ipr:
        ipr.link("add", ifname=NAME, kind="bridge")
        try:
            (index,) = ipr.link_lookup(ifname=NAME)
            for number in range(400):
                ipr.link("property_add", index=index, altname=f"{NAME}-{number:03}-".ljust(124, "x"))
            (message,) = ipr.link("get", index=index, ext_mask=VF | SKIP_STATS)
            assert message["header"]["length"] > 50_000
            assert vfs.read_vfs(NAME) == ()
            assert NAME in [link.name for link in read_links() if isinstance(link, Link)]
        finally:
            ipr.link("del", ifname=NAME)
