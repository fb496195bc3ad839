"""Emulated disks that are logical volumes, with the real LVM, udev and libvirt, and in the manager's sandbox."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.images.wheels import source_tree
from orchestrator.model.proof import WEAKER, Verdict
from tests.lab.conftest import LabHost
from tests.lab.test_disks import find_block, wait_released
from tests.lab.test_manager import MEMORY

pytestmark = pytest.mark.soak

NAME, GROUP = "volumes", "nohype-lab"
VOLUME = f"nohype-{NAME}-1"
PATH = f"/dev/{GROUP}/{VOLUME}"
UNIT = source_tree() / "ansible/roles/nohype_host/templates/nohyped.service.j2"
DROP_IN = "/etc/systemd/system/nohyped.service.d/lvm.conf"
SETTINGS = "/etc/nohype/nohype.toml"
EMULATED = ("--disk", "kind=emulated,size=10M", "--accept", "emulated-disk")


def read_sandbox() -> str:
    """What the role adds to the manager's unit for a volume group."""
    found = re.findall(r"^{% if nohype_lvm %}\n(.*?)^{% (?:endif|else) %}", UNIT.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return "".join(("[Service]\n", *found))


@pytest.fixture(scope="module")
def group(host: LabHost) -> Iterator[str]:
    """A volume group with a volume of another program; the manager offers the group."""
    device = find_block(host, "nohype-disk1")
    host.run(f"vgcreate -q {GROUP} {device} && lvcreate -q --yes -L 8M -n other {GROUP}")
    host.run(f"yes 'data of others' | dd of=/dev/{GROUP}/other bs=1M count=8 iflag=fullblock oflag=direct status=none")
    settings = f"cp -a {SETTINGS} {SETTINGS}.kept; printf '[disks]\\nvolume_group = \"{GROUP}\"\\n' >> {SETTINGS}"
    host.run(f"mkdir -p $(dirname {DROP_IN}) && printf %s {shlex.quote(read_sandbox())} > {DROP_IN} && {settings}")
    host.run("systemctl daemon-reload && systemctl restart nohyped")
    yield device
    host.nohype("guest", "delete", NAME, check=False)
    host.run(f"rm -r $(dirname {DROP_IN}); mv {SETTINGS}.kept {SETTINGS}; systemctl daemon-reload; systemctl restart nohyped")
    host.run(f"vgremove -qf {GROUP}; dd if=/dev/zero of={device} bs=1M oflag=direct status=none; udevadm settle; true")


@pytest.fixture(scope="module")
def guest(host: LabHost, group: str) -> dict[str, Any]:
    return dict(json.loads(host.nohype("guest", "create", NAME, *MEMORY, *EMULATED, "--json").stdout))


def list_volumes(host: LabHost) -> dict[str, str]:
    """By name: "active" or nothing."""
    text = host.run(f"lvs --reportformat json -o lv_name,lv_active {GROUP}").stdout
    return {row["lv_name"]: row["lv_active"] for row in json.loads(text)["report"][0]["lv"]}


def test_full_group_is_refused(host: LabHost, group: str) -> None:
    words = ("--disk", "kind=emulated,size=1G", "--accept", "emulated-disk")
    done = host.nohype("guest", "create", "full", *MEMORY, *words, check=False)
    assert done.status
    assert re.search(rf"volume group {GROUP} has \d+M free, requested 1G", done.stderr), done.stderr


def test_guest_runs_on_its_volume(host: LabHost, guest: dict[str, Any]) -> None:
    (disk,) = guest["disks"]
    assert disk["file"] == PATH
    assert list_volumes(host) == {"other": "active", VOLUME: "active"}
    assert f"<source dev='{PATH}'" in host.run(f"virsh dumpxml {NAME}").stdout
    proofs = host.proofs()
    assert proofs["disk-clean", NAME].verdict == Verdict.PASS, proofs["disk-clean", NAME].evidence
    assert proofs["disk-clean", NAME].evidence[0].startswith(f"disk {PATH} ({PATH}): {12 << 20} bytes read as zero at ")
    assert any(line.startswith(f"{WEAKER}disk {PATH}") for line in proofs["disk-isolated", NAME].evidence)


def test_udev_does_not_examine_the_volume(host: LabHost, guest: dict[str, Any]) -> None:
    host.run(f"mkswap -q {PATH} && udevadm trigger --settle $(readlink -f {PATH})")
    assert not host.run(f"udevadm info --query=property --property=ID_FS_TYPE --value {PATH}").stdout.strip()


def test_volume_is_inactive_while_its_guest_is_stopped(host: LabHost, guest: dict[str, Any]) -> None:
    host.nohype("guest", "kill", NAME)
    assert list_volumes(host) == {"other": "active", VOLUME: ""}
    host.nohype("guest", "start", NAME)
    assert list_volumes(host)[VOLUME] == "active"
    assert host.run(f"wipefs --noheadings --output TYPE {PATH}").stdout.strip() == "swap"


def test_deleted_guests_volume_is_wiped_and_removed_and_others_stay(host: LabHost, guest: dict[str, Any], group: str) -> None:
    extents = host.run(f"lvs --noheadings -o seg_pe_ranges {GROUP}/{VOLUME}").stdout.strip()  # DEVICE:FIRST-LAST
    first = int(extents.rpartition(":")[2].partition("-")[0])
    host.nohype("guest", "delete", NAME)
    wait_released(host, NAME)
    assert list_volumes(host) == {"other": "active"}
    skip = f"skip={1 + 4 * first}"  # in MiB: the metadata, then extents of 4 MiB
    assert not host.run(f"dd if={group} bs=1M {skip} count=12 iflag=direct status=none | tr -d '\\0' | head -c 100").stdout
    assert host.run(f"tr -d '\\n' < /dev/{GROUP}/other | head -c 14").stdout == "data of others"
