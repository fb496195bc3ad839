"""`nohype map`: the host as a picture of characters."""

from __future__ import annotations

import shutil
from errno import EIO
from typing import Any

import pytest

from orchestrator.api.routes.host import show_host
from orchestrator.cli.map import draw
from orchestrator.cli.map_svg import draw_svg
from orchestrator.errors import HypervisorError
from orchestrator.guests.service import GuestService
from orchestrator.values import CpuSet
from tests.fakes.domains import add_thread
from tests.harness.crash import World
from tests.harness.guests import create

HOUSEKEEPING = CpuSet.parse("0-1")


def show(manager: GuestService) -> Any:
    return show_host(manager.host_views.read(), HOUSEKEEPING, manager.host_setup.policy)


def read_cells(host: Any) -> dict[int, str]:
    """The mark of each CPU of a host whose CPUs are numbered one after the other."""
    lines = [line for line in draw(host) if line.startswith("node ")]
    return dict(enumerate(mark for line in lines for mark in line.partition(" [")[2] if mark not in "[]"))


def test_each_thing_of_a_guest_has_its_letter(manager: GuestService) -> None:
    create(manager, name="web", disks=[{"serial": "disk0"}])
    create(manager, name="db")
    host = show(manager)
    survey, lines = host["survey"], list(draw(host))
    cells = "".join(read_cells(host).values())
    for letter, guest in zip("AB", host["guests"], strict=True):
        assert cells.count(letter) == len(guest["cpus"])
        assert sum(line.partition("VFs ")[2].count(letter) for line in lines) == 1
        assert any(line.split()[:3] == [letter, guest["name"], "running"] for line in lines)
    assert cells.count(".") == len(HOUSEKEEPING.ids)
    assert any("B disk0" in line for line in lines)
    pages = sum(pool["total"] - pool["free"] for pool in survey["pools"])
    assert sum(int(line.split("] ")[1].split()[0]) for line in lines if "pages of" in line) == pages > 0


def test_host_without_guests_has_free_cores(manager: GuestService) -> None:
    lines = list(draw(show(manager)))
    assert "A" not in "".join(line for line in lines if "[" in line)
    assert lines[-1].split() == [".", "host", "-", "free", "?", "offline"]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_large_host_fits_into_the_terminal(world: World, manager: GuestService, width: int) -> None:
    """1,024 CPUs in cores of two, 100 guests of one core, and a PF with 256 VFs."""
    create(manager, name="web")
    host = show(manager)
    survey, (template,) = host["survey"], host["guests"]
    survey["cores"] = [{"cpus": f"{cpu}-{cpu + 1}", "socket": 0, "node": cpu // 256} for cpu in range(0, 1024, 2)]
    survey["possible"] = "0-1039"
    pf = survey["pfs"][0]
    address = "0000:41:{:02x}.{}"
    pf["vfs"] = [
        {"address": address.format(n // 8, n % 8), "index": n, "driver": None, "iommu_group": None, "use": ""} for n in range(256)
    ]
    pf["total_vfs"] = 256
    host["guests"] = [template | {"name": f"g{n}", "cores": [f"{4 * n + 4}-{4 * n + 5}"], "nics": []} for n in range(100)]
    owners = {core: guest["name"] for guest in host["guests"] for core in guest["cores"]}
    host["cores"] = [core | {"use": "free", "guest": owners.get(core["cpus"], "")} for core in survey["cores"]]
    host["unmanaged"] = [{"kind": "program", "name": "vm", "pid": 7, "cpus": "1000-1001", "confined": True, "why": ""}]
    host["unmanaged_why"] = ""
    lines = list(draw(host, width))
    assert max(len(line) for line in lines if "CPUs" not in line) <= width
    assert sum(line.count("*") for line in lines if "[" in line) == 2 * (100 - 52)
    assert sum(line.count("[") for line in lines if "pages" not in line) == 512
    assert any("CPUs 1024-1039" in line for line in lines)


def test_cores_of_a_hybrid_processor_are_not_torn_apart(manager: GuestService) -> None:
    """Cores of two CPUs and of one, on the same node."""
    host = show(manager)
    cpus = [f"{cpu}-{cpu + 1}" for cpu in range(0, 16, 2)] + [str(cpu) for cpu in range(16, 60)]
    host["survey"]["cores"] = [{"cpus": text, "socket": 0, "node": 0} for text in cpus]
    lines = [line[10:] for line in draw(host, 60) if "[" in line and "pages" not in line]
    assert sum(map(len, lines)) == 8 * 4 + 44 * 3
    assert all(len(line) <= 50 and (line[0], line[-1]) == ("[", "]") for line in lines)


def test_uplinks_with_long_names_are_told_apart(manager: GuestService) -> None:
    host = show(manager)
    names = ["enp129s0f0np0", "enp129s0f1np1"]
    host["survey"]["pfs"] = [host["survey"]["pfs"][0] | {"interface": name} for name in names]
    lines = list(draw(host))
    assert [name for line in lines for name in names if line.startswith(f"{name} ")] == names


def add_program(world: World, pid: int, name: str, cpus: str, *arguments: str, last: int = 2) -> None:
    """A program with a virtual machine, whose only thread may run on these CPUs."""
    add_thread(world.host, pid, pid, name, cpus)
    stat = world.host.text(f"proc/{pid}/task/{pid}/stat").split()
    world.host.add(f"proc/{pid}/task/{pid}/stat", " ".join((*stat[:38], str(last), *stat[39:])))
    world.host.add(f"proc/{pid}/cmdline", "\0".join((name, *arguments, "")))
    world.host.add(f"sys/kernel/debug/kvm/{pid}-11/exits", "0")


def test_core_that_guests_cannot_have_is_marked(world: World, manager: GuestService) -> None:
    """As after an error in `isolcpus=`: CPUs 4-5 are neither for housekeeping nor isolated."""
    for file in ("sys/devices/system/cpu/isolated", "sys/fs/cgroup/cpuset.cpus.isolated"):
        world.host.add(file, str(CpuSet.parse(world.host.text(file)) - CpuSet.parse("4-5")))
    host = show(manager)
    assert {cpu for cpu, mark in read_cells(host).items() if mark == "~"} == {4, 5}
    assert any("~ not isolated" in line for line in draw(host))
    assert "core with CPUs 4-5, socket 0: unusable" in "".join(draw_svg(host))


def test_cpus_of_unmanaged_guests_are_marked(world: World, manager: GuestService) -> None:
    """A pinned domain, a program of its own on a guest's core, and one that may run everywhere."""
    plan = create(manager, name="web")
    everywhere = world.host.text("sys/devices/system/cpu/online")
    world.hypervisor.domains.define(
        "<domain><name>db7</name><uuid>00000000-0000-0000-0000-000000000007</uuid><vcpu>1</vcpu></domain>", threads="6-7"
    )
    shared = plan.cpus[0]
    add_program(world, 501, "crosvm", str(shared))
    add_program(world, 502, "qemu-system-x86", everywhere, last=8)
    add_program(world, 503, "firecracker", "0-1")
    host = show(manager)
    cells, lines = read_cells(host), list(draw(host))
    assert {cpu: mark for cpu, mark in cells.items() if mark in "@!"} == {6: "@", 7: "@", 8: "@", shared: "!"}
    assert cells[0] == cells[1] == ".", "housekeeping CPUs are for all programs"
    assert [line.split("@  ")[1] for line in lines if line.lstrip().startswith("@  ")] == [
        "db7 (unmanaged domain, process 9999)  may run on CPUs 6-7",
        f"crosvm (unmanaged program, process 501)  may run on CPUs {shared}",
        "qemu-system-x86 (unmanaged program, process 502)  may run on all CPUs, last ran on 8",
        "firecracker (unmanaged program, process 503)  may run on CPUs 0-1",
    ]
    picture = "".join(draw_svg(host))
    assert "core with CPUs 6-7, socket 0: free; unmanaged guest db7" in picture
    assert "claimed by web; unmanaged guest crosvm" in picture
    assert "may run on all CPUs, last ran on 8" in picture


def test_qemu_of_a_managed_guest_or_a_domain_is_not_listed_twice(world: World, manager: GuestService) -> None:
    plan = create(manager, name="web")
    number = "00000000-0000-0000-0000-000000000007"
    world.hypervisor.domains.define(f"<domain><name>db7</name><uuid>{number}</uuid><vcpu>1</vcpu></domain>", threads="6-7")
    world.host.add("sys/kernel/debug/kvm/9999-11/exits", "0")
    world.host.add("proc/9999/cmdline", "qemu")
    add_program(world, 501, "qemu-system-x86", "2-3", "-uuid", str(plan.uuid))
    add_program(world, 502, "qemu-system-x86", "6-7", "-uuid", number)
    world.host.add("sys/kernel/debug/kvm/77-11/exits", "0")  # it has ended
    host = show(manager)
    assert [(guest["kind"], guest["name"]) for guest in host["unmanaged"]] == [("domain", "db7")]
    assert host["unmanaged_why"] == ""


@pytest.mark.parametrize("fault", ["debugfs", "libvirt", "threads"])
def test_unmanaged_guests_that_cannot_be_read_are_not_measured(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    world.hypervisor.domains.define(
        "<domain><name>db7</name><uuid>00000000-0000-0000-0000-000000000007</uuid><vcpu>1</vcpu></domain>", threads="6-7"
    )
    if fault == "debugfs":
        shutil.rmtree(world.host.path / "sys/kernel/debug/kvm")
    else:
        add_program(world, 501, "crosvm", "4-5")
    if fault == "libvirt":

        def fail(_: object) -> None:
            raise HypervisorError("cannot list the domains: no connection")

        monkeypatch.setattr(world.hypervisor, "list_running", fail)
    if fault == "threads":
        world.host.read_errors["proc/9999/task/9999/stat"] = EIO
    host = show(manager)
    found = {guest["name"]: guest["why"] for guest in host["unmanaged"]}
    wanted = {"debugfs": {"db7": ""}, "libvirt": {"crosvm": ""}, "threads": {"db7": found.get("db7"), "crosvm": ""}}
    assert found == wanted[fault]
    text = "\n".join(draw(host))
    missing = {
        "debugfs": "not measured: virtual machines of other programs: ", "libvirt": "not measured: domains of libvirt: ",
        "threads": "db7 (unmanaged domain, process 9999)  its threads cannot be read: ",
    }  # fmt: skip
    assert missing[fault] in text
