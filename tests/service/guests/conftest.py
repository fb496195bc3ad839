"""A manager that has just started on a fake host, and receives the ends of its guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from tests.harness.crash import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def opened(world: World) -> Iterator[tuple[GuestService, Ledger]]:
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    world.hypervisor.watch_ends(manager.reconciler.on_guest_ended)
    yield manager, ledger
    manager.close()  # a scheduled restart must not outlive the test
    world.hypervisor.wait_for_callbacks(30)


@pytest.fixture
def manager(opened: tuple[GuestService, Ledger]) -> GuestService:
    return opened[0]


@pytest.fixture
def ledger(opened: tuple[GuestService, Ledger]) -> Ledger:
    return opened[1]
