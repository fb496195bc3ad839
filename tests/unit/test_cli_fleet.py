"""The commands of `nohype fleet` that print and wait; Slurm's answers are given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli.main import nohype
from orchestrator.errors import GuestError, RequestError
from orchestrator.fleet import batch, follow, slurm, submit
from orchestrator.fleet import wish as wishes
from orchestrator.fleet.job import Job
from orchestrator.fleet.journal import Entry

JOB = Job(
    7, "RUNNING", "host1-n0", "web", "", "order-1", "", "2026-11-27T09:40:00Z", "2026-11-27T09:40:01Z", "",
    (Entry("2026-11-27T09:40:02Z", "ready", "\x1b[2J"),), "acme",
)  # fmt: skip
NODE = slurm.NodeState("host1-n0", "DRAINED", 3, 2, 1024, 4, ("sriov",), "new disk", "root", "2026-11-27T09:31:16Z", "no manager")
REQUEST = ("fleet", "submit", "web", "--memory", "64M", "--image", "minimal", "--id", "order-1")


@pytest.fixture(autouse=True)
def fleet(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the work was called with."""
    called: dict[str, Any] = {}
    monkeypatch.setattr(slurm, "read_jobs", lambda name="": (JOB,))
    monkeypatch.setattr(slurm, "read_nodes", lambda: (NODE,))
    monkeypatch.setattr(slurm, "read_all_jobs", lambda: ())
    monkeypatch.setattr(
        submit, "submit", lambda wish, *quota: called.update(wish=wish, quota=quota) or replace(JOB, state="PENDING")
    )
    monkeypatch.setattr(submit, "cancel", lambda *_names: (replace(JOB, state="COMPLETING"),))
    monkeypatch.setattr(follow, "wait_ready", lambda *words: called.update(wait=words) or JOB)
    monkeypatch.setattr(follow, "wait_ended", lambda *words: called.update(wait=words) or (replace(JOB, state="CANCELLED"),))
    return called


def run(*words: str) -> Result:
    return CliRunner().invoke(nohype, words)


def test_submit_waits_only_if_asked(fleet: dict[str, Any]) -> None:
    assert "state:     pending" in run(*REQUEST).output
    assert "wait" not in fleet
    assert "state:     running" in run(*REQUEST, "--wait", "--timeout", "9").output
    assert fleet["wait"] == ("web", "order-1", 9)
    run(*REQUEST, "--wait")
    assert fleet["wait"] == ("web", "order-1", None)


def test_cancel_waits_only_if_asked(fleet: dict[str, Any]) -> None:
    assert run("fleet", "cancel", "web").output == "guest web is being ended\n"
    assert "wait" not in fleet
    assert run("fleet", "cancel", "web", "--wait").output == "guest web has ended\n"
    assert json.loads(run("fleet", "cancel", "web", "--wait", "--json").output)[0]["state"] == "CANCELLED"


def test_cancel_of_a_guest_that_has_ended_does_not_state_that_it_is_being_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "cancel", lambda *_names: (replace(JOB, state="CANCELLED"), replace(JOB, name="b")))
    assert run("fleet", "cancel", "web", "b").output == "guest web has ended\nguest b is being ended\n"


@pytest.mark.parametrize("words", [REQUEST, ("fleet", "cancel", "web")])
def test_timeout_requires_wait(words: tuple[str, ...], fleet: dict[str, Any]) -> None:
    result = run(*words, "--timeout", "9")
    assert (result.exit_code, "--timeout requires --wait" in result.output) == (2, True)
    assert not fleet


BATCH = '[{"name": "a", "memory": "64M", "image": "minimal"}, {"name": "b", "id": "mine", "memory": "64M", "image": "minimal"}]'


def run_batch(monkeypatch: pytest.MonkeyPatch, text: bytes | str, *words: str) -> Result:
    def submit_batch(wishes: tuple[wishes.Wish, ...], *_: object, **__: object) -> tuple[batch.Outcome, ...]:
        first, *others = (batch.Outcome(wish.request.name, wish.guest_id, 1, "PENDING") for wish in wishes)
        return (first, *(replace(one, job=0, state="", error="no room") for one in others))

    monkeypatch.setattr(batch, "submit_batch", submit_batch)
    return CliRunner().invoke(nohype, ["fleet", "submit-all", "-", *words], input=text, standalone_mode=False)


def test_batch_shows_an_outcome_per_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_batch(monkeypatch, BATCH, "--id", "run-1", "--json")
    shown = json.loads(result.stdout)
    assert [(one["name"], one["guest_id"], one["error"]) for one in shown] == [("a", "run-1:a", ""), ("b", "mine", "no room")]
    assert result.return_value == 1
    assert result.stderr == "to repeat the command: --id run-1\n"


def test_batch_invents_a_prefix_of_ids_and_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_batch(monkeypatch, BATCH, "--json")
    prefix = result.stderr.split()[-1]
    assert json.loads(result.stdout)[0]["guest_id"] == f"{prefix}:a"
    assert run_batch(monkeypatch, BATCH, "--json").stderr.split()[-1] != prefix


def test_empty_id_is_refused(monkeypatch: pytest.MonkeyPatch, fleet: dict[str, Any]) -> None:
    """Such as that of a variable that is not set: a new id for each command would start the guests again."""
    assert "--id is empty" in str(run_batch(monkeypatch, BATCH, "--id", "").exception)
    assert "is not an id" in str(run(*REQUEST, "--id", "").exception)
    assert not fleet


def test_batch_can_begin_with_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(json.loads(run_batch(monkeypatch, BATCH.encode("utf-8-sig"), "--json").stdout)) == 2


def test_batch_without_quota_is_not_to_be_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run_batch(monkeypatch, BATCH, "--tenant", "acme", "--quotas", str(tmp_path / "absent"))
    assert (type(result.exception), result.stderr) == (RequestError, "")


@pytest.mark.parametrize("text", [b"\xff", "{}", "[1]"])
def test_batch_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, text: bytes | str) -> None:
    assert isinstance(run_batch(monkeypatch, text).exception, RequestError)


def test_failed_wait_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise GuestError("guest web has ended")

    monkeypatch.setattr(follow, "wait_ready", fail)
    assert isinstance(run(*REQUEST, "--wait").exception, GuestError)  # `main` prints it, with exit status 1


def test_constraints_reach_the_wish(fleet: dict[str, Any], tmp_path: Path) -> None:
    (file := tmp_path / "quotas.toml").write_text("[tenants.acme]\ncores = 3\n")
    words = ("--feature", "rack-1", "--minutes", "5", "--anti-affinity", "web", "--deadline", "2030-01-31T18:00Z")
    assert run(*REQUEST, *words, "--tenant", "acme", "--quotas", str(file)).exit_code == 0
    wish, (quota,) = fleet["wish"], fleet["quota"]
    assert (wish.features, wish.minutes, wish.group, wish.deadline) == (("rack-1",), 5, "web", "2030-01-31T18:00:00Z")
    assert (wish.tenant, quota.cores) == ("acme", 3)
    run(*REQUEST)
    assert (fleet["wish"].tenant, fleet["quota"]) == ("", ())


def test_json_of_all_commands_has_the_same_fields() -> None:
    shown = json.loads(run("fleet", "show", "web", "--json").output)
    assert [shown] == json.loads(run("fleet", "list", "--json").output)
    assert shown == json.loads(run(*REQUEST, "--wait", "--json").stdout)
    assert shown.keys() == json.loads(run("fleet", "cancel", "web", "--json").output)[0].keys()


def test_text_of_a_guest_cannot_control_the_terminal() -> None:
    assert "\\x1b[2J" in run("fleet", "logs", "web").output


def test_hosts_show_reason_and_check() -> None:
    assert "2026-11-27T09:31:16Z  root  new disk; check failed: no manager" in run("fleet", "hosts").output
    assert json.loads(run("fleet", "hosts", "--json").output)[0]["check"] == "no manager"
