"""Takes nodes out of use for new guests, and returns them to use."""

from __future__ import annotations

import time
from collections.abc import Sequence

from orchestrator.errors import Conflict, NotFound, OrchestratorError, RequestError
from orchestrator.fleet import slurm
from orchestrator.fleet.node import find_host
from orchestrator.fleet.slurm import CONTROLLER_SECONDS, SAVE_SECONDS
from orchestrator.waiting import wait_until

MAX_REASON = 200
_ATTEMPTS = 3
_PING_SECONDS = 10.0
_SILENT = "Not responding"


def select_nodes(name: str, nodes: Sequence[slurm.NodeState]) -> tuple[slurm.NodeState, ...]:
    """The node of this name, or all nodes of the host of this name. Raises NotFound."""
    exact = tuple(node for node in nodes if node.name == name)
    found = exact or tuple(node for node in nodes if find_host(node.name) == name)
    if not found:
        raise NotFound(f"the fleet does not have host {name}", "`nohype fleet hosts` shows all hosts")
    return found


def drain(name: str, reason: str) -> tuple[slurm.NodeState, ...]:
    """Guests that run there keep running; no other is started. Returns when the controller cannot forget it any more.

    Raises:
        NotFound: the fleet does not have the host.
        RequestError: the reason is empty, too long or has control characters.
        Forbidden: the caller may not change nodes.
        OrchestratorError: the controller forgot the request several times.
    """
    text = reason.strip()
    if not text or len(text) > MAX_REASON or not text.isprintable():
        raise RequestError(f"invalid reason {reason!r}", f"use 1 to {MAX_REASON} printable characters")
    nodes = select_nodes(name, slurm.read_nodes())
    for _ in range(_ATTEMPTS):
        for node in nodes:
            if not (node.is_drained and node.reason == text):
                slurm.update_node(node.name, "State=DRAIN", f"Reason={text}")
        time.sleep(SAVE_SECONDS)
        nodes = slurm.retry(lambda: select_nodes(name, slurm.read_nodes()), CONTROLLER_SECONDS)
        if all(node.is_drained for node in nodes):
            return nodes
    raise OrchestratorError(f"the controller forgot {_ATTEMPTS} times that host {name} is to be drained", "repeat the command")


def resume(name: str, *, force: bool = False) -> tuple[slurm.NodeState, ...]:
    """Returns nodes to use; those that are in use stay as they are. Returns the nodes as they are then.

    Args:
        force: also if the last health check of the host failed.

    Raises:
        NotFound: the fleet does not have the host.
        Conflict: a node does not respond, or its last health check failed; no node was changed.
        Forbidden: the caller may not change nodes.
    """
    nodes = [
        node for node in select_nodes(name, slurm.read_nodes()) if node.is_drained or node.state.startswith(("DOWN", "FAIL"))
    ]
    for node in nodes:
        if node.is_silent:
            hint = f"check `systemctl status slurmd` on the host and its network; then run `nohype fleet resume {name}`"
            raise Conflict(f"slurmd of {node.name} does not respond to the controller", hint)
        if node.check and not force:
            hint = (
                "repair the cause; the check is repeated every minute, and with "
                f"`SLURMD_NODENAME={node.name} /etc/slurm/nohype-check` on the host. --force skips it"
            )
            raise Conflict(f"the last health check of {node.name} failed: {node.check}", hint)
    for node in nodes:
        slurm.update_node(node.name, "State=RESUME")
    # Until slurmd responds to the controller again, Slurm starts nothing there.
    wait_until(lambda: all(node.responds for node in select_nodes(name, slurm.read_nodes())), timeout=_PING_SECONDS, interval=0.5)
    return select_nodes(name, slurm.read_nodes())


def return_to_service(name: str) -> None:
    """Returns a node to use that was down because slurmd did not respond, and responds again.

    Slurm itself does so if the reason is "Not responding" (ReturnToService=1). Slurm 24.11 keeps the reason of a former loss or
    drain until a guest starts there. If the node is lost before, it appends "Not responding", and leaves the node down.
    """
    for node in slurm.read_nodes(name):
        if node.state == "DOWN" and node.reason.split(" : ")[-1] == _SILENT:
            slurm.update_node(node.name, "State=RESUME")
