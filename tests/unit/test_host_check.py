"""The configuration compared with hosts that it does not fit: each difference is found, with its severity and true words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from orchestrator.errors import NoRoom
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.model.plan import Allocated
from orchestrator.model.request import parse_guest_request
from orchestrator.model.topology import Port, Topology
from orchestrator.planning.host_check import check_host
from orchestrator.planning.planner import plan_guest
from orchestrator.values import CpuSet, Size
from tests.fakes.server import Server, build_server

SERVER = Server(cores=8, nodes=2, vfs=7, pages=64)
CPU = "sys/devices/system/cpu"


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Topology:
    return read_topology(build_server(tmp_path_factory.mktemp("host"), SERVER))


def find(topology: Topology, **policy: Any) -> list[str]:
    return [f"{found.severity}: {found.text}" for found in check_host(replace(SERVER.policy, **policy), topology)]


def test_a_host_that_fits_has_no_findings(topology: Topology) -> None:
    assert find(topology) == []


@pytest.mark.parametrize(
    ("policy", "host", "said"),
    [
        ({"housekeeping": "64-65"}, {}, "error: housekeeping CPUs 64-65 do not exist: the host has CPUs 0-15"),
        ({"housekeeping": "0-1,99"}, {}, "error: housekeeping CPUs 99 do not exist"),
        ({}, {"offline": "0-1"}, "error: housekeeping CPUs 0-1 are all offline: CPUs 2-15 are online"),
        ({}, {"offline": "1"}, "warning: housekeeping CPUs 1 are offline: 0 are used"),
        ({"housekeeping": "0-3"}, {}, "warning: housekeeping CPUs 2-3 are isolated"),
        ({"housekeeping": "0,4-5"}, {}, "warning: housekeeping CPUs 0,4-5 are not whole cores: CPUs 1 are their siblings"),
        ({"housekeeping": "0-15"}, {}, "error: no CPU is left for guests"),
        ({}, {"isolated": CpuSet.parse("4-15")}, "warning: CPUs 2-3 are neither for housekeeping nor isolated"),
        ({}, {"kvm": False}, "error: the kernel offers no KVM"),
        ({}, {"vfio": False}, "error: the driver vfio-pci is not loaded"),
        ({}, {"iommu_groups": ()}, "error: the host has no IOMMU in use"),
        ({"uplinks": ("nic0", "nic7")}, {}, "warning: uplink nic7: there is no SR-IOV capable network interface"),
        ({"uplinks": ("nic7",)}, {}, "error: uplink nic7"),
        ({"page_size": Size.parse("1G")}, {}, "warning: page_size is 1G, but no node has huge pages of this size"),
        ({"reserved_pages": ((Size.parse("2M"), 64),)}, {}, "reserved_pages keeps 64 pages of 2M on each node, but node 1 has"),
        ({}, {"cmdline": "x" * 2047}, "warning: the kernel command line has 2047 characters; x86 keeps 2047"),
        ({}, {"cmdline": "pcie_acs_override=downstream"}, "pcie_acs_override=downstream is on the kernel command line"),
        ({}, {"problems": ("cannot read cpu5",)}, "warning: cannot read cpu5"),
    ],
)  # fmt: skip
def test_each_difference_is_found(topology: Topology, policy: dict[str, Any], host: dict[str, Any], said: str) -> None:
    if isinstance(policy.get("housekeeping"), str):
        policy = {**policy, "housekeeping": CpuSet.parse(policy["housekeeping"])}
    if offline := CpuSet.parse(host.pop("offline", "")):
        cores = (replace(core, cpus=core.cpus - offline) for core in topology.cores)
        host = {"cores": tuple(core for core in cores if core.cpus)}
    assert said in "\n".join(find(replace(topology, **host), **policy))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fault": "nic0 is an InfiniBand interface"}, "uplink nic0: PF 0000:10:00.0: nic0 is an InfiniBand interface"),
        ({"siblings": (Port("eth0", up=True, mac=None, representor=True),)}, "PF 0000:10:00.0 is in switchdev mode"),
        ({"total_vfs": 0}, "PF 0000:10:00.0 cannot have VFs"),
        ({"interface": None, "fault": "no driver is bound"}, "of this name; PF 0000:10:00.0: no driver is bound"),
    ],
)
def test_an_uplink_that_can_serve_no_guest_is_found(topology: Topology, change: dict[str, Any], said: str) -> None:
    pf, other = topology.pfs
    host = replace(topology, pfs=(replace(pf, **change), other))
    for uplinks, severity in ((("nic0", "nic1"), "warning"), (("nic0",), "error")):
        (found,) = find(host, uplinks=uplinks)
        assert found.startswith(f"{severity}: uplink nic0: ")
        assert said in found


def test_an_uplink_that_is_the_second_port_of_its_pf_is_one(topology: Topology) -> None:
    pf = replace(topology.pfs[0], siblings=(Port("p2", up=True, mac=None),))
    assert find(replace(topology, pfs=(pf,)), uplinks=("p2",)) == []


def test_a_port_without_a_link_is_no_difference(topology: Topology) -> None:
    """Making VFs takes it away for some seconds."""
    assert find(replace(topology, pfs=tuple(replace(pf, up=False) for pf in topology.pfs))) == []


def test_errors_come_first_and_tell_what_to_do(topology: Topology) -> None:
    policy = replace(SERVER.policy, housekeeping=CpuSet.parse("64"), uplinks=("nic0", "nic7"))
    found = check_host(policy, topology)
    assert [finding.severity for finding in found] == sorted(finding.severity for finding in found)
    assert all(finding.hint for finding in found)


@pytest.mark.parametrize(
    ("policy", "host", "said"),
    [({"housekeeping": CpuSet.of([64])}, {}, "CPUs 64 do not exist"), ({}, {"kvm": False}, "the kernel offers no KVM")],
)  # fmt: skip
def test_a_plan_says_what_keeps_all_guests_out(topology: Topology, policy: Any, host: Any, said: str) -> None:
    request = parse_guest_request({"name": "web", "image": "minimal", "memory": "64M"})
    with pytest.raises(NoRoom) as caught:
        plan_guest(request, replace(topology, **host), Allocated(), replace(SERVER.policy, **policy))
    assert said in caught.value.reasons[0]
    assert "survey" not in caught.value.hint, "the hint is that of the cause"


@pytest.mark.parametrize(
    ("housekeeping", "status", "said"),
    [("0-1", 0, "is valid"), ("0-3", 0, "warning: housekeeping CPUs 2-3 are isolated"), ("0-1,64", 1, "CPUs 64 do not exist")],
)  # fmt: skip
def test_config_check_compares_with_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, housekeeping: str, status: int, said: str
) -> None:
    host = build_server(tmp_path / "host", SERVER)
    monkeypatch.setattr("orchestrator.cli.config.HostRoot", lambda net: HostRoot(host.path, host.net))
    file = tmp_path / "nohype.toml"
    file.write_text(f'[host]\nhousekeeping = "{housekeeping}"\nuplinks = ["nic0", "nic1"]\n')
    done = CliRunner().invoke(nohype, ["config", "check", "--host", str(file)])
    assert (done.exit_code, said in done.output) == (status, True), done.output
    assert CliRunner().invoke(nohype, ["config", "check", str(file)]).exit_code == 0, "the file alone is right"
