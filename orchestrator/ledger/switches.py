"""The registered external switches. A change is on the disk when the method returns."""

from __future__ import annotations

import json
import threading

from orchestrator.errors import Conflict, NotFound
from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import parse_switch, read_rows
from orchestrator.model.plain import to_plain
from orchestrator.model.switch import Switch


class Switches:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._known: tuple[Switch, ...] | None = None  # each plan needs them; changed with the lock held

    def read(self) -> tuple[Switch, ...]:
        """By name."""
        with self._lock:
            if self._known is None:
                with self._database.reading() as db:
                    rows = read_rows(db, "SELECT name, record FROM switch ORDER BY name")
                    self._known = tuple(parse_switch(name, text) for name, text in rows)
            return self._known

    def _forget(self) -> None:
        """After a change."""
        with self._lock:
            self._known = None

    def add(self, switch: Switch) -> None:
        """Raises Conflict if the name is taken."""
        statement = "INSERT INTO switch VALUES (?, ?) ON CONFLICT DO NOTHING"
        with self._database.writing(f"add the switch {switch.name} to", starts_work=True) as db:
            added = db.execute(statement, (switch.name, json.dumps(to_plain(switch)))).rowcount
            number = self._database.note_written()
        self._forget()
        if not added:
            raise Conflict(f"there is a switch named {switch.name} already", "choose another name, or delete that switch first")
        self._database.wait_synced(number)

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        statement = "DELETE FROM switch WHERE name = ?"
        deleted = self._database.write(f"delete the switch {name} from", statement, name, starts_work=False).rowcount
        self._forget()
        if not deleted:
            raise NotFound(f"there is no switch named {name}", "`nohype switch list` shows all")
