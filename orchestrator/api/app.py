"""Assembles the manager's HTTP interface. The operations are in `api.routes`; this package makes no decisions about guests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from orchestrator.api.backend import Backend, GuestService, MeasureProofs, Records
from orchestrator.api.console_feed import ConsoleFeed
from orchestrator.api.dispatch import Dispatcher
from orchestrator.api.event_stream import EventStream
from orchestrator.api.guard import Guard
from orchestrator.api.identity import IdentityMap
from orchestrator.api.openapi import build_document
from orchestrator.api.routes import consoles, events, evidence, exits, guests, host, networks, quarantine, switches, uplinks
from orchestrator.api.routing import Route, RouteTable
from orchestrator.api.workers import Workers
from orchestrator.config import LimitConfig
from orchestrator.ledger import Event
from orchestrator.model.access import MANAGER, Identity

ROUTES: tuple[Route, ...] = (
    *host.routes, *guests.routes, *exits.routes, *consoles.routes, *networks.routes, *quarantine.routes, *switches.routes,
    *uplinks.routes, *events.routes, *evidence.routes,
)  # fmt: skip


class Api:
    """The ASGI application; must be closed before the server ends.

    Args:
        metrics: the page that Prometheus reads, and its content type; None without metrics.
        records: signs evidence and verifies the event log; None without both.
        has_page: serves the web page on the TLS port.
    """

    def __init__(
        self,
        service: GuestService,
        audit: MeasureProofs,
        identities: IdentityMap,
        limits: LimitConfig | None = None,
        metrics: Callable[[], tuple[bytes, str]] | None = None,
        records: Records | None = None,
        *,
        has_page: bool = False,
    ) -> None:
        def read_events(caller: Identity, after: int | None, limit: int) -> Sequence[Event]:
            return events.show_events(service.events(caller, after, limit), caller, identities)

        self.stream = EventStream(service.last_event, partial(service.wait_events, MANAGER), read_events, Workers(4))
        self.consoles = ConsoleFeed()
        describe = cache(partial(build_document, ROUTES))
        backend = Backend(service, audit, metrics, read_events, self.stream, records, self.consoles, describe)
        table = RouteTable(ROUTES)
        self.app = Guard(Dispatcher(backend, ROUTES, table), identities, limits or LimitConfig(), table, has_page=has_page)

    def close(self) -> None:
        """Ends the responses that have no end of their own."""
        self.stream.close()
        self.consoles.close()
