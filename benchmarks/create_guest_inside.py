"""Runs in the lab host (see create_guest.py): times the manager's `create` and libvirt's `createXML` of the same XML, in turn.

Prints one JSON line per pair: seconds of the manager and of libvirt. Times the second guest: host-wide setup is done by then.
"""

import json
import sys
import time
from pathlib import Path

from orchestrator.client.client import Client
from orchestrator.config import DEFAULT_CONFIG, read_config
from orchestrator.domain import build_domain
from orchestrator.host import netlink
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.images.store import find_build
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan
from orchestrator.resources.nic import BindVfio, ConfigureVf
from orchestrator.resources.step import UndoContext

NAME = "timed"
REQUEST = {"name": NAME, "memory": "256M", "image": "minimal"}


def by_manager(client: Client) -> tuple[float, Plan]:
    """The manager's seconds from request to running guest, and its plan."""
    start = time.monotonic()
    client.create(REQUEST)
    seconds = time.monotonic() - start
    (plan,) = [claim.plan for claim in Ledger(Path(config.paths.ledger)).read().claims if claim.plan.name == NAME]
    client.delete(NAME)
    return seconds, plan


def by_libvirt(plan: Plan) -> float:
    """Seconds of libvirt alone for the same XML; the VF is bound to vfio-pci before."""
    host, hypervisor = HostRoot(net=netlink), Hypervisor()
    xml = build_domain(
        plan, find_build(Path(config.paths.images), plan.image), config.host.housekeeping_cpus, log=Path("/tmp/timed.log")
    )
    steps = (ConfigureVf(plan.vf), BindVfio(plan.vf))
    before = [step.read_before(host) for step in steps]
    for step in steps:
        step.apply(host)
    hypervisor.running_names()
    start = time.monotonic()
    hypervisor.create_paused(xml)
    seconds = time.monotonic() - start
    hypervisor.destroy(plan.uuid)
    BindVfio.undo(UndoContext(host), before[1] or {})
    ConfigureVf.undo(UndoContext(host), before[0] or {})
    return seconds


config = read_config(DEFAULT_CONFIG)
client = Client(Path(config.paths.socket))
client.create({"name": "first", "memory": "256M", "image": "minimal"})
for _ in range(int(sys.argv[1]) + 1):
    manager, plan = by_manager(client)
    print(json.dumps({"manager": manager, "libvirt": by_libvirt(plan)}), flush=True)
client.delete("first")
