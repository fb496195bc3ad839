"""What the routes call: service, audit, metrics and event log, and the threads in which the calls run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.console_feed import ConsoleFeed
from orchestrator.api.event_stream import EventStream
from orchestrator.api.parameters import Depends
from orchestrator.api.workers import WorkersPerClient
from orchestrator.errors import Stale
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Event
from orchestrator.model.access import Identity
from orchestrator.model.event import ChainReport
from orchestrator.model.plain import to_plain
from orchestrator.model.proof import Proof

__all__ = ["Backend", "GuestService", "MeasureProofs", "Records", "Served", "answer_plain"]


class Records(Protocol):
    """What the manager proves to others."""

    def verify_events(self, at: int | None = None) -> ChainReport: ...
    def sign(self, frames: int, nonce: str) -> bytes: ...


class MeasureProofs(Protocol):
    """Measures all proofs, or those of the host. ``frames``: how many to send from guest to guest, 0 for none."""

    def __call__(self, frames: int, *, host_only: bool) -> Iterable[Proof]: ...


@dataclass(frozen=True)
class Backend:
    """Has several pools of workers: a guest that takes long to shut down delays neither reading guests nor forcing it off.

    Waiting on a console needs no thread.
    """

    guests: GuestService
    audit: MeasureProofs
    metrics: Callable[[], tuple[bytes, str]] | None  # as in Api
    read_events: Callable[[Identity, int | None, int], Sequence[Event]]  # as in EventStream
    stream: EventStream
    records: Records | None = None  # as in Api
    consoles: ConsoleFeed = field(default_factory=ConsoleFeed)
    describe: Callable[[], Mapping[str, object]] = dict  # the OpenAPI document
    quick: WorkersPerClient = field(default_factory=lambda: WorkersPerClient(32))
    changes: WorkersPerClient = field(default_factory=lambda: WorkersPerClient(64))
    ends: WorkersPerClient = field(default_factory=lambda: WorkersPerClient(64))
    audits: WorkersPerClient = field(default_factory=lambda: WorkersPerClient(2))
    # Calls that wait for an external switch, up to its time limits.
    switches: WorkersPerClient = field(default_factory=lambda: WorkersPerClient(8))
    # For long reads. Few at a time: each occupies the interpreter and memory.
    long: WorkersPerClient = field(default_factory=lambda: WorkersPerClient(4))

    def measure(self, frames: int, *, host_only: bool = False) -> tuple[Proof, ...]:
        """Measures the proofs, and remembers them for the view of the host."""
        audits = self.guests.host_views.audits
        versions = audits.read_versions()
        proofs = tuple(self.audit(frames, host_only=host_only))
        audits.observe(proofs, versions, host_only=host_only)
        return proofs

    async def choose_version(self, caller: Identity, name: str, versions: frozenset[int] | None) -> int | None:
        """The version of a guest that a change requires; None for any.

        Of several versions in If-Match the guest's current one is chosen; raises Stale if the guest has none of them.
        """
        if versions is None or len(versions) == 1:
            return next(iter(versions)) if versions else None
        current = (await self.quick.run(caller, self.guests.guest, caller, name)).version
        if current not in versions:
            raise Stale(f"guest {name} is at version {current}, not listed in If-Match", "read it again, then retry")
        return current


async def answer_plain(workers: WorkersPerClient, caller: Identity, read: Callable[[], object]) -> Response:
    # JSON is encoded in the worker's thread too: with thousands of entries it would block the event loop.
    content = await workers.run(caller, lambda: json.dumps(to_plain(read()), separators=(",", ":")).encode())
    return Response(content, media_type="application/json")


async def _find_backend(request: Request) -> Backend:
    backend: Backend = request.state.backend
    return backend


Served = Annotated[Backend, Depends(_find_backend)]
