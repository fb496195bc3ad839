"""The typed client of a manager's HTTP API. It needs only the standard library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    # At its first use (PEP 562): the manager imports only the shapes of answers, and http.client takes memory.
    if name == "Client":
        from orchestrator.client.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
