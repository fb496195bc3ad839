"""The daemon's threads: for link changes, for reconciliation, and for images from boot servers that no guest has any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import count

from orchestrator.errors import OrchestratorError
from orchestrator.guests.reconcile import Reconciler
from orchestrator.guests.service import GuestService
from orchestrator.host import netlink

_log = logging.getLogger("nohyped")

_RETRY_SECONDS = 5
_ROUND_SECONDS = 60.0
_ROUNDS_PER_DAY = 1440


def start_threads(service: GuestService) -> None:
    """The threads end with the process."""
    threading.Thread(target=_watch_uplinks, args=(service.reconciler,), name="uplinks", daemon=True).start()
    threading.Thread(target=_reconcile_periodically, args=(service,), name="reconciler", daemon=True).start()
    threading.Thread(target=_remove_boot_images, args=(service,), name="boot images", daemon=True).start()
    service.switches.start_watching()


def log_errors(work: Callable[[], object]) -> None:
    """For the work of a thread that must keep running: an error goes to the journal."""
    try:
        work()
    except OrchestratorError as error:
        _log.error("%s", error)
    except Exception:
        _log.exception("internal error in a background task, continuing")


def _watch_uplinks(reconciler: Reconciler) -> None:
    """A PF reset shows as its link going down and up; igb then switches locally again."""

    def watch() -> None:
        for interface in netlink.watch_links():
            if reconciler.has_guest_on(interface):
                log_errors(reconciler.on_link_change)

    while True:
        log_errors(watch)
        time.sleep(_RETRY_SECONDS)
        log_errors(reconciler.on_link_change)  # for changes that were missed meanwhile


def _reconcile_periodically(service: GuestService) -> None:
    for number in count():
        if number % _ROUNDS_PER_DAY == 0:
            log_errors(service.remove_old_logs)
        time.sleep(_ROUND_SECONDS)
        log_errors(service.reconciler.reconcile)
        log_errors(service.reconciler.detect_drift)


def _remove_boot_images(service: GuestService) -> None:
    """Apart from reconciliation: another program may change the image store for minutes."""
    while True:
        time.sleep(_ROUND_SECONDS)
        log_errors(service.remove_boot_images)
