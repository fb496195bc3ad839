"""`nohype who`: from a thing to its owner."""

from __future__ import annotations

import json
import time
from errno import EIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.api.routes.guests import show_guest
from orchestrator.api.routes.host import show_survey
from orchestrator.cli import connection
from orchestrator.cli.main import nohype
from orchestrator.cli.owners import find_owners
from orchestrator.errors import Forbidden
from orchestrator.guests.host_view import VIEW_AGE
from orchestrator.guests.service import GuestService
from orchestrator.model.access import OPERATOR
from orchestrator.values import CpuSet
from tests.fakes import tracing
from tests.fakes.domains import add_thread
from tests.harness.crash import World
from tests.harness.example_host import serve_example
from tests.harness.guests import create

ADDRESS, HOUSEKEEPING = "10.9.0.7", CpuSet.parse("0-1")


@pytest.fixture
def state(world: World, manager: GuestService) -> tuple[list[Any], Any]:
    create(manager, name="web", address=f"{ADDRESS}/24", id="job-17")
    create(manager, name="db", disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "db", 10)
    guests = [show_guest(manager.guest(OPERATOR, name), HOUSEKEEPING) for name in ("web", "db")]
    return guests, show_survey(manager.survey_with_use(), HOUSEKEEPING)


def test_each_thing_of_a_guest_leads_to_it(state: tuple[list[Any], Any]) -> None:
    guests, survey = state
    for guest in guests:
        (nic,) = guest["nics"]
        things = [str(guest["cpus"][-1]), f"cpu{guest['cpus'][0]}", guest["name"], nic["mac"], nic["mac"].upper()]
        things += [nic["address"], nic["address"].removeprefix("0000:")]
        things += [value for disk in guest["disks"] for value in (disk["serial"], disk["address"])]
        for thing in things:
            (found,) = find_owners(thing, guests, survey)
            assert (found["owner"], found["guest"], found["state"]) == ("guest", guest["name"], guest["state"]), thing
            assert f"guest {guest['name']} ({guest['state']}), since {guest['created'][:10]} " in str(found)
            assert f" UTC, created by {OPERATOR.name}; " in f"{found}; "
            assert (found["since"], found["by"]) == (guest["created"], OPERATOR.name)
    for thing in (ADDRESS, "job-17"):
        assert [found["guest"] for found in find_owners(thing, guests, survey)] == ["web"]


def test_what_no_guest_has_is_the_hosts_or_free(state: tuple[list[Any], Any]) -> None:
    guests, survey = state
    taken = {cpu for guest in guests for cpu in guest["cpus"]}
    free = next(cpu for core in survey["cores"] for cpu in CpuSet.parse(core["cpus"]).ids if cpu > 1 and cpu not in taken)
    vf = next(
        vf for pf in survey["pfs"] for vf in pf["vfs"] if vf["address"] not in {guest["nics"][0]["address"] for guest in guests}
    )
    owners = {
        thing: [found["owner"] for found in find_owners(thing, guests, survey)]
        for thing in ("0", str(free), "nic0", vf["address"])
    }
    assert owners == {"0": ["housekeeping"], str(free): ["free"], "nic0": ["host"], vf["address"]: ["free"]}


def test_core_that_is_not_isolated_is_not_free(state: tuple[list[Any], Any]) -> None:
    """As on the map. On a host that isolates no core, guests can have each."""
    guests, survey = state
    core = next(core["cpus"] for core in reversed(survey["cores"]))
    cpu = str(max(CpuSet.parse(core).ids))
    survey["isolated"] = str(CpuSet.parse(survey["isolated"]) - CpuSet.parse(cpu))
    (found,) = find_owners(cpu, guests, survey)
    assert str(found).startswith(f"CPU {cpu}: unusable; core {core} on node ")
    assert str(found).endswith("; it is not isolated, so guests cannot have it")
    survey["isolated"] = ""
    assert [found["owner"] for found in find_owners(cpu, guests, survey)] == ["free"]


def test_addresses_are_found_in_any_spelling(state: tuple[list[Any], Any]) -> None:
    guests, survey = state
    guests[1]["addresses"] = ["2001:db8::7/64"]
    for thing in ("2001:db8::7", "2001:DB8:0:0::0007", "2001:db8::7/64", f"{ADDRESS}/24"):
        (found,) = find_owners(thing, guests, survey)
        assert found["guest"] == ("web" if ADDRESS in thing else "db"), thing


def test_guest_without_a_known_creator(state: tuple[list[Any], Any]) -> None:
    guests, survey = state
    guests[0] |= {"created": None, "creator": None}
    (found,) = find_owners("web", guests, survey)
    assert str(found).startswith("guest web: guest web (running); CPUs ")
    (free,) = find_owners("0", guests, survey)
    assert (free["since"], free["by"]) == ("", "")


def test_offline_cpu_and_function_without_an_interface(state: tuple[list[Any], Any]) -> None:
    guests, survey = state
    survey["possible"] = "0-999"
    survey["pfs"][0] |= {"interface": None, "mac": None}
    assert [found["owner"] for found in find_owners("999", guests, survey)] == ["offline"]
    assert find_owners("", guests, survey) == ()
    assert all("None" not in str(found) for vf in survey["pfs"][0]["vfs"] for found in find_owners(vf["address"], [], survey))


def test_disk_that_guests_cannot_get_is_not_free(state: tuple[list[Any], Any]) -> None:
    """As on the map."""
    guests, survey = state
    disk = {"serial": "S1", "address": "0000:51:00.0", "name": "nvme7", "uses": [], "signatures": []}
    for fault, owner in (("", "free"), ("its contents cannot be examined: it does not respond", "host")):
        survey["controllers"] = [disk | {"fault": fault}]
        (found,) = find_owners("S1", guests, survey)
        assert (found["owner"], found["detail"]) == (owner, fault)


@pytest.mark.parametrize(
    "thing", ["", "99", "nic9", "0000:ff:1f.7", "02:00:00:00:00:01", "-1", "1e3", "٣", "null", "None", "x" * 5000]
)
def test_thing_that_the_host_does_not_have(state: tuple[list[Any], Any], thing: str) -> None:
    assert find_owners(thing, *state) == ()


def test_command(state: tuple[list[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    guests, survey = state
    cpu = str(guests[0]["cpus"][0])

    class Manager:
        may_survey = True

        def guests(self) -> Any:
            return guests

        def survey(self) -> Any:
            if not self.may_survey:
                raise Forbidden("viewer role required")
            return survey

        def host(self) -> Any:
            return {"activity": []}

    manager = Manager()
    monkeypatch.setattr(connection, "Client", lambda *_args, **_more: manager)

    def call(*words: str) -> Any:
        return CliRunner().invoke(nohype, ["who", *words], standalone_mode=False)

    assert call(cpu).output.startswith(f"CPU {cpu}: guest web (running)")
    assert json.loads(call("--json", cpu).output)[0]["guest"] == "web"
    assert "this host has nothing of this name" in str(call("nothing").exception)
    manager.may_survey = False
    assert call(cpu).output.startswith(f"CPU {cpu}: guest web")
    assert "none of your guests has it" in str(call("nic0").exception)


def test_threads_that_ran_on_a_guests_cores_are_named(tmp_path: Path) -> None:
    with serve_example(tmp_path) as served:
        host, guests = served.world.host, {guest["name"]: guest for guest in served.client.guests()}
        first, second = guests["web"]["cpus"]
        add_thread(host, 4711, 4712, "backup", "0-31", group="/system.slice/backup.service")
        host.add("proc/4712/status", "Name:\tbackup\nTgid:\t4711\n")
        host.add("proc/4712/task/4712/cgroup", "0::/system.slice/backup.service")
        vcpu = served.world.hypervisor.read_guest("web").vcpus[0].tid
        tracing.show_switches(
            host, {("backup", first, 4712): 35, ("CPU 0/KVM", first, vcpu): 9, ("cc", second, 99): 2, ("top", 0, 7): 5}
        )

        def call(*words: str) -> str:
            return CliRunner().invoke(nohype, ["--socket", str(served.path), "who", *words], catch_exceptions=False).output

        backup = (
            f"  other thread on CPU {first}: backup (4712 of process 4711, backup.service), 35 time slices since they are counted"
        )
        ended = f"  other thread on CPU {second}: cc (99, ended), 2 time slices since they are counted"
        assert call("web").splitlines()[1:] == [backup, ended]
        assert call(str(first)).splitlines()[1:] == [backup]
        (found,) = json.loads(call("--json", str(second)))
        assert found["threads"] == [{"cpu": second, "tid": 99, "pid": None, "name": "cc", "unit": "", "count": 2}]
        assert "  other threads: none since they are counted" in call("db")
        assert "thread" not in call("idle")
        assert "thread" not in call(guests["web"]["nics"][0]["mac"])
        host.read_errors[f"{tracing.INSTANCES}/nohype/{tracing.SWITCH}/hist"] = EIO
        time.sleep(VIEW_AGE)
        assert "  other threads: not measured: threads on the guests' cores are not counted: " in call("web")
