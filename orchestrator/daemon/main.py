"""`nohyped`, the system manager: puts the parts together, serves the socket, watches for guests that end and PFs that reset."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import click

from orchestrator import __version__
from orchestrator.api.accept import Listener
from orchestrator.api.app import Api
from orchestrator.api.identity import build_identity_map
from orchestrator.api.server import Server, open_port
from orchestrator.audit.facts import Source
from orchestrator.audit.report import Auditor
from orchestrator.config import DEFAULT_CONFIG, DaemonConfig, read_config
from orchestrator.daemon.reports import build_metrics, describe, find_listener, set_up_reports, start_heartbeat, watch_audit
from orchestrator.daemon.single_instance import HOST_LOCK, stay_alone
from orchestrator.daemon.systemd import notify_systemd
from orchestrator.errors import OrchestratorError
from orchestrator.guests.reconcile import Reconciler
from orchestrator.guests.recovery import check_housekeeping
from orchestrator.guests.service import GuestService
from orchestrator.host import netlink
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.metrics.counters import Counters
from orchestrator.model.access import MANAGER
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.plan import Policy
from orchestrator.planning.host_check import build_policy

_log = logging.getLogger("nohyped")

_PAUSE = 5
_LOOK = 60.0
_LOOKS_A_DAY = 1440
# Seconds that the recovery of one guest may take: libvirt may be busy with it for half a minute, and so may a NIC.
_A_GUEST = 120


@click.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True, help="Configuration file."
)
@click.version_option(__version__)
def main(path: Path) -> None:
    """The NoHype system manager. It takes requests on a Unix socket; `nohype` talks to it."""
    set_up_reports()
    try:
        config = read_config(path)
    except OrchestratorError as error:
        click.echo(f"nohyped: {error}", err=True)
        sys.exit(os.EX_CONFIG)  # the unit does not try again: it would read the same file
    try:
        serve(config)
    except OrchestratorError as error:
        sys.exit(f"nohyped: {error}")


def serve(config: DaemonConfig) -> None:
    """Runs the manager until it is told to end (SIGTERM, SIGINT). Guests go on running.

    Raises:
        OrchestratorError: the ledger, the hypervisor or the socket can't be had.
    """
    # First: what is wrong with the configuration is said before anything is done.
    directory = build_identity_map(config)
    # Never closed: it is held until the process ends, as some threads go on until then.
    # The ledger's too: it may be on a disk that another host has as well.
    _alone = stay_alone(HOST_LOCK), stay_alone(Path(f"{config.paths.ledger}.lock"))
    listeners = [Listener(find_listener(Path(config.paths.socket)))]
    listeners += [open_port(config.api)] if config.api else []
    host = HostRoot(net=netlink)
    hypervisor = Hypervisor()
    policy = build_policy(config.host)
    ledger, seen = _open_ledger(config, policy), Counters()
    ledger.on_event(seen.observe_event)
    manager = GuestService(
        host, hypervisor, ledger, policy,
        images=Path(config.paths.images), consoles=Path(config.paths.consoles),
        count_undo_failure=seen.count_undo_failure, observe_refusal=seen.observe_refusal,
    )  # fmt: skip
    reconciler = manager.reconciler
    # Said, and no more: guests that run need their manager, whatever new ones would lack.
    _logged(lambda: manager.compare(manager.survey()))
    hypervisor.watch_ends(lambda uuid, end: _logged(lambda: reconciler.on_guest_ended(uuid, end)))
    # However many guests there are: each may take a while (sd_notify(3)).
    reconciler.recover(lambda: notify_systemd(f"EXTEND_TIMEOUT_USEC={_A_GUEST * 1_000_000}"))
    # A PF that can't be put right must not keep the manager from stopping its guests.
    _logged(reconciler.on_link_change)
    threading.Thread(target=_watch_uplinks, args=(reconciler,), name="uplinks", daemon=True).start()
    threading.Thread(target=_look_now_and_then, args=(manager,), name="looker", daemon=True).start()
    source = Source(
        host, hypervisor, manager.survey, partial(manager.tell, MANAGER), policy.housekeeping,
        ExitPolicy(config.exits.total, config.exits.emulated), os.getpid(),
    )  # fmt: skip
    audit = watch_audit(Auditor(source).run, seen)
    metrics = build_metrics(manager.survey, ledger, hypervisor, policy, seen)
    api = Api(manager, audit, directory, config.limits, metrics.render)

    def ready() -> None:
        notify_systemd(f"READY=1\nSTATUS={describe(ledger)}")
        ledger.on_event(lambda _event: notify_systemd(f"STATUS={describe(ledger)}"))
        start_heartbeat(server, ledger, manager.check)

    def stopping() -> None:
        notify_systemd("STOPPING=1")
        manager.close()

    server = Server(api, listeners, ready, stopping)
    where = f"{config.paths.socket} and {config.api.listen}" if config.api else config.paths.socket
    _log.info("version %s serves %s", __version__, where)
    _run(server, ledger)


def _open_ledger(config: DaemonConfig, policy: Policy) -> Ledger:
    """The ledger, if the configuration does not take a guest's cores. It is not touched otherwise."""
    accept = partial(check_housekeeping, housekeeping=policy.housekeeping)
    return Ledger(Path(config.paths.ledger), accept=accept, keep=config.events.keep)


def _run(server: Server, ledger: Ledger) -> None:
    """Serves until a signal, then closes the ledger. What other threads still do ends there, as it would with a kill.

    The signal must end the server only: when uvicorn has shut down, it restores the handlers that it found and raises the signal
    again (Server.capture_signals), and with the default handler the process would end before the ledger is closed.
    """

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        ledger.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch_uplinks(reconciler: Reconciler) -> None:
    """A PF reset shows as its link going down and up; igb then has local switching on again."""

    def watch() -> None:
        for interface in netlink.watch_links():
            if reconciler.has_guest_on(interface):
                _logged(reconciler.on_link_change)

    while True:
        _logged(watch)
        time.sleep(_PAUSE)
        _logged(reconciler.on_link_change)  # what was missed meanwhile


def _look_now_and_then(manager: GuestService) -> None:
    """Finds guests whose end nobody told (libvirt was being restarted when they ended), and what others have changed."""
    for look in count():
        if look % _LOOKS_A_DAY == 0:
            _logged(manager.tidy)
        time.sleep(_LOOK)
        _logged(manager.reconciler.reconcile)
        _logged(manager.reconciler.detect_drift)


def _logged(work: Callable[[], object]) -> None:
    """Work of a watcher thread: an error is written to the journal, and the watcher goes on."""
    try:
        work()
    except OrchestratorError as error:
        _log.error("%s", error)
    except Exception:
        _log.exception("a fault of ours; the watcher goes on")


if __name__ == "__main__":
    main()
