"""Targets to which the host is connected. A real host of these tests is connected to none."""

from __future__ import annotations

from orchestrator.host.root import HostRoot
from orchestrator.host.targets import read_connected_targets
from tests.fakes.root import FakeRoot

NQN, IQN = "nqn.2026-11.example:disk", "iqn.2026-11.example:disk"


def test_host_without_connections_has_none(host: HostRoot) -> None:
    assert read_connected_targets(host) == frozenset()


def test_pci_controllers_are_not_on_a_network(fake: FakeRoot) -> None:
    fake.add("sys/class/nvme/nvme0/transport", "pcie")
    fake.add("sys/class/nvme/nvme0/subsysnqn", "nqn.2014.08.org.nvmexpress:local")
    assert read_connected_targets(fake) == frozenset()


def test_connections_are_named(fake: FakeRoot) -> None:
    for number, transport in enumerate(("tcp", "rdma", "fc")):
        fake.add(f"sys/class/nvme/nvme{number}/transport", transport)
        fake.add(f"sys/class/nvme/nvme{number}/subsysnqn", f"{NQN}{number}")
    fake.add("sys/class/iscsi_session/session1/targetname", IQN.title())  # as the host's initiator was told
    assert read_connected_targets(fake) == {f"{NQN}0", f"{NQN}1", f"{NQN}2", IQN}


def test_connection_that_has_ended_is_omitted(fake: FakeRoot) -> None:
    fake.add("sys/class/nvme/nvme0/transport", "tcp")
    fake.add("sys/class/iscsi_session/session1/state", "LOGGED_IN")
    assert read_connected_targets(fake) == frozenset()
