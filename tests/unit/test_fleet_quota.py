"""The quota of a tenant over all hosts holds for guests that are submitted at the same time, and when the controller forgets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import Conflict, NotFound, OrchestratorError, QuotaExceeded, RequestError
from orchestrator.fleet import slurm, submit
from orchestrator.fleet import wish as wishes
from orchestrator.fleet.job import Job
from orchestrator.fleet.quota import Quota, check_quota, read_quota
from orchestrator.fleet.slurm import Use
from tests.harness.played_slurm import NODE, Controller

FIELDS: dict[str, Any] = {"memory": "256M", "image": "minimal"}
FILE = '[tenants.acme]\ncores = 4\nmemory = "1G"\nvfs = 2\n[tenants.free]\n'


def submit_guest(name: str, quota: Quota) -> Job:
    return submit.submit(wishes.read_wish({**FIELDS, "name": name, "id": name}, tenant="acme"), quota)


def test_guest_within_the_quota_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    assert not submit_guest("a", Quota(cores=1)).is_held
    assert controller.released() == ["a"]


def test_guest_beyond_the_quota_is_not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    submit_guest("a", Quota(cores=1))
    with pytest.raises(QuotaExceeded, match="quota of tenant acme exceeded\n  - 2 of 1 cores"):
        submit_guest("b", Quota(cores=1))
    assert [job.name for job in controller.jobs] == ["a"]
    controller.change(1, state="COMPLETED")
    submit_guest("b", Quota(cores=1))  # with the same id
    assert controller.released() == ["b"]


@pytest.mark.parametrize("seed", range(20))
def test_guests_that_are_submitted_at_the_same_time_never_exceed_the_quota(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """While a caller submits, others submit too, before and after its guest has a number."""
    controller, rng = Controller(monkeypatch), random.Random(seed)
    left, results = [f"guest{number}" for number in range(6)], dict[str, str]()

    def run(name: str) -> None:
        try:
            submit_guest(name, Quota(vfs=3))
            results[name] = "released"
        except QuotaExceeded:
            results[name] = "refused"

    def others(*_: object) -> tuple[slurm.NodeState, ...]:
        assert len(controller.released()) <= 3
        while left and rng.random() < 0.6:
            run(left.pop())
        return (NODE,)

    monkeypatch.setattr(slurm, "read_nodes", others)  # before the guest is submitted
    monkeypatch.setattr(submit.time, "sleep", others)  # after it
    while left:
        run(left.pop())
    released = sorted(name for name, result in results.items() if result == "released")
    assert sorted(controller.released()) == released
    assert len(released) == 3


def test_release_that_is_forgotten_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    controller.forgets = 2
    submit_guest("a", Quota())
    assert controller.released() == ["a"]
    controller.forgets = 3
    with pytest.raises(OrchestratorError, match="forgot 3 times that guest b may start"):
        submit_guest("b", Quota())
    submit_guest("b", Quota())  # a repetition with the same id goes on
    assert controller.released() == ["a", "b"]


def test_guest_that_an_operator_holds_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    controller.accept(["--job-name=a", "--comment=a", "--hold"], "")
    with pytest.raises(Conflict, match="guest a of the operators is held"):
        submit_guest("a", Quota())
    assert controller.released() == []


def test_each_limit_is_checked() -> None:
    own, others = Use(0, 2, 512, 1), [Use(1, 1, 512, 1), Use(2, 1, 256, 0)]
    check_quota("acme", Quota(cores=4, memory="1280M", vfs=2), own, others)
    check_quota("acme", Quota(), own, others)
    with pytest.raises(QuotaExceeded) as caught:
        check_quota("acme", Quota(cores=3, memory="1G", vfs=1), own, others)
    assert caught.value.reasons == ("4 of 3 cores", "1280 of 1024 MiB of memory", "2 of 1 VFs")


def test_uses_are_read() -> None:
    rows = [
        ("1", "2", "64M", "gres:vf:2,gres:apart1:1"),
        ("2", "1", "1G", "N/A"),
        ("3", "4", "1536M", "gres/apart1:1,gres/vf:1"),
    ]
    text = "".join(f"{number:20}{cores:20}{memory:20}{gres:1000}\n" for number, cores, memory, gres in rows)
    assert list(slurm.parse_uses(text)) == [Use(1, 2, 64, 2), Use(2, 1, 1024, 0), Use(3, 4, 1536, 1)]


def test_quota_is_read(tmp_path: Path) -> None:
    (path := tmp_path / "fleet.toml").write_text(FILE)
    assert read_quota(path, "acme") == Quota(cores=4, memory="1G", vfs=2)
    assert read_quota(path, "free") == Quota()
    with pytest.raises(NotFound, match="does not have the tenant other"):
        read_quota(path, "other")
    with pytest.raises(RequestError, match="not the name of a tenant"):
        read_quota(path, "a,b")
    with pytest.raises(RequestError, match="cannot read the quotas in"):
        read_quota(tmp_path / "none", "acme")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tenants", "is not TOML"),
        ("[tenants.acme]\ncores = -1", "tenants.acme.cores"),
        ('[tenants.acme]\ncores = "4"', "tenants.acme.cores"),
        ('[tenants.acme]\nmemory = "much"', "tenants.acme.memory: .*is not a size"),
        ("[tenants.acme]\ndisks = 4", "tenants.acme.disks"),
        ("[tenants]\nacme = 4", "tenants.acme"),
        ("tenants = 4", "does not have the tenant"),
        ("x = 1", "does not have the tenant"),
    ],
)
def test_bad_file_is_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(OrchestratorError, match=message):
        read_quota(path, "acme")
