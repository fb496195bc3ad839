"""Times survey, plan and audit on a host whose PF has the maximum number of VFs. Kernel and libvirt are fake.

    .venv/bin/python benchmarks/big_host.py

Exits with 1 if one of them takes longer than a second.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.audit.facts import Source
from orchestrator.audit.report import Auditor
from orchestrator.guests.service import GuestService
from orchestrator.model.access import OPERATOR
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.request import parse_guest_request
from tests.fakes.server import IMAGE, Server
from tests.harness.crash import World

VFS = 256
GUESTS = 32
RUNS = 5
LIMIT = 1.0  # seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_vfs(Path(folder))
    for what, seconds in figures.items():
        print(f"{what:<60} {seconds * 1000:8.1f} ms")
    sys.exit(int(any(seconds > LIMIT for seconds in figures.values())))


def measure_vfs(folder: Path, vfs: int = VFS, guests: int = GUESTS, runs: int = RUNS) -> dict[str, float]:
    """Median seconds on a host with one PF, some guests, and all other VFs bound to the host's driver. ``folder`` is empty."""
    world = World(folder / "host", Server(cores=vfs + 1, threads=1, nodes=1, vfs=vfs, pages=32 * (guests + 1)))
    manager, _ = world.open_manager()
    for number in range(guests):
        manager.create(OPERATOR, make_request(f"guest{number}"))
    bind_the_rest(world, manager)
    source = Source(
        world.host, world.hypervisor, manager.survey, partial(manager.send_command, OPERATOR), world.server.policy.housekeeping,
        ExitPolicy(1e9, 1e9), window=0,
    )  # fmt: skip
    title = f"{vfs} VFs, {guests} guests"
    works: dict[str, Callable[[], Any]] = {
        f"survey of {title}": manager.survey,
        "plan on a new survey": partial(plan_anew, manager),
        "plan on the survey of another one": partial(manager.plan, OPERATOR, make_request("asked")),
        "what the PF enforces for all VFs": manager.host_setup.read_vf_states,
        "look at all guests for drift": partial(look, manager),
        "audit of all guests, without the seconds that exits are counted": Auditor(source).run,
    }
    return {what: measure(work, runs) for what, work in works.items()}


def measure(work: Callable[[], Any], runs: int) -> float:
    """Median seconds of the runs."""
    times = []
    for _ in range(runs):
        begin = perf_counter()
        work()
        times.append(perf_counter() - begin)
    return median(times)


def plan_anew(manager: GuestService) -> None:
    """Plans as the first request after the manager's start does."""
    manager.allocator.surveys.discard()
    manager.plan(OPERATOR, make_request("asked"))


def look(manager: GuestService) -> None:
    """The drift check with all VFs, which runs every ten minutes."""
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()


def make_request(name: str) -> Any:
    return parse_guest_request({"name": name, "image": IMAGE, "memory": "64M"})


def bind_the_rest(world: World, manager: GuestService) -> None:
    """Binds all VFs except the guests' and the last to the host's driver, with interfaces that are up."""
    for file in ("bind", "unbind"):
        world.host.add(f"sys/bus/pci/drivers/igbvf/{file}")
    (pf,) = manager.survey().pfs
    for vf in pf.vfs[:-1]:
        if vf.driver is None:
            folder = world.host.real(f"sys/bus/pci/devices/{vf.address}")
            world.host.add_link(f"{folder}/driver", "../../../bus/pci/drivers/igbvf")
            for file, text in (("address", "02:00:00:00:00:01"), ("operstate", "up"), ("flags", "0x1003")):
                world.host.add(f"{folder}/net/v{vf.index}/{file}", text)


if __name__ == "__main__":
    main()
