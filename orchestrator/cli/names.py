"""Completes names in a shell: of what the manager has, if it answers quickly. Nothing is printed, and no error is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import click

from orchestrator.cli.connection import connect
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError

# A shell waits for this after each press of the tab key.
_PATIENCE = 10.0

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _complete(read: Callable[[Client], Iterable[str]]) -> Complete:
    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        found: list[str] = []

        def ask() -> None:
            try:
                found.extend(read(connect(ctx, ctx.params.get("socket"))))
            except (OrchestratorError, click.UsageError):
                pass  # the command itself reports it

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        return [name for name in found if name.startswith(incomplete)]

    return complete


complete_guest = _complete(lambda client: [guest["name"] for guest in client.guests()])
complete_network = _complete(lambda client: [network["name"] for network in client.networks()])
complete_switch = _complete(lambda client: [view["switch"]["name"] for view in client.switches()])
complete_quarantined = _complete(lambda client: [guest["name"] for guest in client.quarantined()])
