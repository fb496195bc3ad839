"""`nohype survey` names what of the network can't be a guest's, each with its reason."""

from __future__ import annotations

import re
from dataclasses import replace
from errno import EIO
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.api.routes.host import show_survey
from orchestrator.cli import connection
from orchestrator.cli.main import nohype
from orchestrator.host.survey import read_disk_use, read_topology
from orchestrator.values import CpuSet
from tests.fakes.nvme import FakeNvme, add_nvme, disk_file
from tests.fakes.root import DEVICES, FakeRoot
from tests.fakes.server import Server, build_server


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRoot:
    """A host with two PFs that is surveyed by the command."""
    fake = build_server(tmp_path, Server(cores=4, nodes=2, vfs=2, pages=8))

    class Client:
        def __init__(self, *_: object, **__: object) -> None: ...

        def survey(self) -> object:
            topology = read_topology(fake)
            return show_survey(replace(topology, controllers=read_disk_use(fake, topology.controllers)), CpuSet.parse("0-1"))

    monkeypatch.setattr(connection, "Client", Client)
    return fake


def survey() -> str:
    done = CliRunner().invoke(nohype, ["survey"])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_host_like_the_lab_has_nothing_to_name(fake: FakeRoot) -> None:
    assert "cannot" not in survey()
    assert "nic1" in survey()


def test_disks_are_listed_with_what_prevents_their_use(fake: FakeRoot) -> None:
    add_nvme(fake, "0000:50:00.0", FakeNvme("free", 1 << 30), node=1)
    add_nvme(fake, "0000:51:00.0", FakeNvme("dirty", 1 << 20))
    add_nvme(fake, "0000:52:00.0", FakeNvme("swap", 1 << 20))
    with disk_file(fake, "0000:51:00.0").open("r+b") as file:
        file.write(b"data")
    fake.add("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme2n1 partition 1020 0 -2")
    said = survey()
    assert re.search(r"^free +0000:50:00.0  1G +1 +nvme +Fake NVMe$", said, re.MULTILINE)
    assert "NVMe controller dirty: nvme1n1 contains data of an unknown format" in said
    assert "NVMe controller swap: nvme2n1 is used for swap" in said
    assert "NVMe controller free" not in said


def test_each_odd_thing_is_named_with_its_reason(fake: FakeRoot) -> None:
    one, two = f"{DEVICES}/0000:10:00.0", f"{DEVICES}/0000:14:00.0"
    fake.write(f"{one}/sriov_numvfs", "2")
    vf = fake.real(f"{one}/virtfn0")
    fake.add_link(f"{vf}/driver", "../../../bus/pci/drivers/igbvf")
    fake.add(f"{vf}/net/ens1v0/flags", "0x1003")
    fake.add(f"{one}/net/eth7/phys_port_name", "pf0vf0")
    fake.add(f"{two}/net/nic1/address", "00:00:00:00:00:00")
    fake.add("sys/kernel/iommu_groups/90/devices", "no folder")
    said = survey()
    for line in (
        "PF 0000:10:00.0: switchdev mode; VEPA requires legacy mode",
        "VF 0000:10:10.0 is used by the host: its interface ens1v0 is up",
        "PF 0000:14:00.0: nic1 has address 00:00:00:00:00:00, which is not a unicast Ethernet address",
        "IOMMU group 90: cannot list",
    ):
        assert line in said
    fake.read_errors[f"{two}/sriov_offset"] = EIO
    assert "PF 0000:14:00.0: cannot be read: cannot read" in survey()
