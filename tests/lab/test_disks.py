"""A guest's own NVMe disk on the real kernel: handed over, proved, wiped; and how each proof fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.audit.restored import Surveys, prove_host_restored
from orchestrator.model.proof import WEAKER, Verdict
from tests.lab.conftest import LabHost
from tests.lab.test_manager import MEMORY, survey

NAME = "disky"
MARK = "marker of a former tenant"


@pytest.fixture(scope="module")
def before(host: LabHost) -> Any:
    return survey(host)


@pytest.fixture(scope="module")
def guest(host: LabHost, before: Any) -> Iterator[dict[str, Any]]:
    made = json.loads(host.nohype("guest", "create", NAME, *MEMORY, "--disk", "size=16M", "--json").stdout)
    yield made
    host.nohype("guest", "delete", NAME, check=False)


def find_block(host: LabHost, serial: str) -> str:
    """The host's block device of the disk."""
    line = f"for d in /sys/class/nvme/nvme*; do grep -qx '{serial} *' $d/serial && basename $(ls -d $d/nvme*n1); done; true"
    return f"/dev/{host.run(line).stdout.strip()}"


def wait_released(host: LabHost, name: str) -> list[str]:
    """Waits until the guest is gone; returns the states that were seen."""
    states: list[str] = []
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        shown = {guest["name"]: guest["state"] for guest in json.loads(host.nohype("guest", "list", "--json").stdout)}
        if name not in shown:
            return states
        states.append(shown[name])
        time.sleep(0.2)
    raise AssertionError(f"{name} is still there: {states[-1]}")


def test_survey_lists_the_disks(host: LabHost, before: Any) -> None:
    disks = {disk["serial"]: disk for disk in before["controllers"]}
    assert set(disks) == {"nohype-disk0", "nohype-disk1"}
    assert all(disk["driver"] == "nvme" and not disk["uses"] and not disk["fault"] for disk in disks.values())
    assert {disk["node"] for disk in disks.values()} <= {0, 1, None}


def test_disk_with_a_signature_is_refused(host: LabHost, before: Any) -> None:
    block = find_block(host, "nohype-disk0")
    with host.changed(f"mkswap -q {block}", f"wipefs -qa {block} && blkdiscard -z -f {block}"):
        done = host.nohype("guest", "create", NAME, *MEMORY, "--disk", "serial=nohype-disk0", check=False)
    assert done.status
    assert "nohype-disk0" in done.stderr
    assert "contains swap at offset" in done.stderr


def test_guest_owns_the_controller(host: LabHost, guest: dict[str, Any]) -> None:
    (disk,) = guest["disks"]
    folder = f"/sys/bus/pci/devices/{disk['address']}"
    assert host.run(f"readlink {folder}/driver").stdout.strip().endswith("/vfio-pci")
    assert not host.run(f"ls {folder}/nvme", check=False).stdout
    assert disk["node"] in (guest["node"], None)


def test_proofs_pass_and_name_the_verification(host: LabHost, guest: dict[str, Any]) -> None:
    (disk,) = guest["disks"]
    proofs = host.proofs()
    for name in ("disk-isolated", "disk-clean", "device-isolated", "devices-minimal"):
        assert proofs[name, NAME].verdict == Verdict.PASS, proofs[name, NAME].evidence
    evidence = proofs["disk-clean", NAME].evidence
    assert evidence[0].startswith(f"disk {disk['serial']} ({disk['address']}): {disk['size']} bytes read as zero at ")
    assert evidence[-1].startswith(WEAKER)


def test_disk_clean_fails_without_the_record_of_the_verification(host: LabHost, guest: dict[str, Any]) -> None:
    change = (
        '/opt/nohype/bin/python -c \'import sqlite3; db = sqlite3.connect("/var/lib/nohype/ledger.sqlite");'
        ' db.execute("UPDATE disk_check SET guest = ? WHERE guest = ?", ("{}", "{}")); db.commit()\''
    )
    # Without foreign keys, SQLite accepts a guest that does not exist.
    with host.changed(change.format("none", NAME), change.format(NAME, "none")):
        proof = host.proofs()["disk-clean", NAME]
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert "it was not verified before the guest got it" in proof.evidence[0]


def test_contents_stay_while_the_guest_is_stopped(host: LabHost, guest: dict[str, Any]) -> None:
    (disk,) = guest["disks"]
    host.nohype("guest", "kill", NAME)
    block = find_block(host, disk["serial"])
    host.run(f"printf '{MARK}' | dd of={block} bs=1M seek=7 oflag=direct conv=sync 2>/dev/null")
    host.nohype("guest", "start", NAME)
    host.nohype("guest", "kill", NAME)
    read = f"dd if={find_block(host, disk['serial'])} bs=1M skip=7 count=1 iflag=direct 2>/dev/null | tr -d '\\0'"
    assert MARK in host.run(read).stdout


def test_image_is_written_to_the_disk_and_wiped(host: LabHost, before: Any) -> None:
    """An image with a root file system, on the disk that ignores discards."""
    make = (
        "import json, hashlib, os; data = os.urandom(3 << 20) + bytes(9 << 20) + os.urandom(4096);"
        " open('disk.raw', 'wb').write(data); text = json.load(open('image.json'));"
        " text['disk'] = {'size': len(data), 'sha256': hashlib.sha256(data).hexdigest(), 'layout': 'ext4'};"
        " json.dump(text, open('image.json', 'w'))"
    )
    store = "/var/lib/nohype/images"
    build = f'cp -rL {store}/minimal /tmp/rooted && cd /tmp/rooted && python3 -c "{make}"'
    with host.changed(build, "rm -rf /tmp/rooted"):
        host.nohype("image", "install", "/tmp/rooted")
        words = ("--memory", "128M", "--image", "rooted", "--disk", "serial=nohype-disk1")
        (disk,) = json.loads(host.nohype("guest", "create", "rooted", *words, "--json").stdout)["disks"]
        host.nohype("guest", "kill", "rooted")
        block = find_block(host, disk["serial"])
        written = host.run(f"cmp {store}/rooted/disk.raw {block}", check=False)
        host.nohype("guest", "delete", "rooted")
        wait_released(host, "rooted")
        assert "EOF on" in written.stderr, written.stdout
        assert host.run(f"cmp -n {disk['size']} {find_block(host, disk['serial'])} /dev/zero", check=False).status == 0
        host.nohype("image", "delete", "rooted")


def test_deleted_guests_disk_is_wiped_and_given_back(host: LabHost, guest: dict[str, Any], before: Any) -> None:
    """The last test of the module."""
    (disk,) = guest["disks"]
    host.nohype("guest", "delete", NAME)
    wait_released(host, NAME)
    block = find_block(host, disk["serial"])
    assert host.run(f"cmp -n {disk['size']} {block} /dev/zero", check=False).status == 0
    assert host.run(f"cat /sys/bus/pci/devices/{disk['address']}/driver_override").stdout.strip() == "(null)"
    proof = prove_host_restored(Surveys(before, survey(host)))
    assert proof.verdict == Verdict.PASS, proof.evidence
