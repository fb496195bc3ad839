"""A manager on a fake host of the fleet in this process, and the files of Slurm for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.client import Client
from orchestrator.fleet.configuration import GRES_FILE, NODES_FILE, Address, build_gres_lines, build_node_lines
from orchestrator.fleet.node import build_nodes
from orchestrator.fleet.steps import Site
from orchestrator.host.pci import DEVICES
from orchestrator.values import Size
from tests.fakes.server import Server
from tests.harness.api_server import Served, serve
from tests.harness.crash import World


@contextmanager
def serve_host(folder: Path, server: Server) -> Iterator[Served]:
    """The VFs exist, as an operator creates them when the host boots."""
    world = World(folder / "world", server)
    for pf in ("0000:10:00.0", "0000:14:00.0"):
        world.host.write(f"{DEVICES}/{pf}/sriov_numvfs", str(server.vfs))
    with serve(folder, {"host": {"housekeeping": "0-1", "uplinks": ["nic0", "nic1"]}}, world=world) as found:
        yield found


def write_site(folder: Path, client: Client) -> Site:
    """Writes the files of the host "a" into ``folder``."""
    nodes = build_nodes(client.host(), "a")
    (folder / NODES_FILE).write_text(build_node_lines(nodes, Address("a", "a")))
    (folder / GRES_FILE).write_text(build_gres_lines(nodes))
    return Site(client, "a", Size.parse("2M"), folder, folder / "records")
