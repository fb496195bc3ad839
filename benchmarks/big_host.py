"""What a survey, a plan and an audit cost on a host with as many VFs as a PF may have; all is real but kernel and libvirt.

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

from orchestrator.audit.run import run_audit
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
    """Prints a line for each figure."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_vfs(Path(folder))
    for what, seconds in figures.items():
        print(f"{what:<60} {seconds * 1000:8.1f} ms")
    sys.exit(int(any(seconds > LIMIT for seconds in figures.values())))


def measure_vfs(folder: Path, vfs: int = VFS, guests: int = GUESTS, runs: int = RUNS) -> dict[str, float]:
    """Seconds, median of the runs, on a host with one PF, some guests, and the rest of the VFs with the host's own driver.

    Args:
        folder: empty, for the host.
    """
    world = World(folder / "host", Server(cores=vfs + 1, threads=1, nodes=1, vfs=vfs, pages=32 * (guests + 1)))
    manager, _ = world.open_manager()
    for number in range(guests):
        manager.create(OPERATOR, make_request(f"guest{number}"))
    bind_the_rest(world, manager)
    audit = partial(
        run_audit, world.host, world.hypervisor.read_guests()[0], manager.survey(), world.hypervisor.read_exits, manager.tell,
        housekeeping=world.server.policy.housekeeping, policy=ExitPolicy(1e9, 1e9), window=0,
    )  # fmt: skip
    title = f"{vfs} VFs, {guests} guests"
    works: dict[str, Callable[[], Any]] = {
        f"survey of {title}": manager.survey,
        "plan on a new survey": partial(plan_anew, manager),
        "plan on the survey of another one": partial(manager.plan, OPERATOR, make_request("asked")),
        "what the PF enforces for all VFs": manager.host_setup.read_vf_states,
        "look at all guests for drift": partial(look, manager),
        "audit of all guests, without the seconds that exits are counted": audit,
    }
    return {what: measure(work, runs) for what, work in works.items()}


def measure(work: Callable[[], Any], runs: int) -> float:
    """Seconds that the work takes, median of the runs."""
    times = []
    for _ in range(runs):
        begin = perf_counter()
        work()
        times.append(perf_counter() - begin)
    return median(times)


def plan_anew(manager: GuestService) -> None:
    """Plans as the first request after the manager's start does."""
    manager.allocator._known = None
    manager.plan(OPERATOR, make_request("asked"))


def look(manager: GuestService) -> None:
    """As every ten minutes, the VFs included."""
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()


def make_request(name: str) -> Any:
    """One core and 64 MiB."""
    return parse_guest_request({"name": name, "image": IMAGE, "memory": "64M"})


def bind_the_rest(world: World, manager: GuestService) -> None:
    """Gives the host's own driver to all VFs but those of guests and the last, each with an interface that is up."""
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
