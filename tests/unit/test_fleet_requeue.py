"""Guests of a lost host are started elsewhere once, and only if the host does not respond and their policy allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CommandError, Conflict, NoRoom, NotFound, OrchestratorError
from orchestrator.fleet import requeue, slurm
from orchestrator.fleet import wish as wishes
from orchestrator.fleet.job import Job
from orchestrator.fleet.quota import Quota

NODES = """\
host1-n0|{state}|1:3:2|1024|vf:4|sriov,pages-2M|Not responding
host1-n1|down*|1:4:2|2048|vf:4|sriov,pages-2M|Not responding
host1-n1x|idle|1:4:2|2048|vf:4|sriov,pages-2M|none
host2|idle|1:2:1|512|vf:1|sriov,pages-2M|none
"""
QUOTAS = Path("/nonexistent")
FIELDS: dict[str, Any] = {"name": "web", "memory": "256M", "image": "minimal", "id": "order-1"}


class Fleet:
    """What Slurm knows: ``scripts`` of jobs by their number, and the guests that were submitted again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, state: str = "down*") -> None:
        self.jobs: list[Job] = []
        self.scripts: dict[int, str] = {}
        self.submitted: list[wishes.Wish] = []
        self.quotas: list[Quota] = []
        self.refused: set[str] = set()
        monkeypatch.setattr(slurm, "read_nodes", lambda: tuple(slurm.parse_nodes(NODES.format(state=state))))
        monkeypatch.setattr(slurm, "read_jobs", lambda: tuple(self.jobs))
        monkeypatch.setattr(slurm, "read_script", self.scripts.__getitem__)
        monkeypatch.setattr(requeue, "submit", self.submit)
        monkeypatch.setattr(requeue, "END_SECONDS", 0)

    def add(self, name: str, node: str, state: str = "NODE_FAIL", *, allowed: bool = True, **more: Any) -> int:
        wish = wishes.read_wish({**FIELDS, "name": name, "id": f"id-{name}"}, ["rack-1"], 90, requeue=allowed, **more)
        number = len(self.jobs) + 1
        self.jobs.append(Job(number, state, node, name, "", wish.guest_id, ""))
        self.scripts[number] = wishes.build_script(wish)
        return number

    def submit(self, wish: wishes.Wish, quota: Quota) -> Job:
        if wish.request.name in self.refused:
            raise NoRoom("no host", (), "add a host")
        self.submitted.append(wish)
        self.quotas.append(quota)
        self.jobs.append(Job(90 + len(self.submitted), "PENDING", "", wish.request.name, "", wish.guest_id, ""))
        return self.jobs[-1]


def test_lost_guests_are_submitted_again_once_with_all_that_was_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.add("web", "host1-n0")
    fleet.add("db", "host1-n1", allowed=False)
    fleet.add("other", "host2")
    fleet.add("old", "host1-n1", "COMPLETED")
    outcomes = requeue.requeue("host1", QUOTAS)
    assert [(one.name, one.job, one.outcome) for one in outcomes] == [
        ("web", 91, "requeued as job 91"),
        ("db", 0, "not requeued: submitted without --requeue"),
    ]
    [wish] = fleet.submitted
    assert (wish.features, wish.minutes, wish.requeue) == (("rack-1",), 90, True)
    assert wish.fields == {**FIELDS, "id": requeue.derive_id("id-web")}
    assert requeue.requeue("host1", QUOTAS)[0].outcome == "already requeued as job 91"
    assert len(fleet.submitted) == 1


def test_group_deadline_and_quota_of_the_tenant_apply_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fleet = Fleet(monkeypatch)
    fleet.add("web", "host1-n0", group="web", deadline="2030-01-31T18:00Z", tenant="acme")
    fleet.add("db", "host1-n0", tenant="gone")
    quotas = tmp_path / "fleet.toml"
    quotas.write_text("[tenants.acme]\ncores = 3\n")
    first, second = requeue.requeue("host1", quotas)
    assert (first.failed, second.failed) == (False, True)
    assert "does not have the tenant gone" in second.outcome
    [wish] = fleet.submitted
    assert (wish.group, wish.deadline, wish.tenant) == ("web", "2030-01-31T18:00:00Z", "acme")
    assert fleet.quotas == [Quota(cores=3)]


def test_guest_that_an_interrupted_requeue_has_left_held_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`submit` finds its job, and releases it."""
    fleet = Fleet(monkeypatch)
    fleet.add("web", "host1-n0")
    fleet.jobs.append(Job(50, "PENDING", "", "web", "", requeue.derive_id("id-web"), is_held=True))
    requeue.requeue("host1", QUOTAS)
    assert [wish.guest_id for wish in fleet.submitted] == [requeue.derive_id("id-web")]


def test_guest_that_was_withdrawn_after_the_requeue_is_reported_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.add("web", "host1-n0")
    fleet.jobs.append(Job(50, "CANCELLED", "", "web", "", requeue.derive_id("id-web"), is_held=True))
    [found] = requeue.requeue("host1", QUOTAS)
    assert found.outcome == "already requeued as job 50, which has ended (cancelled)"
    assert not fleet.submitted


def test_guest_of_a_host_that_is_lost_too_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.add("web", "host1-n0")
    requeue.requeue("host1", QUOTAS)
    fleet.jobs[-1] = Job(91, "NODE_FAIL", "host1-n1", "web", "", fleet.submitted[0].guest_id, "")
    fleet.scripts[91] = wishes.build_script(fleet.submitted[0])
    ended = "already requeued as job 91, which has ended (node_fail)"
    assert [one.outcome for one in requeue.requeue("host1", QUOTAS)] == [ended, "requeued as job 92"]
    assert len({wish.guest_id for wish in fleet.submitted}) == 2


@pytest.mark.parametrize("state", ["idle", "mixed", "down", "drained"])
def test_host_that_responds_is_not_off(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    fleet = Fleet(monkeypatch, state=state)
    fleet.add("web", "host1-n0")
    with pytest.raises(Conflict, match="host host1 is not off: slurmd responds to the controller on host1-n0"):
        requeue.requeue("host1", QUOTAS)
    assert not fleet.submitted


def test_host_whose_other_node_responds_is_not_off(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, state="idle")
    fleet.add("web", "host1-n1")
    with pytest.raises(Conflict, match="host1-n1 is not off: slurmd responds to the controller on host1-n0"):
        requeue.requeue("host1-n1", QUOTAS)
    assert not fleet.submitted


def test_loss_that_slurm_has_not_noticed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.add("web", "host1-n0", "RUNNING")
    with pytest.raises(OrchestratorError, match="has not noticed the loss of host1: web"):
        requeue.requeue("host1", QUOTAS)
    assert not fleet.submitted


def test_error_of_one_guest_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    for name in ("a", "b", "c"):
        fleet.add(name, "host1-n0")
    fleet.refused = {"a"}
    fleet.scripts[2] = "#!/bin/sh\nsleep 1\n"
    found = requeue.requeue("host1", QUOTAS)
    assert [one.failed for one in found] == [True, True, False]
    assert "no host" in found[0].outcome
    assert "the job script is not that of a guest of the fleet" in found[1].outcome


def test_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Fleet(monkeypatch)
    with pytest.raises(NotFound, match="does not have host host3"):
        requeue.requeue("host3", QUOTAS)


@pytest.mark.parametrize("text", ["", "{}", '# nohype: {"wings": 2}\n{}', "# nohype: x\n{}", '# nohype: {}\n{"name": "web"}'])
def test_script_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="not that of a guest"):
        requeue.parse_script(text)
