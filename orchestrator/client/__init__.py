"""The typed client of a manager's HTTP API. It needs only the standard library."""

from orchestrator.client.client import Client

__all__ = ["Client"]
