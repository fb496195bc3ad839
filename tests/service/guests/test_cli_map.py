"""`nohype map`: the host as a picture of characters."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.api.routes.guests import show_guest
from orchestrator.api.routes.host import show_survey
from orchestrator.cli.map import draw
from orchestrator.guests.service import GuestService
from orchestrator.model.access import OPERATOR
from orchestrator.values import CpuSet
from tests.harness.crash import World
from tests.harness.guests import create

HOUSEKEEPING = CpuSet.parse("0-1")


def show(manager: GuestService, *names: str) -> tuple[list[Any], Any]:
    guests = [show_guest(manager.guest(OPERATOR, name), HOUSEKEEPING) for name in names]
    return guests, show_survey(manager.survey_with_use(), HOUSEKEEPING)


def test_each_thing_of_a_guest_has_its_letter(manager: GuestService) -> None:
    create(manager, name="web", disks=[{"serial": "disk0"}])
    create(manager, name="db")
    guests, survey = show(manager, "web", "db")
    lines = list(draw(guests, survey))
    cells = "".join(line for line in lines if line.lstrip("node 0123456789").startswith("[") and "pages" not in line)
    for letter, guest in zip("AB", guests, strict=True):
        assert cells.count(letter) == len(guest["cpus"])
        assert sum(line.partition("VFs ")[2].count(letter) for line in lines) == 1
        assert any(line.split()[:3] == [letter, guest["name"], "running"] for line in lines)
    assert cells.count(".") == len(HOUSEKEEPING.ids)
    assert any("A disk0" in line for line in lines)
    pages = sum(pool["total"] - pool["free"] for pool in survey["pools"])
    assert sum(int(line.split("] ")[1].split()[0]) for line in lines if "pages of" in line) == pages > 0


def test_host_without_guests_has_free_cores(manager: GuestService) -> None:
    lines = list(draw(*show(manager)))
    assert "A" not in "".join(line for line in lines if "[" in line)
    assert lines[-1].split() == [".", "host", "-", "free", "?", "offline"]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_large_host_fits_into_the_terminal(world: World, manager: GuestService, width: int) -> None:
    """1,024 CPUs in cores of two, 100 guests of one core, and a PF with 256 VFs."""
    guests, survey = show(manager)
    create(manager, name="web")
    ((template,), _) = show(manager, "web")
    survey["cores"] = [{"cpus": f"{cpu}-{cpu + 1}", "socket": 0, "node": cpu // 256} for cpu in range(0, 1024, 2)]
    survey["possible"] = "0-1039"
    pf = survey["pfs"][0]
    address = "0000:41:{:02x}.{}"
    pf["vfs"] = [
        {"address": address.format(n // 8, n % 8), "index": n, "driver": None, "iommu_group": None, "use": ""} for n in range(256)
    ]
    pf["total_vfs"] = 256
    guests = [template | {"name": f"g{n}", "cores": [f"{4 * n + 4}-{4 * n + 5}"], "nics": []} for n in range(100)]
    lines = list(draw(guests, survey, width))
    assert max(map(len, lines[: -len(guests)])) <= width
    assert sum(line.count("*") for line in lines if "[" in line) == 2 * (100 - 52)
    assert sum(line.count("[") for line in lines if "pages" not in line) == 512
    assert any("CPUs 1024-1039" in line for line in lines)


def test_cores_of_a_hybrid_processor_are_not_torn_apart(manager: GuestService) -> None:
    """Cores of two CPUs and of one, on the same node."""
    guests, survey = show(manager)
    cpus = [f"{cpu}-{cpu + 1}" for cpu in range(0, 16, 2)] + [str(cpu) for cpu in range(16, 60)]
    survey["cores"] = [{"cpus": text, "socket": 0, "node": 0} for text in cpus]
    lines = [line[10:] for line in draw(guests, survey, 60) if "[" in line and "pages" not in line]
    assert sum(map(len, lines)) == 8 * 4 + 44 * 3
    assert all(len(line) <= 50 and (line[0], line[-1]) == ("[", "]") for line in lines)


def test_uplinks_with_long_names_are_told_apart(manager: GuestService) -> None:
    guests, survey = show(manager)
    names = ["enp129s0f0np0", "enp129s0f1np1"]
    survey["pfs"] = [survey["pfs"][0] | {"interface": name} for name in names]
    lines = list(draw(guests, survey))
    assert [name for line in lines for name in names if line.startswith(f"{name} ")] == names
