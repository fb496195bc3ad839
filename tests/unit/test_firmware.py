"""Where guests can have the small firmware."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.host.firmware import QBOOT, find_qboot
from tests.fakes.root import FakeRoot


@pytest.mark.parametrize(
    ("module", "release", "usable"),
    [
        ("kvm_intel", "6.12.117+deb13-amd64", True),
        ("kvm_intel", "6.11.0", True),
        ("kvm_intel", "7.0.0", True),
        ("kvm_intel", "6.1.0-31-amd64", False),
        ("kvm_intel", "6.10.9", False),
        ("kvm_intel", "5.14.0-503.el9.x86_64", False),
        ("kvm_intel", "unknown", False),
        ("kvm_amd", "6.1.0-31-amd64", True),
    ],
)
def test_not_where_kvm_applies_mtrrs_of_guests(tmp_path: Path, module: str, release: str, *, usable: bool) -> None:
    host = FakeRoot(tmp_path)
    host.add("proc/sys/kernel/osrelease", release)
    host.add(f"sys/module/{module}/parameters/nested", "Y")
    assert find_qboot(host) is None, "without the file"
    host.add(str(QBOOT.relative_to("/")), "")
    assert find_qboot(host) == (QBOOT if usable else None)
