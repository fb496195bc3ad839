"""The manager in the lab: the life of a guest, errors, and a restored host."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from orchestrator.model.proof import Verdict
from tests.lab.conftest import LINK_UP, LabHost

MEMORY = ("--memory", "128M", "--image", "minimal")
GIB_PAGE = ("--memory", "1G", "--page-size", "1G", "--image", "minimal")


def survey(host: LabHost) -> Any:
    return json.loads(host.nohype("survey", "--json").stdout)


def await_state(host: LabHost, name: str, state: str) -> Any:
    """The guest, once it is in that state."""
    for _ in range(30):
        found = json.loads(host.nohype("guest", "show", name, "--json").stdout)
        if found["state"] == state:
            break
        time.sleep(1)
    assert found["state"] == state
    return found


def test_survey_shows_the_lab(host: LabHost) -> None:
    found = survey(host)
    assert [core["cpus"] for core in found["cores"]] == ["0-1", "2-3", "4-5", "6-7"]
    assert [core["node"] for core in found["cores"]] == [0, 0, 1, 1]
    assert found["isolated"] == "2-7"
    assert found["pfs"][0]["device"] == "8086:10c9"
    assert found["pfs"][0]["total_vfs"] == 7


def test_plan_claims_nothing(host: LabHost) -> None:
    planned = json.loads(host.nohype("guest", "create", "dry", *MEMORY, "--plan", "--json").stdout)
    assert planned["cpus"]
    assert "dry" not in host.nohype("guest", "list").stdout


BAD_REQUESTS = [
    (("Bad_Name", *MEMORY), "not a guest name"),
    (("one", "--memory", "97M", "--image", "minimal"), "multiple of the huge page size"),
    (("one", "--memory", "64M", "--image", "minimal"), "of memory, requested 64M"),
    (("one", "--memory", "64M", "--image", "nix"), "nohype image build nix"),
    (("one", *MEMORY, "--cores", "9"), "whole cores are free, 9 requested"),
    (("one", "--memory", "64G", "--image", "minimal"), "huge pages of 2M are free"),
    (("one", *MEMORY, "--address", "10.9.0.1"), "no prefix length"),
    (("guest1", *MEMORY), "is taken"),
]


@pytest.mark.usefixtures("guests")
def test_bad_requests_leave_nothing(host: LabHost) -> None:
    before = survey(host)
    for words, message in BAD_REQUESTS:
        done = host.nohype("guest", "create", *words, check=False)
        assert done.status == 1, words
        assert message in done.stderr
        assert "Traceback" not in done.stderr + done.stdout
    assert survey(host) == before


@pytest.mark.usefixtures("guests")
def test_create_without_free_vf_is_refused(host: LabHost) -> None:
    """VFs bound to vfio-pci outside the manager are not free."""
    free = host.run(
        "for vf in /sys/class/net/nic0/device/virtfn*; do [ -e $vf/driver ] || basename $(readlink $vf); done"
    ).stdout.split()
    take = "".join(
        f"echo vfio-pci > /sys/bus/pci/devices/{vf}/driver_override; echo {vf} > /sys/bus/pci/drivers_probe;" for vf in free
    )
    back = "".join(
        f"echo {vf} > /sys/bus/pci/devices/{vf}/driver/unbind; echo > /sys/bus/pci/devices/{vf}/driver_override;" for vf in free
    )
    with host.changed(take, back):
        done = host.nohype("guest", "create", "one", *MEMORY, check=False)
    assert done.status == 1
    assert "no free VF" in done.stderr


@pytest.mark.usefixtures("guests")
def test_create_with_pf_down_is_refused(host: LabHost) -> None:
    with host.changed("ip link set nic0 down", LINK_UP):
        done = host.nohype("guest", "create", "one", *MEMORY, check=False)
    assert done.status == 1
    assert "is down or has no carrier" in done.stderr


@pytest.mark.usefixtures("guests")
@pytest.mark.soak
def test_guest_that_powered_off_can_be_started_and_deleted(host: LabHost) -> None:
    before = survey(host)
    made = json.loads(host.nohype("guest", "create", "brief", *MEMORY, "--wait", "180", "--json").stdout)
    assert made["ready"].startswith("nohype: ready name=brief")
    assert host.nohype("guest", "tell", "brief", "burn 1").stdout.endswith("nohype: done burn seconds=1 cpus=2\n")
    assert host.nohype("guest", "tell", "brief", "halt").stdout.endswith("nohype: done halt\n")
    assert await_state(host, "brief", "stopped")["cpus"] == made["cpus"]
    # What it owns is still its own, but none of it is in use.
    assert survey(host) == before
    again = json.loads(host.nohype("guest", "start", "brief", "--json").stdout)
    assert (again["state"], again["cpus"], again["vf"]) == ("running", made["cpus"], made["vf"])
    host.nohype("guest", "delete", "brief")
    assert "brief" not in host.nohype("guest", "list").stdout
    assert survey(host) == before


@pytest.mark.usefixtures("guests")
def test_console_shows_output_and_takes_input(host: LabHost) -> None:
    """QEMU's pty takes what is typed, and virtlogd's log has what the guest prints."""
    shown = host.nohype("guest", "console", "guest1", "--no-follow", "--history", "1000").stdout
    assert "nohype: ready name=guest1" in shown
    command = "(echo mac; sleep 2) | timeout 120 nohype guest console guest1 --history 0 > /tmp/console.out & "
    search = "until grep -m 1 'nohype: done mac' /tmp/console.out || ! kill -0 $!; do sleep 1; done; kill $!; rm /tmp/console.out"
    done = host.run(command + search, check=False)
    assert "nohype: done mac" in done.stdout, done
    address = done.stdout.split()[-1]
    assert host.nohype("guest", "tell", "guest1", "mac").stdout.endswith(f"nohype: done mac {address}\n"), "commands still work"


def test_guest_with_1_gb_pages_runs_and_returns_them(host: LabHost) -> None:
    """QEMU uses the hugetlbfs mount of the host role, and the page is returned."""
    before = survey(host)
    try:
        made = json.loads(host.nohype("guest", "create", "big", *GIB_PAGE, "--json").stdout)
        assert (made["page_size"], made["huge_pages"]) == (1 << 30, 1)
        pool = f"/sys/devices/system/node/node{made['node']}/hugepages/hugepages-1048576kB/free_hugepages"
        assert host.run(f"cat {pool}").stdout == "0\n"
        assert host.proofs()["memory-static", "big"].verdict is Verdict.PASS
        refused = host.nohype("guest", "create", "more", *GIB_PAGE, "--memory", "2G", check=False)
        assert "0 of 1 huge pages of 1G are free, 2 requested" in refused.stderr
    finally:
        host.nohype("guest", "delete", "big", check=False)
    assert survey(host) == before


def test_unreachable_manager_is_an_error(host: LabHost) -> None:
    done = host.run("nohype guest list --socket /run/nohype/none.sock", check=False)
    assert done.status == 1
    assert "cannot reach the manager" in done.stderr


@pytest.mark.soak
def test_create_without_libvirt_is_an_error(host: LabHost, guests: list[dict[str, Any]]) -> None:
    del guests
    stop = "systemctl stop libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service"
    with host.changed(stop, "systemctl start libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service; sleep 2"):
        done = host.nohype("guest", "create", "one", *MEMORY, check=False)
    assert done.status == 1
    assert "systemctl start libvirtd.socket" in done.stderr
    assert [guest["state"] for guest in json.loads(host.nohype("guest", "list", "--json").stdout)] == ["running", "running"]
