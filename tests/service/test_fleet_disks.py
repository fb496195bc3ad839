"""Guests of the fleet with disks, from Prolog to Epilog: real manager on a fake host; what Slurm says of a job is given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client.transport import Unreachable
from orchestrator.errors import Conflict, NoRoom, OrchestratorError
from orchestrator.fleet import creation, manager, slurm, steps
from orchestrator.fleet.check import check_host, find_orphans
from orchestrator.fleet.creation import create_guest
from orchestrator.fleet.journal import Entry
from orchestrator.fleet.node import build_nodes
from orchestrator.fleet.records import read_records
from orchestrator.guests import host_view
from orchestrator.host.block import BlockProgress, Report
from orchestrator.resources import disk as disk_module
from orchestrator.values import CpuSet
from orchestrator.waiting import wait_until
from tests.fakes.nvme import disk_file
from tests.fakes.server import Server
from tests.harness.api_server import Served
from tests.harness.crash import wait_wiped
from tests.harness.fleet_site import serve_host, write_site

NODE, JOB, DISK = "a-n1", 7, "0000:51:00.0"
FIELDS: dict[str, Any] = {"name": "web", "memory": "64M", "image": "minimal", "id": "order-1", "disks": [{}]}
ALLOCATION = slurm.Allocation(NODE, CpuSet.parse("2-3"), CpuSet.parse("1"), 64, "web", "order-1", disks=1)
PLACEMENT = {"cpus": "10-11", "disks": [DISK]}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Node 0 has the disks 0 and 2, node 1 the disk 1."""
    monkeypatch.setattr(host_view, "VIEW_AGE", 0.0)
    with serve_host(tmp_path, Server(cores=8, nodes=2, vfs=2, pages=256, disks=3)) as found:
        yield found


@pytest.fixture
def site(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> steps.Site:
    assert [len(node.disks) for node in build_nodes(served.client.host(), "a")] == [2, 1]
    monkeypatch.setattr(slurm, "read_allocation", lambda _job: ALLOCATION)
    monkeypatch.setattr(slurm, "write_comment", lambda _node, _text: None)
    for module in (steps, creation):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    for module in (steps, manager):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    return write_site(tmp_path, served.client)


@pytest.fixture
def wiping(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Disks are wiped only after the event is set."""
    release, erase = threading.Event(), disk_module.scrub_controller

    def wait(*words: object) -> object:
        assert release.wait(60)
        return erase(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(disk_module, "scrub_controller", wait)
    yield release
    release.set()


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is stored with the job."""
    found: list[tuple[str, str]] = []

    def write(_job: int, _id: str, entries: list[Entry]) -> None:
        found[:] = [(entry.what, entry.text) for entry in entries]

    monkeypatch.setattr(slurm, "write_entries", write)
    return found


def start(site: steps.Site, **fields: Any) -> threading.Thread:
    """The job script, in the background."""

    def work() -> None:
        try:
            steps.run_job(site, NODE, JOB, {**FIELDS, **fields})
        except OrchestratorError as error:
            steps.report_error(NODE, JOB, steps.What.FAILED, error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def state(served: Served, name: str = "web") -> str:
    return next((guest["state"] for guest in served.client.guests() if guest["name"] == name), "")


def test_guest_gets_a_controller_of_its_node_and_the_epilog_does_not_wait_until_it_is_wiped(
    site: steps.Site, served: Served, wiping: threading.Event, entries: list[tuple[str, str]]
) -> None:
    steps.run_prolog(site, NODE, JOB)
    thread = start(site)
    assert wait_until(lambda: state(served) == "running", timeout=60, interval=0.02)
    (disk,) = served.client.guest("web")["disks"]
    assert disk["address"] == DISK
    steps.run_epilog(site, NODE, JOB)
    thread.join(60)
    assert (state(served), read_records(site.records)) == ("wiping", ())
    # Nothing is wrong with the host meanwhile: another guest is admitted, the check passes.
    assert check_host(site, NODE).findings == ()
    assert find_orphans(site.client, site.records) == ()
    assert steps.run_prolog(site, NODE, JOB)
    assert [what for what, _ in entries] == ["started", "ended"]


@pytest.mark.parametrize("name", ["web", "next"])
def test_next_guest_waits_until_the_disk_is_wiped(
    site: steps.Site, served: Served, wiping: threading.Event, entries: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    """Also one of the same name, which the manager knows until then."""
    served.client.create({**FIELDS, "id": "order-0", "placement": PLACEMENT})
    served.client.delete("web")
    allocation = replace(ALLOCATION, name=name)
    monkeypatch.setattr(slurm, "read_allocation", lambda _job: allocation)
    assert steps.run_prolog(site, NODE, JOB)
    thread = start(site, name=name)
    assert wait_until(lambda: entries, timeout=60, interval=0.02)
    assert entries == [("waiting", "the disks of web are being wiped")]
    assert state(served) == "wiping"
    refusals = len([event for event in served.client.events() if event["kind"] == "plan-failed"])
    threading.Event().wait(0.5)
    assert len([event for event in served.client.events() if event["kind"] == "plan-failed"]) == refusals
    wiping.set()
    assert wait_until(lambda: state(served, name) == "running", timeout=60, interval=0.02)
    assert served.client.guest(name)["id"] == "order-1"
    assert not any(disk_file(served.world.host, "0000:50:00.0").read_bytes()), "a disk of another node"
    served.client.delete(name)
    thread.join(60)
    assert [what for what, _ in entries] == ["waiting", "started", "ended"]


def test_guest_that_cannot_be_created_anyway_does_not_wait(site: steps.Site, served: Served, wiping: threading.Event) -> None:
    served.client.create({**FIELDS, "id": "order-0", "name": "old", "placement": PLACEMENT})
    served.client.delete("old")
    request = {**FIELDS, "placement": PLACEMENT}
    for wrong, message in (
        ({"placement": {**PLACEMENT, "cpus": "0-1"}}, "housekeeping"),
        ({"image": "nothing"}, "no guest image"),
        # The controllers of node 0 are free, but too small; that of node 1 does not matter to it.
        ({"placement": {"cpus": "2-3", "disks": ["0000:50:00.0"]}, "disks": [{"size": "1G"}]}, "at least 1G"),
    ):
        with pytest.raises(OrchestratorError, match=message):
            create_guest(site.client, {**request, **wrong}, lambda text: pytest.fail(text))


def test_guest_fails_with_the_managers_words_if_the_disk_is_wiped_and_does_not_fit(
    site: steps.Site, served: Served, wiping: threading.Event, entries: list[tuple[str, str]]
) -> None:
    served.client.create({**FIELDS, "id": "order-0", "name": "old", "placement": PLACEMENT})
    served.client.delete("old")
    thread = start(site, disks=[{"size": "1G"}])
    assert wait_until(lambda: entries, timeout=60, interval=0.02)
    assert entries == [("waiting", "the disks of old are being wiped")]
    wiping.set()
    thread.join(60)
    ((what, text),) = entries
    assert what == "failed"
    assert "disk 1: no free NVMe controller of at least 1G (free: 1M)" in text


def test_wipe_that_ends_during_the_request_is_no_reason_to_fail(
    site: steps.Site, served: Served, wiping: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.client.create({**FIELDS, "id": "order-0", "name": "old", "placement": PLACEMENT})
    served.client.delete("old")
    create, waits = site.client.create, []

    def refuse(request: Any, **more: Any) -> Any:
        try:
            return create(request, **more)
        except NoRoom:
            wiping.set()
            wait_wiped(served.ledger)
            raise

    monkeypatch.setattr(site.client, "create", refuse)
    assert create_guest(site.client, {**FIELDS, "placement": PLACEMENT}, waits.append)["state"] == "running"
    assert waits == ["the disks of old are being wiped"]


def test_guest_whose_manager_restarts_while_its_disk_is_prepared_is_created_after_the_wipe(
    site: steps.Site, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restarted manager undoes the creation, and refuses the id until then."""
    create = site.client.create
    answers: list[OrchestratorError] = [
        Conflict("guest web was deleted and its disks are being wiped"), Unreachable("the connection was closed")
    ]  # fmt: skip
    guests = iter([[], [{"name": "web", "id": "order-1", "state": "wiping", "disks": []}]])

    def ask(request: Any, **more: Any) -> Any:
        if answers:
            raise answers.pop()
        return create(request, **more)

    monkeypatch.setattr(site.client, "create", ask)
    monkeypatch.setattr(site.client, "guests", lambda: next(guests, []))
    assert create_guest(site.client, {**FIELDS, "placement": PLACEMENT}, lambda _text: None)["state"] == "running"


def test_epilog_ends_a_guest_whose_disk_is_being_prepared(
    site: steps.Site, served: Served, entries: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_host: object, device: str, report: Report) -> None:
        while True:
            report(BlockProgress(device, "verify", 1, 2))
            threading.Event().wait(0.01)

    monkeypatch.setattr(disk_module, "find_data", read)
    steps.run_prolog(site, NODE, JOB)
    thread = start(site)
    assert wait_until(lambda: state(served) == "creating", timeout=60, interval=0.02)
    steps.run_epilog(site, NODE, JOB)
    thread.join(60)
    assert (served.client.guests(), read_records(site.records)) == ([], ())
    ((what, text),) = entries
    assert (what, text.startswith("the guest was deleted while its disks were being prepared")) == ("failed", True)


def test_prolog_refuses_a_controller_that_was_given_at_the_host(site: steps.Site, served: Served) -> None:
    served.client.create({**FIELDS, "id": "x", "name": "local", "placement": {**PLACEMENT, "cpus": "12-13"}})
    with pytest.raises(Conflict, match="0 NVMe controllers of a-n1 have no guest, 1 requested; the others belong to local"):
        steps.run_prolog(site, NODE, JOB)


def test_prolog_and_check_report_a_controller_that_is_gone(
    site: steps.Site, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk_file(served.world.host, DISK).open("r+b") as file:
        file.seek(4086)
        file.write(b"SWAPSPACE2")
    monkeypatch.setattr(host_view, "DISK_USE_AGE", 0.0)
    (finding,) = check_host(site, NODE).findings
    assert "node a-n1: Gres=vf:2,nvme:1 in nohype-nodes.conf, the host has vf:2" in finding
    with pytest.raises(OrchestratorError, match="Gres=vf:2,nvme:1 in nohype-nodes.conf"):
        steps.run_prolog(site, NODE, JOB)
