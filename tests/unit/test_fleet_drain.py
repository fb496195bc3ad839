"""Nodes are drained and resumed by the name of their host, and not resumed while their host cannot have guests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import Conflict, NotFound, OrchestratorError, RequestError
from orchestrator.fleet import drain, slurm
from orchestrator.host.run import Completed

NODE = slurm.NodeState("host1-n0", "IDLE", 3, 2, 1024, 4, (), "")
NODES = (
    NODE,
    replace(NODE, name="host1-n1"),
    replace(NODE, name="host1"),
    replace(NODE, name="host10-n0"),
    replace(NODE, name="b"),
)


class Controller:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: slurm.NodeState) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.forgets, self._saved = 0, dict(self.nodes)
        monkeypatch.setattr(slurm, "read_nodes", lambda name="": tuple(n for n in self.nodes.values() if name in ("", n.name)))
        monkeypatch.setattr(slurm, "update_node", self.update)
        monkeypatch.setattr(drain.time, "sleep", self.sleep)

    def update(self, name: str, *settings: str) -> None:
        values = dict(setting.split("=", 1) for setting in settings)
        state = {"DRAIN": "DRAINED", "RESUME": "IDLE"}[values["State"]]
        self.nodes[name] = replace(self.nodes[name], state=state, reason=values.get("Reason", ""))

    def sleep(self, _seconds: float) -> None:
        """The controller is killed as long as it is to forget."""
        if self.forgets:
            self.forgets -= 1
            self.nodes = dict(self._saved)

    def drained(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.is_drained]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("host1-n0", ["host1-n0"]), ("host1", ["host1"]), ("host10", ["host10-n0"]), ("b", ["b"])],
)
def test_node_or_all_nodes_of_a_host(monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]) -> None:
    controller = Controller(monkeypatch, *NODES)
    assert [node.name for node in drain.drain(name, "new disk")] == expected == controller.drained()
    drain.resume(name)
    assert controller.drained() == []


def test_host_with_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, *NODES[:2], *NODES[3:])
    assert all(node.reason == "new disk" for node in drain.drain("host1", " new disk "))
    assert controller.drained() == ["host1-n0", "host1-n1"]


def test_drain_is_repeated_until_the_controller_has_saved_it(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, NODE)
    controller.forgets = 2
    drain.drain("host1", "new disk")
    assert controller.drained() == ["host1-n0"]
    controller.forgets, controller.nodes = 3, {NODE.name: NODE}
    with pytest.raises(OrchestratorError, match="forgot 3 times that host host1"):
        drain.drain("host1", "new disk")


@pytest.mark.parametrize("name", ["host", "host1-n", "host1-n9", "host.*", ""])
def test_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Controller(monkeypatch, *NODES)
    with pytest.raises(NotFound, match="does not have host"):
        drain.drain(name, "new disk")
    with pytest.raises(NotFound, match="does not have host"):
        drain.resume(name)


@pytest.mark.parametrize("reason", ["", "  ", "a\nb", "x" * 201])
def test_bad_reason_is_refused(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    controller = Controller(monkeypatch, *NODES)
    with pytest.raises(RequestError, match="invalid reason"):
        drain.drain("b", reason)
    assert controller.drained() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"state": "DRAINED*"}, "slurmd of host1-n1 does not respond"), ({"state": "DRAINED", "check": "no manager"}, "no manager")],
)
def test_host_that_cannot_have_guests_is_not_resumed(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], message: str
) -> None:
    """Neither is its other node, which would be found in use after the error."""
    controller = Controller(monkeypatch, replace(NODE, state="DRAINED"), replace(NODES[1], **fields))
    with pytest.raises(Conflict, match=message):
        drain.resume("host1")
    assert len(controller.drained()) == 2


def test_failed_check_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, replace(NODE, state="DRAINED", check="no manager"))
    drain.resume("host1", force=True)
    assert controller.drained() == []


def test_result_of_the_health_check_is_read_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "|idle|1:3:2|1024|vf:4|sriov|Unknown|Unknown|none"
    names = {"a": "check failed: no manager | x", "b": "check passed", "c": "(null)", "d": "of an operator"}
    comments = "".join(f"{name:80}{comment:1024}\n" for name, comment in names.items())
    states = "".join(f"{name}{fields}\n" for name in names)

    def run(words: list[str], **_options: object) -> Completed:
        return Completed(0, comments if words[-1].startswith("--Format") else states, "")

    monkeypatch.setattr(slurm, "run", run)
    assert {node.name: node.check for node in slurm.read_nodes()} == {"a": "no manager | x", "b": None, "c": None, "d": None}


@pytest.mark.parametrize(
    ("state", "reason", "after"),
    [
        ("DOWN", "Not responding : Not responding", "IDLE"),
        ("DOWN*", "Not responding : Not responding", "DOWN*"),
        ("DOWN", "new disk : Not responding", "IDLE"),
        ("DOWN", "Not responding : new disk", "DOWN"),
        ("DOWN", "Node unexpectedly rebooted", "DOWN"),
        ("DOWN", "", "DOWN"),
        ("IDLE", "Not responding", "IDLE"),
        ("DRAINED", "Not responding", "DRAINED"),
    ],
)
def test_node_that_slurm_leaves_down_is_returned_to_service(
    monkeypatch: pytest.MonkeyPatch, state: str, reason: str, after: str
) -> None:
    """Recorded with Slurm 24.11.5, on a node that was lost twice."""
    controller = Controller(
        monkeypatch, replace(NODE, state=state, reason=reason), replace(NODES[1], state="DOWN", reason=reason)
    )
    drain.return_to_service(NODE.name)
    assert [node.state for node in controller.nodes.values()] == [after, "DOWN"], "only the node of the check"
