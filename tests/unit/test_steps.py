"""The registry of steps, and steps on their own.

Steps whose objects have gone meanwhile leave nothing to do, and do not prevent a release. Of steps that fail by themselves the
others are made, and an undo record is left exactly where something was changed.

What the steps do to VFs is tested with the network: tests/contract/test_host_net.py.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
from dataclasses import dataclass, replace
from errno import ENOSPC, EPERM
from pathlib import Path
from typing import ClassVar, cast

import pytest

from orchestrator import resources
from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.model.topology import VfState
from orchestrator.resources.cores import MoveIrq, MoveKernelThread
from orchestrator.resources.nic_settings import state_from_json, state_to_json
from orchestrator.resources.step import STEPS, Arguments, GuestContext, Step, UndoContext, register, try_steps, undo_steps
from orchestrator.values import CpuSet, MacAddress
from tests.fakes.root import FakeRoot, load_host
from tests.unit.test_ledger import make_plan

PLAN = make_plan(1)


def test_settings_of_a_lost_guest_are_not_restored() -> None:
    """A manager that lost its ledger left them: the VF would stay in the tenant's VLAN."""
    left = VfState(3, make_plan(1).vf.mac, vlan=100, max_rate=50, link_state="enable")
    assert state_from_json(3, state_to_json(left)) == VfState(3, link_state="enable")
    own = VfState(3, MacAddress("52:54:00:00:00:01"), vlan=100, max_rate=50)
    assert state_from_json(3, state_to_json(own)) == own


def test_a_thread_that_has_ended_needs_no_moving(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    step = MoveKernelThread(process.pid, "gone", CpuSet.of(os.sched_getaffinity(0)))
    assert step.read_before(HostRoot(tmp_path)) is None
    step.apply(HostRoot(tmp_path))


def test_moving_an_interrupt_changes_nothing_before_the_undo_record(tmp_path: Path) -> None:
    """What the kernel manages itself shows only at a write: that write comes after the record, and leaves none if refused."""
    host, ledger = load_host(tmp_path / "host", "numa"), Ledger(tmp_path / "ledger.sqlite")
    _add_irq(host, 24, "nic0-TxRx-0", "0-7")
    _add_irq(host, 25, "nvme0q1", "0-7")
    host.write_errors["proc/irq/25/smp_affinity_list"] = EPERM
    steps = [MoveIrq(24, "nic0-TxRx-0", CpuSet.parse("0")), MoveIrq(25, "nvme0q1", CpuSet.parse("0"))]
    before = [step.read_before(host) for step in steps]
    assert before == [
        {"number": 24, "name": "nic0-TxRx-0", "cpus": "0-7"},
        {"number": 25, "name": "nvme0q1", "cpus": "0-7"},
    ]
    assert host.writes == []

    recorded: list[int] = []
    host = replace(host, watch=lambda moment, _what: recorded.append(len(ledger.undo_records("host"))))
    changed, failed = try_steps(host, ledger, "host", steps)
    assert (len(changed), [step.number for step, _ in failed]) == (1, [25])
    assert recorded
    assert min(recorded) >= 1
    assert [record.arguments["number"] for record in ledger.undo_records("host")] == [24]


def _add_irq(host: FakeRoot, number: int, name: str, cpus: str) -> None:
    host.add(f"proc/irq/{number}/smp_affinity_list", cpus)
    host.add(f"sys/kernel/irq/{number}/actions", name)


@dataclass(frozen=True)
class SetFile:
    """Writes a file, and fails before or after that."""

    action: ClassVar[str] = "file"
    name: str
    fails: str = ""

    def describe(self) -> str:
        return f"set {self.name}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        if self.fails == "unreadable":
            raise HostError("cannot read it")
        text = host.read(self.name)
        return None if text == "new" else {"name": self.name, "text": text}

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        context.host.write(str(arguments["name"]), str(arguments["text"]))

    def apply(self, host: HostRoot) -> None:
        if self.fails == "before":
            raise HostError("refused", errno=ENOSPC)
        host.write(self.name, "new" if not self.fails else "odd")
        if self.fails == "after":
            raise HostError("clamped")


def test_steps_that_do_not_need_each_other(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text("old")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    steps = [SetFile("a", "before"), SetFile("b"), SetFile("c", "after"), SetFile("d", "unreadable"), SetFile("e")]
    changed, failed = try_steps(HostRoot(tmp_path), ledger, "host", steps)
    assert changed == ("set b", "set e")
    assert [(step.name, error.errno) for step, error in failed] == [("a", ENOSPC), ("c", 0), ("d", 0)]
    assert sorted(str(record.arguments["name"]) for record in ledger.undo_records("host")) == ["b", "c", "e"]
    (tmp_path / "b").write_text("old")  # something else keeps reverting it
    try_steps(HostRoot(tmp_path), ledger, "host", [SetFile("b")])
    assert len(ledger.undo_records("host")) == 3, "it is undone once"


def step_classes() -> dict[str, type[Step]]:
    """All classes of the package that have an action, by name."""
    return {
        f"{module.name}.{name}": found
        for module in pkgutil.iter_modules(resources.__path__, "orchestrator.resources.")
        for name, found in vars(importlib.import_module(module.name)).items()
        if inspect.isclass(found) and found.__module__ == module.name and "action" in vars(found)
    }


def test_all_steps_are_registered_under_their_own_action() -> None:
    classes = step_classes()
    assert len(classes) >= 6
    assert {found.action: found for found in classes.values()} == STEPS
    assert len(STEPS) == len(classes), "an action is used twice"


def test_stored_actions_keep_their_names() -> None:
    """Journals of earlier versions have them."""
    assert {"thread-affinity", "irq-affinity", "numvfs", "edge-mode", "vf-mac", "vf-driver", "pages"} <= set(STEPS)


def test_action_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match="two step classes have the action vf-mac"):
        register(type("Other", (SetFile,), {"action": "vf-mac"}))


def test_unknown_undo_action_is_reported_and_the_others_are_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, SetFile.action, SetFile)
    for name in ("old", "new"):
        (tmp_path / name).write_text("now")
    host, ledger = HostRoot(tmp_path), Ledger(tmp_path / "ledger.sqlite")
    for owner in ("web", "host"):
        ledger.add_undo_record(owner, "file", {"name": "old", "text": "was"})
        ledger.add_undo_record(owner, "teleport", {"to": "mars"})
        ledger.add_undo_record(owner, "file", {"name": "new", "text": "was"})
    with pytest.raises(
        HostError, match="cleanup of host is incomplete: unknown undo action teleport of the host: written by"
    ) as caught:
        undo_steps(UndoContext(host), ledger, "host")
    assert "start the version of nohyped that wrote it" in caught.value.hint
    with pytest.raises(HostError, match="unknown undo action teleport of guest web: written by another version"):
        undo_steps(UndoContext(host, GuestContext(PLAN, ledger, cast("Hypervisor", None))), ledger, "web")
    assert [record.action for owner in ("web", "host") for record in ledger.undo_records(owner)] == ["teleport", "teleport"]
    assert (tmp_path / "old").read_text() == (tmp_path / "new").read_text() == "was"


@pytest.mark.parametrize(
    ("action", "arguments", "says"),
    [
        ("thread-affinity", {"tid": "x", "name": "a", "cpus": "0"}, "tid: not of type int"),
        ("irq-affinity", {"number": 3, "cpus": "0"}, "name: missing"),
        ("numvfs", {"pf": "nowhere"}, "pf: 'nowhere' is not a PCI address"),
        ("edge-mode", {}, "pf: missing"),
        ("vf-mac", {"index": 0}, "interface: missing"),
        ("vf-driver", {"address": 7, "driver": ""}, "address: not text"),
    ],
)
def test_undo_record_that_cannot_be_read_is_an_error_of_its_owner(
    tmp_path: Path, action: str, arguments: dict[str, object], says: str
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_undo_record("host", action, arguments)
    with pytest.raises(HostError, match=f"cleanup of host is incomplete: the undo record .* cannot be read: {says}"):
        undo_steps(UndoContext(HostRoot(tmp_path)), ledger, "host")


def test_undo_record_of_a_later_version_may_have_more_fields(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_undo_record("host", "numvfs", {"pf": "0000:41:00.0", "count": 2, "more": True})
    undo_steps(UndoContext(HostRoot(tmp_path)), ledger, "host")
    assert ledger.undo_records("host") == ()
