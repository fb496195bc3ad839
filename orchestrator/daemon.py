"""`nohyped`, the system manager: puts the parts together, serves the socket, watches for guests that end and PFs that reset."""

from __future__ import annotations

import grp
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import uvicorn

from orchestrator import __version__
from orchestrator.api.app import build_app
from orchestrator.audit.run import Auditor
from orchestrator.config import DEFAULT_CONFIG, DaemonConfig, read_config
from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host.netlink import watch_links
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.lifecycle import SystemManager
from orchestrator.plan import Policy

_log = logging.getLogger("nohyped")

SOCKET_GROUP = "nohype"
_PAUSE = 5
_COLLECT = 60.0


@click.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), default=DEFAULT_CONFIG, show_default=True, help="Configuration file."
)
@click.version_option(__version__)
def main(path: Path) -> None:
    """The NoHype system manager. It takes requests on a Unix socket; `nohype` talks to it."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        serve(read_config(path))
    except OrchestratorError as error:
        sys.exit(f"nohyped: {error}")


def serve(config: DaemonConfig) -> None:
    """Runs the manager until it is told to end (SIGTERM, SIGINT). Guests go on running.

    Raises:
        OrchestratorError: the ledger, the hypervisor or the socket can't be had.
    """
    listener = open_socket(Path(config.paths.socket))
    host = HostRoot()
    hypervisor = Hypervisor()
    policy = Policy(config.host.housekeeping_cpus, config.host.uplinks, config.host.page, config.host.vfs_per_uplink)
    manager = SystemManager(
        host, hypervisor, Ledger(Path(config.paths.ledger)), policy,
        images=Path(config.paths.images), consoles=Path(config.paths.consoles),
    )  # fmt: skip
    hypervisor.watch_ends(lambda: _logged(manager.collect))
    manager.recover()
    # A PF that can't be put right must not keep the manager from stopping its guests.
    _logged(manager.keep_edge_mode)
    uplinks = frozenset(config.host.uplinks)
    threading.Thread(target=_watch_uplinks, args=(manager, uplinks), name="uplinks", daemon=True).start()
    threading.Thread(target=_collect_now_and_then, args=(manager,), name="collector", daemon=True).start()
    app = build_app(manager, Auditor(host, hypervisor, manager, config).run)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=5)
    )
    threading.Thread(target=_tell_systemd_when_up, args=(server,), daemon=True).start()
    _log.info("version %s serves %s", __version__, config.paths.socket)
    server.run(sockets=[listener])


def open_socket(path: Path) -> socket.socket:
    """The manager's Unix socket, for root and the group nohype (0660).

    Raises:
        HostError: another manager serves it, or the folder can't be written.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise HostError(f"another manager serves {path}", "one manager a host: `systemctl status nohyped`")
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made closed, then opened to the group: between bind and chmod nobody else can connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            os.chown(path, -1, grp.getgrnam(SOCKET_GROUP).gr_gid)
        except KeyError:
            _log.warning("there is no group %s: only root can use %s", SOCKET_GROUP, path)
        path.chmod(0o660)
        # Now, not when the server starts: a second manager must meet an answer while this one still recovers.
        listener.listen()
    except OSError as error:
        listener.close()
        raise HostError(f"cannot serve {path}", "run as root", error.errno or 0) from None
    return listener


def notify_systemd(state: str) -> None:
    """Tells systemd how we are (sd_notify(3)); nothing happens outside a unit of Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def _tell_systemd_when_up(server: uvicorn.Server) -> None:
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    notify_systemd("READY=1")


def _watch_uplinks(manager: SystemManager, uplinks: frozenset[str]) -> None:
    """A PF reset shows as its link going down and up; igb then has local switching on again."""

    def watch() -> None:
        for interface in watch_links():
            if interface in uplinks:
                _logged(manager.keep_edge_mode)

    while True:
        _logged(watch)
        time.sleep(_PAUSE)
        _logged(manager.keep_edge_mode)  # what was missed meanwhile


def _collect_now_and_then(manager: SystemManager) -> None:
    """Finds guests whose end nobody told: libvirt was being restarted when they ended."""
    while True:
        time.sleep(_COLLECT)
        _logged(manager.collect)


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
