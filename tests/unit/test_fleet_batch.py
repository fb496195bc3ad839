"""Many guests at once: all are checked before the first is submitted, each is submitted once, and the quota holds."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.errors import CommandError, Conflict, NoRoom, NotFound, OrchestratorError, QuotaExceeded, RequestError
from orchestrator.fleet import again, batch, follow, slurm, submit
from orchestrator.fleet.job import Job
from orchestrator.fleet.quota import Quota
from tests.harness.played_slurm import Controller

REQUEST = {"memory": "256M", "image": "minimal"}


def write(*names: str, **more: Any) -> str:
    return json.dumps([{"name": name, **REQUEST, **more} for name in names])


def names_of(controller: Controller) -> list[str]:
    return sorted(job.name for job in controller.jobs if not job.has_ended)


def test_batch_has_all_constraints() -> None:
    more = {"features": ["rack-1"], "minutes": 5, "anti_affinity": "web", "deadline": "2030-01-31T18:00Z", "requeue": True}
    (wish,) = batch.read_batch(write("a", **more), "run-1", "acme")
    assert (wish.features, wish.minutes, wish.group, wish.requeue) == (("rack-1",), 5, "web", True)
    assert (wish.deadline, wish.tenant, wish.guest_id) == ("2030-01-31T18:00:00Z", "acme", "run-1:a")
    assert wish.request.memory == "256M"


def test_ids_of_the_file_are_kept_and_others_are_new() -> None:
    text = json.dumps([{"name": "a", "id": "mine", **REQUEST}, {"name": "b", **REQUEST}])
    assert [wish.guest_id for wish in batch.read_batch(text, "run-1")] == ["mine", "run-1:b"]
    assert len(batch.read_batch(text)[1].guest_id) == 36


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", "the guests are not JSON"),
        ("[]", "not a JSON list with at least one element"),
        ('{"name": "a"}', "not a JSON list"),
        ('["a"]', "guest 1: not an object"),
        (write("a", "b", "a"), "name a is given to several guests"),
        (write("a", "b", id="same"), "id same is given to several guests"),
        (write("a", minutes="5"), r"guest 1 \(a\): minutes"),
        (write("a", minutes=0), r"guest 1 \(a\): minutes is 0"),
        (write("a", minutes=True), r"guest 1 \(a\): minutes"),
        (write("a", features="rack"), r"guest 1 \(a\): features"),
        (write("a", deadline="soon"), r"guest 1 \(a\): 'soon' is not a time"),
        (write("a", colour="red"), r"guest 1 \(a\): .*colour"),
        (write("A b"), r"guest 1 \(A b\): .*name"),
        (json.dumps([REQUEST]), "guest 1: .*name"),
        (write("a", id=""), r"guest 1 \(a\): .*'' is not an id"),
        (write("a", id=0), r"guest 1 \(a\): .*id"),
        (write("a", id=[]), r"guest 1 \(a\): .*id"),
        ("[" * 100_000, "the guests are not JSON: nested too deeply"),
        ('[{"name": "a", "features": ' + "[" * 5000 + "]" * 5000 + "}]", "the guests are not JSON: nested too deeply"),
        ('[{"name": "a", "memory": "1G", "memory": "2G"}]', "not JSON: an object has the field 'memory' twice"),
        ('[{"name": "a", "minutes": ' + "9" * 5000 + "}]", "not JSON: the number 99999999999999999999... is too long"),
    ],
)
def test_invalid_batch_names_the_element(text: str, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        batch.read_batch(text, "run-1")


@pytest.mark.parametrize("name", ["a\nnohype: all guests were submitted", "a" * 10_000])
def test_message_has_one_line_and_is_short(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        batch.read_batch(write(name, minutes=5), "run-1")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000
    assert caught.value.message.startswith("guest 1: ")


def test_guests_are_submitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    wishes = batch.read_batch(write("a", "b", "c"), "run-1")
    outcomes = batch.submit_batch(wishes)
    assert [(one.name, one.guest_id, one.state, one.error) for one in outcomes] == [
        (name, f"run-1:{name}", "PENDING", "") for name in "abc"
    ]
    assert batch.submit_batch(wishes) == outcomes
    assert batch.submit_batch(batch.read_batch(write("a", "b", "c", "d"), "run-1"))[:3] == outcomes
    assert names_of(controller) == ["a", "b", "c", "d"]


def test_only_guests_that_have_ended_are_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others keep their ids, and are neither released nor cancelled. A guest of another tenant is another guest."""
    controller = Controller(monkeypatch)
    batch.submit_batch(batch.read_batch(write("runs", "ended", "ending", "held"), "run-1"))
    numbers = {job.name: job.number for job in controller.jobs}  # several threads submit them, in any order
    controller.change(numbers["ended"], state="COMPLETED")
    controller.change(numbers["ending"], state="COMPLETING")
    controller.change(numbers["held"], is_held=True)
    controller.accept(["--job-name=runs", "--comment=run-0:runs"], "")  # of a caller that was interrupted
    before = list(controller.jobs)
    wishes = batch.read_batch(write("runs", "ended", "ending", "held"), "run-2")
    for _ in range(2):
        outcomes = batch.submit_batch(wishes, only_ended=True)
        assert [one.guest_id for one in outcomes] == ["run-1:runs", "run-2:ended", "run-1:ending", "run-1:held"]
        assert [bool(one.error) for one in outcomes] == [False, False, True, False]
        assert controller.jobs[:-1] == before
    controller.change(controller.jobs[-1].number, state="COMPLETED")
    with pytest.raises(Conflict, match="its id run-2:ended cannot be used again"):
        batch.submit_batch(wishes, only_ended=True)
    with pytest.raises(NotFound, match="does not know guest new"):
        batch.submit_batch(batch.read_batch(write("runs", "new"), "run-3"), only_ended=True)
    with pytest.raises(NotFound, match="does not know guest runs"):
        batch.submit_batch(batch.read_batch(write("runs"), "run-3", "acme"), only_ended=True)
    with pytest.raises(Conflict, match="another guest runs"):
        batch.submit_batch(wishes)
    assert len(controller.jobs) == len(before) + 1


REFUSED = "a guest with this id was already started on h1; the controller does not know"


@pytest.mark.parametrize(
    ("fields", "waits"),
    [
        ({"state": "CANCELLED", "node": "h2", "note": REFUSED}, True),  # the host ends the start that the controller forgot
        ({"state": "NODE_FAIL", "node": "h1"}, False),
    ],
)
def test_guest_that_can_still_run_is_not_submitted_again(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], *, waits: bool
) -> None:
    controller, slept = Controller(monkeypatch), list[float]()
    monkeypatch.setattr(again.time, "sleep", slept.append)
    batch.submit_batch(batch.read_batch(write("a"), "run-1"))
    slept.clear()
    controller.change(1, **fields, ended=datetime.now(UTC).isoformat())
    wishes = batch.read_batch(write("a"), "run-2")
    (node,) = slurm.read_nodes()
    monkeypatch.setattr(slurm, "read_nodes", lambda: (node, replace(node, name="h1", state="IDLE*")))
    with pytest.raises(Conflict, match="guest a may still run on h1"):
        batch.submit_batch(wishes, only_ended=True)
    assert not slept
    monkeypatch.setattr(slurm, "read_nodes", lambda: (node, replace(node, name="h1")))
    assert batch.submit_batch(wishes, only_ended=True)[0].guest_id == "run-2:a"
    assert (submit.ORPHAN_SECONDS - 10 < slept[0] <= submit.ORPHAN_SECONDS) == waits
    assert names_of(controller) == ["a"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (write("a", "b", cores=100), NoRoom),
        (write("a", "b", features=["gpu"]), NoRoom),
        (write("a", "b", deadline="2020-01-31T18:00Z"), RequestError),
        (write("a", "taken"), Conflict),
        (write("a", id="another"), Conflict),
    ],
)
def test_no_guest_is_submitted_if_one_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception]) -> None:
    controller = Controller(monkeypatch)
    controller.accept(["--job-name=taken", "--comment=another"], "")
    with pytest.raises(error):
        batch.submit_batch(batch.read_batch(text))
    assert names_of(controller) == ["taken"]


def test_quota_holds_for_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    wishes = batch.read_batch(write("a", "b", "c"), "run-1", "acme")
    with pytest.raises(QuotaExceeded, match="3 of 2 cores"):
        batch.submit_batch(wishes, Quota(cores=2))
    assert names_of(controller) == []
    assert not [one.error for one in batch.submit_batch(wishes, Quota(cores=3)) if one.error]
    assert sorted(controller.released()) == ["a", "b", "c"]


def test_guest_beyond_the_quota_because_of_another_command_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    wishes = batch.read_batch(write("a", "b"), "run-1", "acme")
    check = batch.check_quota
    calls: list[object] = []

    def check_and_let_another_in(*words: Any) -> None:
        check(*words)
        if not calls:
            controller.accept(["--job-name=other", "--comment=other", "--account=acme"], "")
        calls.append(words)

    monkeypatch.setattr(batch, "check_quota", check_and_let_another_in)
    first, second = sorted(batch.submit_batch(wishes, Quota(cores=2)), key=lambda one: one.error)
    assert not first.error
    assert "quota of tenant acme exceeded" in second.error
    assert second.job == 0
    assert sorted(controller.released()) == sorted([first.name, "other"])


def test_guest_that_cannot_be_withdrawn_is_not_called_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    controller.accept(["--job-name=other", "--comment=other", "--account=acme"], "")
    check, cancelled = batch.check_quota, []
    (wish,) = batch.read_batch(write("a"), "run-1", "acme")

    def cancel(numbers: list[int]) -> None:
        cancelled.append(list(numbers))
        if len(cancelled) == 1:
            raise CommandError("scancel: error")
        controller.cancel(numbers)

    monkeypatch.setattr(slurm, "cancel_jobs", cancel)
    monkeypatch.setattr(batch, "check_quota", lambda *words: check(*words) if controller.jobs[1:] else None)
    (outcome,) = batch.submit_batch([wish], Quota(cores=1))
    assert "quota of tenant acme exceeded" in outcome.error
    assert cancelled == [[2], [2]]
    assert names_of(controller) == ["other"]


def test_release_that_the_controller_forgets_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    controller.forgets = 1
    assert not any(one.error for one in batch.submit_batch(batch.read_batch(write("a", "b"), "x", "acme"), Quota()))
    assert sorted(controller.released()) == ["a", "b"]


def test_error_of_one_guest_is_its_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)

    def refuse(options: list[str], script: str) -> int:
        if "--job-name=b" in options:
            raise CommandError("sbatch: the disk is full", "repeat the command with --id run-1:b")
        return controller.accept(options, script)

    monkeypatch.setattr(slurm, "submit_job", refuse)
    first, second = batch.submit_batch(batch.read_batch(write("a", "b"), "run-1"))
    assert (first.error, second.job) == ("", 0)
    assert second.error == "sbatch: the disk is full", "the hint is for `submit`: --id of a batch is a prefix"
    assert names_of(controller) == ["a"]


def test_controller_that_is_lost_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not each guest after a minute."""
    controller = Controller(monkeypatch)
    asked: list[str] = []

    def lose(*words: Any) -> Any:
        asked.append(str(words))
        monkeypatch.setattr(slurm, "read_jobs", lose)
        raise slurm.Unreachable("no response")

    monkeypatch.setattr(slurm, "submit_job", lose)
    monkeypatch.setattr(slurm, "CONTROLLER_SECONDS", 0.0)
    monkeypatch.setattr(submit, "CONTROLLER_SECONDS", 0.0)
    names = [f"g{number}" for number in range(100)]
    with pytest.raises(CommandError, match="it is not known which of the guests were submitted") as caught:
        batch.submit_batch(batch.read_batch(write(*names), "run-1"))
    assert "the same --id" in caught.value.hint
    assert len(asked) < 50
    assert controller.jobs == []


def test_guest_that_was_refused_at_its_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that the controller has started and forgotten: it is not started again under its id."""
    controller = Controller(monkeypatch)
    wishes = batch.read_batch(write("a", "b", "c"), "run-1")
    batch.submit_batch(wishes)
    controller.change(1, state="CANCELLED", note="the guest was already started on host1")
    controller.change(2, state="CANCELLED")  # by an operator
    errors = {one.job: one.error for one in batch.submit_batch(wishes)}
    assert errors == {1: "the guest was already started on host1", 2: "", 3: ""}


def test_repeated_batch_returns_when_the_guests_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was interrupted has submitted them just now."""
    controller = Controller(monkeypatch)
    wishes = batch.read_batch(write("a", "b"), "run-1")
    batch.submit_batch(wishes)
    slept: list[float] = []
    monkeypatch.setattr(batch.time, "sleep", slept.append)
    controller.change(1, submitted="2026-01-31T18:00:00Z")
    batch.submit_batch(wishes)
    assert slept == []
    controller.change(2, submitted=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    batch.submit_batch(wishes)
    assert slept == [slurm.SAVE_SECONDS]


def test_forgotten_guest_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] == slurm.SAVE_SECONDS:  # it is killed before it has saved them
            controller.jobs = [job for job in controller.jobs if job.name != "b"]

    monkeypatch.setattr(submit.time, "sleep", sleep)
    monkeypatch.setattr(submit.time, "monotonic", lambda: clock[0])
    assert [one.error for one in batch.submit_batch(batch.read_batch(write("a", "b"), "run-1"))] == ["", ""]
    assert clock[0] >= submit.ORPHAN_SECONDS
    assert names_of(controller) == ["a", "b"]


def test_wait_reports_the_error_of_each_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def wait(guests: list[tuple[str, str]], seconds: float | None) -> tuple[Job | OrchestratorError, ...]:
        asked.append((guests, seconds))
        return (Job(1, "RUNNING", "host1", "a", "", "x:a"), NoRoom("guest b has ended", ()))

    monkeypatch.setattr(batch, "wait_all_ready", wait)
    given = [batch.Outcome(name, f"x:{name}", 1, "PENDING", "refused" if name == "c" else "") for name in "abc"]
    first, second, third = batch.wait_batch(given, 9)
    assert (first.state, first.error) == ("RUNNING", "")
    assert "guest b has ended" in second.error
    assert third == given[2]
    assert asked == [([("a", "x:a"), ("b", "x:b")], 9)]


def test_wait_for_several_has_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(slurm, "read_jobs", lambda name: (Job(1, "PENDING", "", name, "", name),))
    results = follow.wait_all_ready([("a", "a"), ("b", "b")], 10)
    assert all("timed out after 10 s" in str(result) for result in results)
    assert clock[0] < 12
