"""Ethernet addresses of guests: locally administered, stable, recognised, and different on different hosts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.host.machine_id import read_host_id
from orchestrator.planning.mac import choose_mac, is_guest_mac
from orchestrator.values import MacAddress
from tests.fakes.root import build_host

MACHINE = "5f8d2b3c4a1e4f60b7a8c9d0e1f20314"


def test_addresses_are_locally_administered_unicast_and_recognised() -> None:
    for number in range(2000):
        mac = choose_mac(f"host guest{number}", ())
        assert MacAddress.parse(mac.text) == mac
        assert int(mac.text[:2], 16) & 0b1111 == 0b0010, "of IEEE 802c's quadrants the one for administrators"
        assert is_guest_mac(mac)


def test_addresses_of_a_fleet_differ() -> None:
    """20,000 addresses: with 24 bits some 12 pairs would be the same."""
    assert len({choose_mac(f"host{number % 1000} pf guest{number // 1000} 0", ()) for number in range(20_000)}) == 20_000


def test_every_bit_of_the_hash_is_used() -> None:
    texts = [choose_mac(str(number), ()).text.replace(":", "") for number in range(300)]
    varying = [place for place in range(12) if len({text[place] for text in texts}) > 8]
    assert varying == [0, 4, 5, 6, 7, 8, 9, 10, 11]


def test_used_address_is_skipped() -> None:
    first = choose_mac("seed", ())
    second = choose_mac("seed", {first})
    assert second != first
    assert is_guest_mac(second)
    assert choose_mac("seed", {second}) == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("02:4e:48:00:00:01", True),  # of earlier versions
        ("f2:4e:00:00:00:01", True),
        ("02:00:00:00:00:77", False),
        ("52:54:00:12:34:56", False),
        ("06:4e:48:00:00:01", False),
        ("00:4e:48:00:00:01", False),
    ],
)
def test_address_of_a_guest_is_recognised(text: str, expected: bool) -> None:
    assert is_guest_mac(MacAddress.parse(text)) is expected


@pytest.mark.parametrize(
    "text", ["", "uninitialized", "0" * 32, MACHINE[:-1], MACHINE.upper(), f"{MACHINE}0", "../../etc/passwd"]
)
def test_host_without_machine_id_has_no_id(tmp_path: Path, text: str) -> None:
    assert read_host_id(build_host(tmp_path, f"etc/machine-id = {text}")) == ""
    assert read_host_id(build_host(tmp_path / "none", "etc/hostname = host")) == ""


def test_machine_id_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_host_id(build_host(tmp_path, "etc/machine-id/file = x")) == "", "the manager starts all the same"


def test_host_id_is_that_of_systemd(tmp_path: Path) -> None:
    """systemd-id128(1) knows only the id of the machine that it runs on; without one, or without it, a recorded value is left."""
    assert read_host_id(build_host(tmp_path, f"etc/machine-id = {MACHINE}")) == "f04c8e1ab20747eab3e13a0d703bfa02"
    own = Path("/etc/machine-id")
    command = ["systemd-id128", "machine-id", "--app-specific=8e1c5a526f0b4c1d9c574e6f48797065"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    assert read_host_id(build_host(tmp_path / "own", f"etc/machine-id = {own.read_text().strip()}")) == done.stdout.strip()
