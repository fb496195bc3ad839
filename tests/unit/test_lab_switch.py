"""The SSH server of a lab's switch runs only the commands of the driver."""

from __future__ import annotations

import pytest

from orchestrator.lab.switch_server import parse_command, run_command


@pytest.mark.parametrize(
    "line",
    [
        "ip -j -d link show type bridge",
        "ip -j -d -s link show master br0",
        "ip -j -d link show type vlan",
        "bridge -j fdb show br br0",
        "bridge -j vlan show",
        "bridge link set dev swp1 hairpin on",
    ],
)
def test_commands_of_the_driver_are_run(line: str) -> None:
    assert parse_command(line) == line.split()


@pytest.mark.parametrize(
    "line",
    [
        "", "id", "ip", "ip netns exec x id", "ip -n x link show", "ip link show; id", "ip link show\nid", "ip -b /etc/shadow",
        "ip link show dev --", "ip link show dev 'a b'", "ip link set dev swp1 netns 1", "ip link del dev swp1",
        "bridge -b /etc/shadow",
        "bridge link set dev swp1 hairpin on; id", "bridge link set dev swp1 isolated on", "bridge link set dev -n hairpin on",
        "bridge vlan add dev swp1 vid 1", "ip 'link show' x", "ip -j -d link show type bridge && id", "$(id)", "'",
    ],
)  # fmt: skip
def test_other_commands_are_refused(line: str) -> None:
    assert parse_command(line) is None
    assert run_command("none", line).status == 126
