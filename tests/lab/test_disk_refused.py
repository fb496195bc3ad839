"""Disks that the host uses, or that hold anything, on the real kernel: the survey names the use, and nothing is written to them.

Each case is checked as for a plan, and as between a plan and the hand-over. One program on the lab host runs all of them.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from tests.lab.conftest import LabHost
from tests.lab.test_disks import find_block
from tests.lab.test_manager import MEMORY

pytestmark = pytest.mark.soak

PROGRAM = Path(__file__).parent / "inside" / "disk_cases.py"
INACTIVE = {
    "LVM, inactive": "LVM2_member",
    "LVM on a partition, inactive": "gpt",
    "md, stopped": "linux_raid_member",
    "ext4": "ext4",
    "swap, not used": "swap",
    "GPT": "gpt",
    "MBR": "dos",
    "LUKS": "crypto_LUKS",
    "bcache": "bcache",
    "ZFS": "zfs_member|unknown format",  # libblkid 2.41 wants a pool's name as well, 2.38 does not
    "data of an unknown format at the start": "unknown format",
    "data of an unknown format at the end": "unknown format",
}
"""Cases that only the contents show, with a part of the reason."""
USED = {
    "LVM, active": "is part of dm-\\d+ \\(nohype--case-",
    "LVM on a partition, active": "p1 is part of dm-\\d+",
    "md, active": "is part of md",
    "swap, used": "is used for swap",
    "mounted": "is mounted on /run/nohype-case",
    "partition mounted": "p1 is mounted on /run/nohype-case",
    "mounted in another mount namespace": "in the mount namespace of process \\d+",
    "device mapper, linear": "is part of dm-\\d+ \\(nohype-case\\)",
    "device mapper, multipath": "is part of dm-\\d+ \\(nohype-case\\)",
    "loop device": "is behind loop\\d+",
    "opened by a program": "is opened by process \\d+ \\(sleep\\)",
    "opened for exclusive use": "is opened for exclusive use",
}
"""Cases of use."""


@pytest.fixture(scope="module")
def found(host: LabHost) -> dict[str, dict[str, str]]:
    """By case: what the survey said, what refused the hand-over, and whether the contents stayed."""
    text = base64.b64encode(PROGRAM.read_bytes()).decode()
    done = host.run(
        f"echo {text} | base64 -d > /run/disk_cases.py && /opt/nohype/bin/python /run/disk_cases.py; rm /run/disk_cases.py"
    )
    return dict(json.loads(done.stdout))


def test_all_cases_were_run(found: dict[str, dict[str, str]]) -> None:
    missing = {name: case for name, case in found.items() if case.get("failed")}
    assert not missing
    assert found.keys() == {"clean", *INACTIVE, *USED}


def test_clean_disk_is_accepted(found: dict[str, dict[str, str]]) -> None:
    assert found["clean"] == {"plan": "", "hand-over": "", "changed": ""}


@pytest.mark.parametrize("case", [*INACTIVE, *USED])
def test_disk_is_refused_and_not_changed(found: dict[str, dict[str, str]], case: str) -> None:
    reason = {**INACTIVE, **USED}[case]
    assert re.search(reason, found[case]["plan"]), found[case]
    assert found[case]["hand-over"], "the use began after the plan"
    assert found[case]["changed"] == ""


def test_plan_names_the_reason(host: LabHost) -> None:
    """Through the manager: an inactive volume group."""
    device = find_block(host, "nohype-disk0")
    clear = f"vgremove -qf nohype-case; dd if=/dev/zero of={device} bs=1M oflag=direct; udevadm settle; true"
    with host.changed(f"vgcreate -q nohype-case {device} && vgchange -q -an nohype-case", clear):
        done = host.nohype("guest", "create", "refused", *MEMORY, "--disk", "serial=nohype-disk0", check=False)
    assert done.status
    assert "contains LVM2_member at offset" in done.stderr
