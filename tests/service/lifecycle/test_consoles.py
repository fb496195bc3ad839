"""What guests print."""

from __future__ import annotations

import pytest

from orchestrator.access import OPERATOR
from orchestrator.errors import NotFound
from orchestrator.hypervisor import LiveGuest
from orchestrator.lifecycle import consoles as consoles_module
from orchestrator.lifecycle.manager import SystemManager
from tests.crashes import World
from tests.guests import create


def test_what_another_guest_of_the_name_prints_is_not_told(
    world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> str:
        manager.delete(OPERATOR, "web")
        create(manager)
        return "nohype: ready secret"

    monkeypatch.setattr(consoles_module, "wait_for", read)
    create(manager)
    with pytest.raises(NotFound, match="web that was asked is gone"):
        manager.wait_ready(OPERATOR, "web", 1)


def test_nothing_is_typed_on_the_console_of_another_guest_of_the_name(
    world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager)
    find = world.hypervisor.guest

    def swap(name: str) -> LiveGuest:
        monkeypatch.setattr(world.hypervisor, "guest", find)
        manager.delete(OPERATOR, name)
        create(manager)
        return find(name)

    monkeypatch.setattr(world.hypervisor, "guest", swap)
    typed: list[object] = []
    monkeypatch.setattr(consoles_module, "tell", lambda *words, **_: typed.append(words))
    with pytest.raises(NotFound, match="web that was asked is gone"):
        manager.tell(OPERATOR, "web", "halt", 1)
    assert typed == []
