"""`nohyped`, the system manager: assembles the parts, recovers the guests and serves until a signal."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import click

from orchestrator import __version__
from orchestrator.api.accept import Listener
from orchestrator.api.app import Api
from orchestrator.api.identity import IdentityMap, build_identity_map
from orchestrator.api.server import Server, open_port, open_socket
from orchestrator.audit.evidence import Subject
from orchestrator.audit.facts import Source
from orchestrator.audit.report import Auditor
from orchestrator.config import DEFAULT_CONFIG, DaemonConfig, read_config
from orchestrator.daemon.background import log_errors, start_threads
from orchestrator.daemon.evidence import EvidenceSigner
from orchestrator.daemon.journal import set_up_logging
from orchestrator.daemon.monitoring import build_metrics, record_audits, start_heartbeat, status_line
from orchestrator.daemon.single_instance import HOST_LOCK, acquire
from orchestrator.daemon.systemd import notify_systemd, take_activation_sockets
from orchestrator.errors import OrchestratorError
from orchestrator.guests.counters import read_uplink_counters
from orchestrator.guests.hairpin_watch import HairpinWatch
from orchestrator.guests.recovery import check_housekeeping
from orchestrator.guests.service import GuestService
from orchestrator.guests.switches import build_settings
from orchestrator.guests.vcpu_times import VcpuTimes
from orchestrator.host import netlink
from orchestrator.host.cache import read_use
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.metrics.counters import Counters
from orchestrator.model.access import MANAGER
from orchestrator.model.cache import name_group
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.plan import Policy
from orchestrator.planning.host_check import build_policy

_log = logging.getLogger("nohyped")

_SOCKET = "nohyped"
"""FileDescriptorName= of nohyped.socket."""
_RECOVERY_SECONDS = 120
"""Limit per guest: libvirt and a NIC can each be busy for half a minute."""


@click.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True, help="Configuration file."
)
@click.version_option(__version__)
def main(path: Path) -> None:
    """The NoHype system manager. It serves requests on a Unix socket; `nohype` is its client."""
    set_up_diagnostics()
    try:
        config = read_config(path)
        identities = build_identity_map(config)
    except OrchestratorError as error:
        click.echo(f"nohyped: {error}", err=True)
        sys.exit(os.EX_CONFIG)  # the unit does not restart: it would read the same file
    try:
        serve(config, identities)
    except OrchestratorError as error:
        sys.exit(f"nohyped: {error}")


def set_up_diagnostics() -> None:
    """Logs to the journal. A fatal signal, such as the watchdog's, logs the stack of each thread."""
    set_up_logging()
    faulthandler.enable()


def open_listener(path: Path) -> socket.socket:
    """The Unix socket that systemd opened, or a new one."""
    sockets = take_activation_sockets().get(_SOCKET, [])
    return sockets[0] if sockets else open_socket(path)


def serve(config: DaemonConfig, identities: IdentityMap) -> None:
    """Runs until SIGTERM or SIGINT; guests keep running. Raises OrchestratorError without ledger, libvirt or a socket."""
    # Never closed: some threads work until the process ends. The ledger has its own lock: hosts may share its disk.
    _locks = acquire(HOST_LOCK), acquire(Path(f"{config.paths.ledger}.lock"))
    listeners = [Listener(open_listener(Path(config.paths.socket)))]
    listeners += [open_port(config.api)] if config.api else []
    host = HostRoot(net=netlink)
    hypervisor = Hypervisor()
    policy = build_policy(config)
    ledger, counters = _open_ledger(config, policy), Counters()
    ledger.subscribe(counters.observe_event)
    service = GuestService(
        host, hypervisor, ledger, policy, images=Path(config.paths.images), consoles=Path(config.paths.consoles),
        count_undo_failure=counters.count_undo_failure, observe_refusal=counters.observe_refusal,
        switches=build_settings(config), count_wipe=counters.count_wipe,
    )  # fmt: skip
    hairpins = HairpinWatch(host, ledger)
    service.host_views.find_lost = hairpins.find_lost
    _recover(service, hypervisor)
    start_threads(service)
    hairpins.start()
    source = Source(
        host, hypervisor, service.survey, partial(service.send_command, MANAGER), policy.housekeeping,
        ExitPolicy(config.exits.total, config.exits.emulated), os.getpid(),
        disk_checks=service.records.disk_checks, nics=service.records.nics, given_texts=service.records.given_texts,
        find_tie=service.switches.find_tie, caches=service.records.caches, core_starts=service.records.core_start,
    )  # fmt: skip
    auditor = Auditor(source)
    signer = EvidenceSigner(
        auditor, Subject(host, hypervisor), ledger, config.audit.key, counters.observe_audit, service.host_views.audits
    )
    metrics = build_metrics(
        service.survey, ledger, hypervisor, policy, counters,
        lambda uplink: read_uplink_counters(host, uplink, ledger.read().claims, service.switches.last_count), hairpins.find_lost,
        service.exits.read_all, lambda guest: read_use(host, name_group(guest)), hairpins.find_counts,
        VcpuTimes(host, hypervisor, ledger).read,
    )  # fmt: skip
    has_page = bool(config.api and config.api.page)
    api = Api(service, record_audits(auditor.run, counters), identities, config.limits, metrics.render, signer, has_page=has_page)

    def ready() -> None:
        notify_systemd(f"READY=1\nSTATUS={status_line(ledger)}")
        ledger.subscribe(lambda _event: notify_systemd(f"STATUS={status_line(ledger)}"))
        start_heartbeat(server, ledger, service.raise_if_stalled)

    def stopping() -> None:
        notify_systemd("STOPPING=1")
        hairpins.close()
        service.close()

    server = Server(api, listeners, ready, stopping, policy.housekeeping)
    where = f"{config.paths.socket} and {config.api.listen}" if config.api else config.paths.socket
    _log.info("version %s serves %s", __version__, where)
    _run(server, ledger)


def _recover(service: GuestService, hypervisor: Hypervisor) -> None:
    # Differences from the configuration are only reported: running guests need their manager in any case.
    log_errors(lambda: service.compare(service.survey()))
    hypervisor.watch_ends(lambda uuid, cause: log_errors(lambda: service.reconciler.on_guest_ended(uuid, cause)))
    # The start takes longer with more guests (sd_notify(3)).
    service.reconciler.recover(lambda: notify_systemd(f"EXTEND_TIMEOUT_USEC={_RECOVERY_SECONDS * 1_000_000}"))
    log_errors(service.reconciler.on_link_change)


def _open_ledger(config: DaemonConfig, policy: Policy) -> Ledger:
    """Does not touch the ledger if the configuration takes a guest's cores."""
    accept = partial(check_housekeeping, housekeeping=policy.housekeeping)
    return Ledger(Path(config.paths.ledger), accept=accept, keep=config.events.keep)


def _run(server: Server, ledger: Ledger) -> None:
    """Serves until a signal, then closes the ledger, which ends the work of other threads as a SIGKILL would.

    The signal must end the server only: after its shutdown uvicorn restores the handlers that it found and raises the signal
    again (Server.capture_signals). The default handler would end the process before the ledger is closed.
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


if __name__ == "__main__":
    main()
