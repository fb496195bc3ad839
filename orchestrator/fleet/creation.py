"""Has the manager of a host create a guest, which takes long for a guest with disks.

The disks of a deleted guest are wiped, for hours if they are large. Slurm does not count that: an Epilog that waited for it would
keep all other guests from the node (measured: a node with a job that is being ended starts no other job).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.client import Client
from orchestrator.client.shapes import Guest
from orchestrator.errors import Conflict, NoRoom, OrchestratorError
from orchestrator.fleet.manager import MAY_PASS, WIPING, retry_manager

MANAGER_SECONDS = 600.0
"""Time for a manager that restarts."""
POLL_SECONDS = 5.0
_FILLING_SECONDS = 86_400.0
"""A disk is read as a whole before its guest gets it."""
_DISK = "disk"
"""Reasons of the manager that name disks begin with this word (`planning.disk`)."""


def create_guest(client: Client, request: Mapping[str, Any], report_wait: Callable[[str], object]) -> Guest:
    """Returns when the guest's vCPUs run. Waits while disks of deleted guests are being wiped that it needs, or their name.

    Args:
        report_wait: gets the reason of each wait.

    Raises OrchestratorError if the guest cannot be created, also after the disks were wiped.
    """
    while True:
        # Before the request: what has ended when it is refused is a reason to repeat it.
        before = _find_wiping(client, request)
        try:
            return _create(client, request)
        except (Conflict, NoRoom) as error:
            wiping = before | _find_wiping(client, request)
            if not wiping or not _can_pass(error, request, wiping):
                raise
        report_wait(f"the disks of {', '.join(sorted(name for name, _ in wiping))} are being wiped")
        while wiping <= _find_wiping(client, request):
            time.sleep(POLL_SECONDS)


def _create(client: Client, request: Mapping[str, Any]) -> Guest:
    limit = {"timeout": _FILLING_SECONDS} if request.get("disks") else {}
    try:
        return client.create(request, **limit)
    except MAY_PASS:  # the time for a restart begins now
        return retry_manager(lambda: client.create(request, **limit), MANAGER_SECONDS)


def _find_wiping(client: Client, request: Mapping[str, Any]) -> frozenset[tuple[str, str | None]]:
    """Names and ids of deleted guests whose disks, or whose name, the request can need."""
    controllers = set(request["placement"].get("disks", ()))
    has_disks = bool(request.get("disks"))
    return frozenset(
        (guest["name"], guest["id"])
        for guest in retry_manager(client.guests, MANAGER_SECONDS)
        if guest["state"] == WIPING
        and (
            guest["name"] == request["name"]
            or (has_disks and any(not disk["address"] or disk["address"] in controllers for disk in guest["disks"]))
        )
    )


def _can_pass(error: OrchestratorError, request: Mapping[str, Any], wiping: frozenset[tuple[str, str | None]]) -> bool:
    if isinstance(error, NoRoom):
        return all(reason.startswith(_DISK) for reason in error.reasons)
    return request["name"] in {name for name, _ in wiping}
