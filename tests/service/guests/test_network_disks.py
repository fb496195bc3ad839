"""Guests with their root on a network disk: what they boot with, what is claimed, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from lxml import etree

from orchestrator.api.routes.guests import show_guest
from orchestrator.errors import NoRoom, QuotaExceeded, RequestError
from orchestrator.guests.service import GuestService
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR, Identity, Quota, Role
from orchestrator.model.request import parse_guest_request
from orchestrator.values import CpuSet
from orchestrator.waiting import wait_until
from tests.fakes.server import make_image
from tests.harness.crash import World
from tests.harness.guests import create, kinds, open_manager, state
from tests.harness.images import unpack_initrd
from tests.service.guests.test_configuration import read_credentials
from tests.unit.test_target import HOST_NQN, ISCSI, NQN, NVME, dhchap

ADDRESS = "10.9.0.11/24"
NETWORK: dict[str, object] = {"image": "netroot", "address": ADDRESS, "disks": [{"target": NVME}]}
WITH_SECRET = {**NETWORK, "disks": [{"target": NVME, "initiator": HOST_NQN, "secret": dhchap()}]}


@pytest.fixture(autouse=True)
def _image(world: World) -> None:
    folder = world.folder / "images"
    root = bytes(1 << 20)
    disk = {"size": len(root), "sha256": hashlib.sha256(root).hexdigest(), "layout": "ext4"}
    for name, ways in (("netroot", ["nvme-tcp"]), ("iscsiroot", ["nvme-tcp", "iscsi"]), ("diskroot", [])):
        make_image(folder, name, network_root=ways, disk=disk, configuration=["credentials"])
        (folder / name / "disk.raw").write_bytes(root)


@pytest.fixture
def domains(world: World, monkeypatch: pytest.MonkeyPatch) -> list[etree._Element]:
    """The domain of each start."""
    found: list[etree._Element] = []
    create_paused = world.hypervisor.create_paused

    def remember(xml: str) -> None:
        found.append(etree.fromstring(xml.encode()))
        create_paused(xml)

    monkeypatch.setattr(world.hypervisor, "create_paused", remember)
    return found


def read_login(domain: etree._Element, folder: Path) -> dict[str, str]:
    """The file with which the guest logs in, from the initrd of its domain."""
    text = (unpack_initrd(Path(domain.findtext("os/initrd") or ""), folder) / "nohype-disk").read_text()
    return dict(line.split("=", 1) for line in text.splitlines())


def test_guest_boots_with_target_and_login_and_without_a_disk(
    world: World, manager: GuestService, domains: list[etree._Element], tmp_path: Path
) -> None:
    plan = create(manager, **WITH_SECRET)
    for start in range(2):
        words = (domains[-1].findtext("os/cmdline") or "").split()
        assert f"nohype.target={NVME}" in words
        assert "nohype.address=10.9.0.11/24" in words
        assert not [word for word in words if word.startswith("ds=")], "no data for cloud-init"
        assert not domains[-1].findall("devices/disk")
        login = read_login(domains[-1], tmp_path / str(start))
        assert login == {"initiator": HOST_NQN, "id": str(plan.uuid), "secret": dhchap()}
        manager.kill(OPERATOR, "web")
        manager = open_manager(world)
        manager.start(OPERATOR, "web")
    manager.delete(OPERATOR, "web")
    assert "wiping" not in kinds(manager), "the host has no path to the disk"
    assert not world.secrets.exists() or not list(world.secrets.iterdir())
    assert not world.count_undo_records()


def test_guest_logs_in_to_an_iscsi_target_with_user_and_secret(
    manager: GuestService, domains: list[etree._Element], tmp_path: Path
) -> None:
    login = {"target": ISCSI, "user": "tenant", "secret": "correct-horse"}
    plan = create(manager, image="iscsiroot", address=ADDRESS, disks=[login])
    assert f"nohype.target={ISCSI}" in (domains[-1].findtext("os/cmdline") or "").split()
    name = f"iqn.1993-08.org.debian:01:{plan.uuid.hex}"
    wanted = {"initiator": name, "id": str(plan.uuid), "user": "tenant", "secret": "correct-horse"}
    assert read_login(domains[-1], tmp_path / "initrd") == wanted
    create(manager, name="lun", image="iscsiroot", address="10.9.0.12/24", disks=[{"target": ISCSI[:-1] + "1"}])
    with pytest.raises(NoRoom, match="another guest of this host owns the target"):
        create(
            manager, name="again", image="iscsiroot", address="10.9.0.13/24", disks=[{"target": ISCSI.replace(".100", ".101")}]
        )


def test_initiator_is_derived_from_the_id_of_the_guest(
    manager: GuestService, domains: list[etree._Element], tmp_path: Path
) -> None:
    plan = create(manager, **NETWORK)
    name = f"nqn.2014-08.org.nvmexpress:uuid:{plan.uuid}"
    assert read_login(domains[-1], tmp_path / "initrd") == {"initiator": name, "id": str(plan.uuid)}
    shown = show_guest(manager.guest(OPERATOR, "web"), CpuSet.parse("0-1"))
    assert shown["initiator"] == name
    assert shown["disks"] == [{"size": 0, "serial": "", "address": None, "node": None, "file": "", "target": NVME, "group": ""}]
    other = manager.plan(OPERATOR, parse_guest_request({"name": "other", "memory": "64M", "image": "minimal"}))
    assert show_guest(other, CpuSet())["initiator"] is None


def test_network_configuration_is_kept_by_networkd(manager: GuestService, domains: list[etree._Element]) -> None:
    create(manager, **NETWORK)
    create(manager, name="other", image="netroot", address="10.9.0.12/24", disks=[{"kind": "nvme"}])
    first, second = (read_credentials(etree.tostring(one).decode())["network.network.50-nohype0"] for one in domains)
    assert "[Network]\nKeepConfiguration=yes\n" in first
    assert "KeepConfiguration" not in second


def test_nic_that_reaches_the_target_is_named(manager: GuestService, domains: list[etree._Element]) -> None:
    create(manager, image="netroot", disks=[{"target": NVME}], nics=[{"address": "10.8.0.1/24"}, {"address": ADDRESS}])
    assert (domains[-1].findtext("os/cmdline") or "").split()[-1] == "nohype.target-nic=2"


@pytest.mark.parametrize(
    "again",
    [NVME, NVME.replace(":4420", ""), NVME.replace("10.9.0.100", "10.9.0.101")],
    ids=["same", "default port", "another address"],
)
def test_second_guest_of_a_target_is_refused(manager: GuestService, ledger: Ledger, again: str) -> None:
    create(manager, **NETWORK)
    before = ledger.read()
    second = {"name": "second", "memory": "64M", "image": "netroot", "address": "10.9.0.12/24", "disks": [{"target": again}]}
    with pytest.raises(NoRoom, match="another guest of this host owns the target"):
        manager.create(OPERATOR, parse_guest_request(second))
    tenant = Identity("alice", Role.TENANT, "alice", Quota())
    with pytest.raises(NoRoom) as caught:
        manager.create(tenant, parse_guest_request(second))
    assert "owns" not in str(caught.value)
    assert ledger.read() == before
    manager.delete(OPERATOR, "web")
    create(manager, **second)


def test_other_disk_of_the_same_server_is_accepted(manager: GuestService) -> None:
    create(manager, **NETWORK)
    create(manager, name="second", image="netroot", address="10.9.0.12/24", disks=[{"target": NVME.replace("disk1", "disk2")}])
    assert state(manager, "second") == "running"


def test_network_disk_counts_in_the_quota(manager: GuestService) -> None:
    tenant = Identity("alice", Role.TENANT, "alice", Quota(disks=0))
    with pytest.raises(QuotaExceeded, match="quota exceeded"):
        manager.create(tenant, parse_guest_request({"name": "web", "memory": "64M", **NETWORK}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image": "minimal"}, "image minimal cannot mount its root from nvme-tcp: it supports none"),
        ({"image": "diskroot"}, "image diskroot cannot mount its root from nvme-tcp"),
        (
            {"disks": [{"target": "iscsi://10.9.0.100/iqn.2026-11.example:disk"}]},
            "image netroot cannot mount its root from iscsi: it supports nvme-tcp",
        ),
        ({"cmdline": "x" * 1024, "nics": [{"address": f"10.9.{number}.1/16"} for number in range(8)], "address": None},
         "the kernel command line would have up to"),
    ],
)  # fmt: skip
def test_image_that_cannot_mount_it_is_refused_before_the_claim(
    manager: GuestService, ledger: Ledger, fields: dict[str, object], says: str
) -> None:
    before = ledger.read()
    for method in (manager.plan, manager.create):
        with pytest.raises(RequestError, match=says):
            method(OPERATOR, parse_guest_request({"name": "web", "memory": "64M", **NETWORK, **fields}))
    assert ledger.read() == before


def test_ledger_with_the_claim_is_read_again(world: World, manager: GuestService) -> None:
    plan = create(manager, **WITH_SECRET)
    assert open_manager(world).guest(OPERATOR, "web").plan == plan
    assert [disk.key for disk in plan.disks] == [f"nvme-tcp:{NQN}"]


def test_network_disk_is_not_said_to_be_wiped(manager: GuestService, ledger: Ledger) -> None:
    create(manager, **{**NETWORK, "disks": [{"target": NVME}, {}]})
    manager.delete(OPERATOR, "web")
    wait_until(lambda: any(event.kind == EventKind.DELETED for event in ledger.events(0, 100)), timeout=60, interval=0.01)
    details = {event.kind: event.detail for event in ledger.events(0, 100)}
    assert "wiping disk0" in details["wiping"]
    assert details["deleted"] == "verified clean: disk0"
    assert not [detail for kind, detail in details.items() if kind in ("wiping", "deleted") and NQN in detail]
    create(manager, **NETWORK)
