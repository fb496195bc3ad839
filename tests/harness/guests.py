"""What tests of the life cycle do with a guest, most often the one named `web`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Identity
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.request import parse_guest_request
from orchestrator.model.state import GuestState
from tests.fakes.root import DEVICES
from tests.fakes.server import IMAGE
from tests.harness.crash import World


def create(manager: GuestService, **fields: object) -> Plan:
    request = {"name": "web", "image": IMAGE, "memory": "64M", **fields}
    return manager.create(OPERATOR, parse_guest_request(request))[0].plan


def open_manager(world: World, policy: Policy | None = None) -> GuestService:
    """A manager that has just started."""
    manager, _ = world.open_manager(policy)
    manager.reconciler.recover()
    return manager


def ask(manager: GuestService, who: Identity = OPERATOR, **fields: object) -> tuple[Plan, tuple[str, ...]]:
    """What a guest would get, and the warnings that come with it."""
    view = manager.plan(who, parse_guest_request({"name": "asked", "image": IMAGE, "memory": "64M", **fields}))
    return view.plan, view.warnings


def warned(manager: GuestService) -> list[str]:
    """What operators were warned of, in events."""
    return [event.detail for event in manager.events(OPERATOR) if event.kind == "host-warning"]


def state(manager: GuestService, name: str = "web") -> str:
    return manager.guest(OPERATOR, name).state


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kinds(manager: GuestService) -> list[str]:
    return [event.kind for event in manager.events(OPERATOR)]


def spoil(world: World, plan: Plan) -> None:
    """Makes the guest's VF one that can't be reset, and so not be verified clean."""
    (world.host.path / DEVICES / str(plan.vf.address) / "reset").unlink()


def stop_on_paper(ledger: Ledger) -> None:
    """As if the guest had been started outside the manager: it runs, and the ledger has it as stopped."""
    for new in (GuestState.STOPPING, GuestState.STOPPED):
        ledger.set_state("web", new, restarts=0)


def use_pages(world: World, plan: Plan, pid: int, pages: int) -> None:
    """A program that is no guest takes huge pages of the guest's pool."""
    free = f"sys/devices/system/node/node{plan.node}/hugepages/hugepages-2048kB/free_hugepages"
    world.host.add(free, str(int(world.host.read(free)) - pages))
    if pid:
        world.host.add(f"proc/{pid}/status", f"Name:\tdatabase\nHugetlbPages:\t{2048 * pages} kB\n")


def start_by_hand(world: World, plan: Plan, *, uuid: UUID | None = None, cpus: str = "") -> None:
    """Somebody starts a guest past the manager: this one, or with another id one of its name, on these CPUs."""
    guest = {
        "name": plan.name, "uuid": str(uuid or plan.uuid), "pid": 77_000, "paused": False, "pages": 0, "memory": 65_536,
        "pins": [cpus or str(cpu) for cpu in plan.cpus], "emulator": cpus or str(world.server.policy.housekeeping),
        "node": plan.node, "page_kib": 2048, "vfs": [str(nic.address) for nic in plan.nics],
        "macs": [str(nic.mac) for nic in plan.nics],
    }  # fmt: skip
    world.hypervisor.add_threads(guest)
    world.hypervisor.store(guest)


def waiting(manager: GuestService, name: str = "web") -> threading.Timer:
    """The timer that will start the guest again; its ``function`` is what it will call."""
    until(lambda: manager.transitions.restarts.pending(name))
    timer = manager.transitions.restarts.pending(name)
    assert timer
    return timer
