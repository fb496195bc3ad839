"""The host at one moment, over the API."""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import host_shapes
from orchestrator.errors import HostError
from orchestrator.guests import host_view, vf_settings
from orchestrator.host.exit_trace import EXITS
from orchestrator.model.access import OPERATOR
from orchestrator.model.proof import Proof, Verdict
from tests.fakes import tracing
from tests.fakes.server import IMAGE
from tests.harness.api_server import Served, serve

PROOFS = (
    Proof("core-smt", "web", Verdict.PASS, 0, "CPUs", ("no CPU is shared",)),
    Proof("vepa", "host", Verdict.NOT_MEASURED, None, "frames", ("no frames were sent",)),
)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(host_view, "VIEW_AGE", 0.0)  # each request reads anew
    with serve(tmp_path, audit=lambda _, **_more: PROOFS) as found:
        found.client.create({"name": "web", "image": IMAGE, "memory": "64M"})
        yield found


def read(served: Served) -> host_shapes.Host:
    return served.client.host()


def add_times(served: Served, text: str) -> None:
    guest = served.world.hypervisor.read_guest("web")
    for vcpu in guest.vcpus:
        served.world.host.add(f"proc/{guest.pid}/task/{vcpu.tid}/schedstat", text)


def test_each_core_has_the_owner_that_the_guests_name(served: Served) -> None:
    served.client.create({"name": "db", "image": IMAGE, "memory": "64M", "cores": 2})
    host = read(served)
    for guest in host["guests"]:
        assert [core["cpus"] for core in host["cores"] if core["guest"] == guest["name"]] == guest["cores"]
    uses = {core["cpus"]: core["use"] for core in host["cores"]}
    assert uses["0-1"] == "housekeeping"
    assert sorted(uses) == sorted(core["cpus"] for core in host["survey"]["cores"])
    assert list(uses.values()).count("claimed") == 3


def test_pages_of_a_pool_add_up(served: Served) -> None:
    host = read(served)
    for pool in host["survey"]["pools"]:
        pages = [one for one in host["pages"] if (one["node"], one["page_size"]) == (pool["node"], pool["page_size"])]
        assert sum(one["count"] for one in pages) == pool["total"]
    assert sum(one["count"] for one in host["pages"] if one["use"] == "claimed") == host["guests"][0]["huge_pages"]


def test_activity_is_what_the_kernel_counts(served: Served) -> None:
    add_times(served, "3000000000 500000000 7")
    tids = [vcpu.tid for vcpu in served.world.hypervisor.read_guest("web").vcpus]
    tracing.show_hist(served.world.host, EXITS.folder, {(tids[0], 0x78): 41, (tids[1], 0x78): 1, (7, 0x78): 9}, 0)
    (activity,) = read(served)["activity"]
    assert (activity["guest"], activity["why"]) == ("web", "")
    assert [vcpu["cpu"] for vcpu in activity["vcpus"]] == read(served)["guests"][0]["cpus"]
    assert [(vcpu["ran"], vcpu["waited"]) for vcpu in activity["vcpus"]] == [(3.0, 0.5)] * 2
    assert [sum((vcpu["exits"] or {}).values()) for vcpu in activity["vcpus"]] == [41, 1]


@pytest.mark.parametrize("dropped", [0, 5])
def test_threads_of_others_on_a_guests_cores_have_their_process_and_unit(served: Served, dropped: int) -> None:
    """Also in a histogram that is full, which is said."""
    host, (guest,) = served.world.host, read(served)["guests"]
    scope = "/machine.slice/machine-qemu.scope/libvirt/emulator"
    host.add("proc/31/status", "Name:\tworker\nTgid:\t30\n")
    host.add("proc/31/task/31/cgroup", f"0::{scope}")
    vcpu = served.world.hypervisor.read_guest("web").vcpus[0].tid
    cpu = guest["cpus"][1]
    add_times(served, "1 1 1")
    tracing.show_switches(
        host, {("worker", cpu, 31): 7, ("CPU 0/KVM", cpu, vcpu): 9, ("sh", 0, 32): 1, ("sh", cpu, 32): 2}, dropped
    )
    (activity,) = read(served)["activity"]
    assert activity["others"] == [
        {"cpu": cpu, "tid": 32, "pid": None, "name": "sh", "unit": "", "count": 2},
        {"cpu": cpu, "tid": 31, "pid": 30, "name": "worker", "unit": "machine-qemu.scope", "count": 7},
    ]
    assert activity["why"] == ("the kernel's histogram of threads is full: 5 time slices were not counted" if dropped else "")


def test_owner_of_a_thread_is_read_once(served: Served) -> None:
    host, (guest,) = served.world.host, read(served)["guests"]
    host.add("proc/31/status", "Name:\tworker\nTgid:\t30\n")
    host.add("proc/31/task/31/cgroup", "0::/")
    tracing.show_switches(host, {("worker", guest["cpus"][0], 31): 7})
    read(served)
    host.read_errors["proc/31/status"] = 5
    tracing.show_switches(host, {("worker", guest["cpus"][0], 31): 8})
    assert [one["pid"] for one in read(served)["activity"][0]["others"] or ()] == [30]


@pytest.mark.parametrize("fault", ["no times", "no histogram", "full histogram"])
def test_what_cannot_be_read_is_null_and_explained(served: Served, fault: str) -> None:
    if fault != "no times":
        add_times(served, "1 1 1")
    if fault == "no histogram":
        served.world.host.read_errors[f"{EXITS.folder}/hist"] = 13
    if fault == "full histogram":
        tracing.show_hist(served.world.host, EXITS.folder, {}, 5)
    (activity,) = read(served)["activity"]
    assert activity["why"]
    missing = {"no times": ("ran", "waited")}.get(fault, ("exits",))
    assert all(vcpu[name] is None for vcpu in activity["vcpus"] for name in missing)  # type: ignore[literal-required]


def test_proofs_of_a_guest_that_changed_are_outdated(served: Served) -> None:
    assert read(served)["audit"] is None
    served.client.audit(0)

    def outdated() -> dict[str, bool]:
        audit = read(served)["audit"]
        assert audit
        assert audit["age"] >= 0
        return {proof["name"]: proof["outdated"] for proof in audit["proofs"]}

    assert outdated() == {"core-smt": False, "vepa": False}
    served.client.restart("web")
    assert outdated() == {"core-smt": True, "vepa": True}, "proofs of the host are about all guests"
    served.client.delete("web")
    assert outdated() == {"vepa": True}
    served.client.create({"name": "web", "image": IMAGE, "memory": "64M"})
    assert outdated() == {"core-smt": True, "vepa": True}  # another guest with the same name


def test_audit_of_the_host_keeps_the_verdicts_of_guests_with_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_view, "VIEW_AGE", 0.0)
    verdict = Verdict.FAIL

    def audit(_frames: int, *, host_only: bool) -> tuple[Proof, ...]:
        host = Proof("vepa", "host", verdict, None, "frames", ("first",))
        return (host,) if host_only else (PROOFS[0], host)

    with serve(tmp_path, audit=audit) as served:
        served.client.create({"name": "web", "image": IMAGE, "memory": "64M"})
        served.client.audit(0)
        time.sleep(0.2)
        verdict = Verdict.PASS
        assert [proof["subject"] for proof in served.client.audit(host_only=True)] == ["host"]
        found = read(served)["audit"]
        assert found
        assert {(proof["name"], proof["verdict"]) for proof in found["proofs"]} == {("core-smt", "pass"), ("vepa", "pass")}
        ages = {proof["subject"]: proof["age"] for proof in found["proofs"]}
        assert ages["host"] == pytest.approx(found["age"])
        assert ages["web"] > ages["host"] + 0.15, "a verdict does not look newer than it is"
        served.client.audit(0)
        found = read(served)["audit"]
        assert found
        assert {proof["age"] for proof in found["proofs"]} == {found["age"]}


def test_guest_that_is_restarted_during_an_audit_is_outdated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_view, "VIEW_AGE", 0.0)
    found: list[Any] = []

    def audit(_frames: int, **_: object) -> tuple[Proof, ...]:
        found[0].manager.restart(OPERATOR, "web", 1)
        return PROOFS

    with serve(tmp_path, audit=audit) as served:
        found.append(served)
        served.client.create({"name": "web", "image": IMAGE, "memory": "64M"})
        served.client.audit(0)
        shown = read(served)["audit"]
        assert shown
        assert [proof["outdated"] for proof in shown["proofs"]] == [True, True]


def test_drift_is_shown_until_it_is_gone(served: Served) -> None:
    served.world.hypervisor.suspend("web")
    served.manager.reconciler.detect_drift()
    (drift,) = read(served)["drift"]
    assert (drift["subject"], drift["findings"]) == ("web", ["suspended"])
    served.manager.reconciler.detect_drift()
    assert read(served)["drift"] == [drift]  # since the same time
    served.client.kill("web")
    assert read(served)["drift"] == []


def test_uplink_whose_frames_do_not_return_is_named(served: Served) -> None:
    served.manager.host_views.find_lost = lambda: {"nic0": True, "nic1": False}
    assert read(served)["lost"] == ["nic0"]


def test_vfs_that_a_guest_needed_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_view, "VIEW_AGE", 0.0)
    monkeypatch.setattr(host_view, "CHANGED_SURVEY_AGE", 0.0)
    with serve(tmp_path) as served:
        assert not [vf for pf in read(served)["survey"]["pfs"] for vf in pf["vfs"]]
        vf = served.client.create({"name": "web", "image": IMAGE, "memory": "64M"})["vf"]
        assert vf
        assert vf["address"] in [found["address"] for pf in read(served)["survey"]["pfs"] for found in pf["vfs"]]


def test_callers_share_a_reading(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_view, "VIEW_AGE", 3600.0)
    first = read(served)
    served.client.kill("web")
    assert read(served)["clock"] == first["clock"]


def test_a_poll_asks_neither_qemu_nor_the_disks_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    read(served)
    asked: list[str] = []
    monkeypatch.setattr(served.world.hypervisor, "read_guest", lambda _: asked.append("qemu"))
    monkeypatch.setattr(served.manager.allocator, "read_disk_use", lambda _: asked.append("disks"))
    read(served)
    assert not asked


def change_vf(served: Served, address: str, **settings: object) -> None:
    """Behind the manager's back, as `ip link set nic0 vf N` does."""
    pf, vf = next((pf, vf) for pf in read(served)["survey"]["pfs"] for vf in pf["vfs"] if vf["address"] == address)
    net: Any = served.world.host.net
    assert pf["interface"]
    net.set_vf(pf["interface"], vf["index"], **settings)


def list_differences(served: Served) -> dict[str, list[str]]:
    return {vf["address"]: vf["differences"] for vf in read(served)["vfs"] if vf["differences"]}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"spoof_check": False}, "spoof check is off, expected on"),
        ({"trust": True}, "trust is on, expected off"),
        ({"vlan": 7}, "vlan is 7, expected 0"),
        ({"max_rate": 10}, "max rate is 10, expected 0"),
    ],
)
def test_vf_that_is_not_as_required_is_shown(
    served: Served, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], text: str
) -> None:
    """Of a running guest, of a stopped one, and free."""
    monkeypatch.setattr(vf_settings, "MAX_AGE", 0.0)
    served.client.create({"name": "off", "image": IMAGE, "memory": "64M"})
    served.client.kill("off")
    assert list_differences(served) == {}
    owned = {guest["name"]: guest["nics"][0]["address"] or "" for guest in read(served)["guests"]}
    free = next(vf["address"] for vf in read(served)["vfs"] if not vf["guest"])
    for address in (owned["web"], owned["off"], free):
        change_vf(served, address, **settings)
        assert list_differences(served)[address] == [text]
    shown = {vf["address"]: vf for vf in read(served)["vfs"]}
    assert {address: shown[address]["guest"] for address in (owned["web"], free)} == {owned["web"]: "web", free: ""}
    (mac,) = (guest["nics"][0]["mac"] for guest in read(served)["guests"] if guest["name"] == "web")
    assert shown[owned["web"]]["mac"] == mac


def test_restart_of_a_guest_is_not_shown_as_a_difference(served: Served) -> None:
    """The settings are read anew when a guest has changed, not only when they are old."""
    for change in (served.client.kill, served.client.start, served.client.kill, served.client.start):
        assert list_differences(served) == {}
        change("web")
    assert list_differences(served) == {}


def test_settings_that_cannot_be_read_are_null_and_explained(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_interface: str) -> Any:
        raise HostError("nic0: no such device")

    monkeypatch.setattr(vf_settings, "MAX_AGE", 0.0)
    monkeypatch.setattr(served.world.host.net, "read_vfs", fail)
    vfs = read(served)["vfs"]
    assert vfs
    assert {(vf["why"], vf["spoof_check"], vf["mac"]) for vf in vfs} == {("nic0: no such device", None, None)}
    assert {vf["guest"] for vf in vfs} == {"web", ""}


def test_guest_has_its_creator_and_time_also_after_changes(served: Served) -> None:
    (made,) = read(served)["guests"]
    assert made["creator"] == getpass.getuser()
    assert made["created"]
    served.client.restart("web")
    (after,) = read(served)["guests"]
    assert (after["creator"], after["created"]) == (made["creator"], made["created"])
    planned = served.client.plan({"name": "next", "image": IMAGE, "memory": "64M"})
    assert (planned["creator"], planned["created"]) == (None, None)
