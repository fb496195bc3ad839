"""The SSH server of a lab's switch runs only the commands of the driver."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator.lab.keys import make_key
from orchestrator.lab.switch_server import parse_command, run_command
from orchestrator.model.switch import SshAddress
from orchestrator.ssh import Completed
from orchestrator.ssh.server import MAX_CONNECTIONS, serve
from orchestrator.switches.commands import SshCommands


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


class Listener:
    """Fails to accept once, as with too many open files."""

    def __init__(self, real: socket.socket) -> None:
        self._real, self._failed = real, False

    def accept(self) -> Any:
        if not self._failed:
            self._failed = True
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._real.accept()


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[SshCommands]:
    host, client = make_key(), make_key()
    for name, key in (("host", host), ("client", client)):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_bytes(key.private)
    with socket.create_server(("127.0.0.1", 0)) as real:
        arguments: Any = (Listener(real), tmp_path / "host", client.public, lambda line: Completed(0, f"ran {line}", ""))
        thread = threading.Thread(target=serve, args=arguments, daemon=True)
        thread.start()
        found = SshCommands(SshAddress("127.0.0.1", real.getsockname()[1], "root", host.public), tmp_path / "client")
        yield found
        found.close()
        real.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        assert not thread.is_alive()


def test_silent_clients_and_a_failed_accept_do_not_end_the_server(commands: SshCommands) -> None:
    address = ("127.0.0.1", int(commands.where.rpartition(" ")[2]))
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 4):
            stack.enter_context(socket.create_connection(address, 30))
        assert commands.run(["bridge", "-j"]) == "ran bridge -j"
        for _ in range(MAX_CONNECTIONS + 4):
            stack.enter_context(socket.create_connection(address, 30))
        assert commands.run(["ip"]) == "ran ip", "who has logged in is not put out by others"
