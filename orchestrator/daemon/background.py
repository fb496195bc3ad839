"""The daemon's threads: for changes of links and rules, for reconciliation, and for images of boot servers that no guest has."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from errno import EPROTONOSUPPORT
from itertools import count

from orchestrator.errors import HostError, OrchestratorError
from orchestrator.guests.reconcile import Reconciler
from orchestrator.guests.service import GuestService
from orchestrator.host import netlink

_log = logging.getLogger("nohyped")

_RETRY_SECONDS = 5
_ROUND_SECONDS = 60.0
_RULES_SECONDS = 2.0
"""Between two checks of rules: a firewall that other programs change often must not keep the manager busy."""
_ROUNDS_PER_DAY = 1440


def start_threads(service: GuestService) -> None:
    """The threads end with the process."""
    threading.Thread(target=_watch_uplinks, args=(service.reconciler,), name="uplinks", daemon=True).start()
    threading.Thread(target=_watch_rules, args=(service.reconciler,), name="rules", daemon=True).start()
    threading.Thread(target=_reconcile_periodically, args=(service,), name="reconciler", daemon=True).start()
    threading.Thread(target=_remove_boot_images, args=(service,), name="boot images", daemon=True).start()
    service.switches.start_watching()
    service.exit_watch.start()


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


def _watch_rules(reconciler: Reconciler) -> None:
    """`nft flush ruleset`, as a firewall's restart does it, removes the rules of software edges too."""

    def watch() -> None:
        with netlink.RuleNotices() as notices:
            log_errors(reconciler.check_taps)  # for changes that were missed meanwhile
            while True:
                # The rules of a new software edge are themselves announced.
                if notices.wait(_RULES_SECONDS if reconciler.has_taps else _ROUND_SECONDS) or reconciler.taps_due:
                    log_errors(reconciler.check_taps)
                    time.sleep(_RULES_SECONDS)

    while True:
        try:
            watch()
        except HostError as error:
            if error.errno == EPROTONOSUPPORT:
                return  # without nftables no guest has a software edge
            _log.error("%s", error)
        time.sleep(_ROUND_SECONDS)


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
