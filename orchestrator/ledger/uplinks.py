"""Edge modes of uplinks that an operator has set instead of those of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from orchestrator.errors import LedgerError
from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import read_rows
from orchestrator.ledger.schema import DAMAGED
from orchestrator.model.edge import EdgeMode


class UplinkEdges:
    """With a copy in memory: each plan reads it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.reading() as db:
            self._edges = {name: _check(name, edge) for name, edge in read_rows(db, "SELECT uplink, edge FROM uplink_edge")}

    def read(self) -> Mapping[str, str]:
        """Uplink → edge mode or "auto"."""
        return MappingProxyType(self._edges)

    def set(self, uplink: str, edge: str | None) -> None:
        """On the disk when it returns. None: as configured."""
        with self._database.writing(f"write the edge mode of uplink {uplink} to", starts_work=True) as db:
            if edge is None:
                db.execute("DELETE FROM uplink_edge WHERE uplink = ?", (uplink,))
            else:
                db.execute("INSERT INTO uplink_edge VALUES (?1, ?2) ON CONFLICT DO UPDATE SET edge = ?2", (uplink, edge))
            number = self._database.note_written()
        kept = {name: value for name, value in self._edges.items() if name != uplink}
        self._edges = kept if edge is None else {**kept, uplink: edge}
        self._database.wait_synced(number)


def _check(uplink: str, edge: str) -> str:
    if edge not in ("auto", *EdgeMode):
        raise LedgerError(f"the ledger has an unknown edge mode {edge!r} of uplink {uplink}", DAMAGED)
    return edge
