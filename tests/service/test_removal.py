"""The package of the manager is removed only from a host whose guests do not need it any more."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from orchestrator.daemon.removal import check_removal
from orchestrator.errors import LedgerError
from orchestrator.model.access import OPERATOR
from tests.harness.crash import World
from tests.harness.guests import create, open_manager


def write_config(folder: Path) -> Path:
    config = folder / "nohype.toml"
    ledger = folder / "ledger.sqlite"
    config.write_text(f'[host]\nhousekeeping = "0-1"\nuplinks = ["nic0"]\n[paths]\nledger = "{ledger}"\n')
    return config


def test_running_guest_is_named_with_its_state(tmp_path: Path) -> None:
    manager = open_manager(World(tmp_path))
    create(manager)
    create(manager, name="db")
    manager.stop(OPERATOR, "db", 0)
    assert "guests: web (running)\n" in check_removal(write_config(tmp_path))


def test_stopped_guest_does_not_need_the_manager(tmp_path: Path) -> None:
    manager = open_manager(World(tmp_path))
    create(manager)
    manager.stop(OPERATOR, "web", 0)
    assert check_removal(write_config(tmp_path)) == ""


def test_stopped_guest_with_changes_of_the_host_needs_the_manager(tmp_path: Path) -> None:
    """As of a disk, which only the manager wipes."""
    world = World(tmp_path)
    manager = open_manager(world)
    create(manager)
    manager.stop(OPERATOR, "web", 0)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("INSERT INTO undo (owner, action, arguments) VALUES ('web', 'reserve-disk', '{}')")
    assert "guests: web (stopped)\n" in check_removal(write_config(tmp_path))


def test_ledger_is_not_changed_and_not_created(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert check_removal(config) == ""
    assert not (tmp_path / "ledger.sqlite").exists()


def test_unreadable_ledger_refuses_the_removal(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        check_removal(write_config(tmp_path))
