"""What `nohype top`, `who`, `map`, `web` and GET /v1/host say of real guests, compared with what the kernel says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.values import CpuSet
from tests.lab.conftest import LabHost

FACTS = (Path(__file__).parent / "inside" / "host_facts.py").read_text()
READ = """
import json
from pathlib import Path
from orchestrator.client import Client
print(json.dumps(Client(Path("/run/nohype/nohyped.sock")).host()))
"""
# On port 80, whose number browsers omit in the field Host, as http.client does. A fork has the modules of the command already.
BROWSE = """
import http.client, json, os, signal, sys
from orchestrator.cli.main import main
ours, theirs = os.pipe()
if not (web := os.fork()):
    os.dup2(theirs, 1)
    sys.argv = ["nohype", "web", "--port", "80"]
    main()
def ask(method, target, body=None, **fields):
    connection = http.client.HTTPConnection("127.0.0.1", timeout=60)
    connection.request(method, target, body, fields)
    response = connection.getresponse()
    return response.status, response.read().decode()
try:
    word = os.fdopen(ours).readline().strip().partition("#")[2]
    secret = {"Authorization": "Bearer " + json.loads(ask("POST", "/session", word)[1])["token"]}
    found = {"page": ask("GET", "/"), "head": ask("HEAD", "/v1/host", **secret), "refused": ask("GET", "/v1/host")[0],
             "host": json.loads(ask("GET", "/v1/host", **secret)[1])}
finally:
    os.kill(web, signal.SIGKILL)
    os.waitpid(web, 0)
print(json.dumps(found))
"""


def read_facts(host: LabHost, *guests: str) -> Any:
    return json.loads(host.python(FACTS, "nic0", *guests))


def read_view(host: LabHost) -> Any:
    return json.loads(host.python(READ))


def check_view(view: Any, facts: Any) -> None:
    """The view of the guests in ``facts`` is what the kernel says."""
    settings = {vf["address"]: vf for vf in view["vfs"]}
    for name, kernel in facts["guests"].items():
        (guest,) = (one for one in view["guests"] if one["name"] == name)
        (activity,) = (one for one in view["activity"] if one["guest"] == name)
        assert [str(vcpu["cpu"]) for vcpu in activity["vcpus"]] == kernel["affinity"], name
        owned = {cpu for core in view["cores"] if core["guest"] == name for cpu in CpuSet.parse(core["cpus"]).ids}
        assert owned == {int(cpu) for cpu in kernel["affinity"]}
        assert guest["huge_pages"] * guest["page_size"] == guest["memory"] == kernel["huge_bytes"]
        (nic,) = guest["nics"]
        vf = facts["vfs"][nic["address"]]
        assert (vf["index"], vf["driver"], vf["address"]) == (nic["index"], "vfio-pci", nic["mac"])
        assert f"/dev/vfio/{vf['group']}" in kernel["vfio"], "the process of this guest has the VF open"
    for address, vf in facts["vfs"].items():
        shown = settings[address]
        assert (shown["mac"] or "00:00:00:00:00:00", shown["spoof_check"], shown["trust"]) == (
            vf["address"], vf["spoofchk"], vf["trust"]
        )  # fmt: skip
    for pool in view["survey"]["pools"]:
        assert pool["free"] == facts["pools"][f"{pool['node']} {pool['page_size'] >> 10}"]


def test_all_views_say_what_the_kernel_says(host: LabHost, guests: list[dict[str, Any]]) -> None:
    names = [guest["name"] for guest in guests]
    facts = read_facts(host, *names)
    web = json.loads(host.python(BROWSE))
    assert web["page"][0] == 200
    assert "NoHype host" in web["page"][1]
    assert (web["head"], web["refused"]) == ([200, ""], 401)
    top = json.loads(host.nohype("top", "--once", "--json").stdout)
    for view in (web["host"], top):
        check_view(view, facts)
        assert not [vf for vf in view["vfs"] if vf["differences"] or vf["why"]]
    assert all(vcpu["ran"] is not None and vcpu["exits"] is not None for one in top["activity"] for vcpu in one["vcpus"])
    assert {name: len(rates) for name, rates in top["rates"].items()} == {guest["name"]: len(guest["cpus"]) for guest in guests}
    assert all(0 <= rate["ran"] < 1.5 for rates in top["rates"].values() for rate in rates)
    host.nohype("map", "--svg", "/run/map.svg")
    drawing = host.run("cat /run/map.svg; rm /run/map.svg").stdout
    for guest in guests:
        for core in guest["cores"]:
            assert f"core with CPUs {core}, socket" in drawing
        assert drawing.count(f"claimed by {guest['name']}<") == len(guest["cores"])
        assert guest["nics"][0]["address"] in drawing
    for name, kernel in facts["guests"].items():
        (owner,) = json.loads(host.nohype("who", kernel["affinity"][0], "--json").stdout)
        assert (owner["guest"], owner["by"]) == (name, "root")
        assert owner["since"].startswith("20")
    assert "guest guest1 (running), since " in host.nohype("who", guests[0]["nics"][0]["mac"]).stdout


def await_view(host: LabHost, is_reached: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 60
    while not is_reached(view := read_view(host)):
        assert time.monotonic() < deadline, view
        time.sleep(0.5)
    return view


def test_spoof_check_switched_off_by_hand_is_shown(host: LabHost, guests: list[dict[str, Any]]) -> None:
    nic = guests[0]["nics"][0]

    def differ(view: Any) -> list[str]:
        return [f"{vf['address']} {vf['guest']} {text}" for vf in view["vfs"] for text in vf["differences"]]

    setting = f"ip link set nic0 vf {nic['index']} spoofchk"
    with host.changed(f"{setting} off", f"{setting} on"):
        found = differ(await_view(host, lambda view: bool(differ(view))))
        assert found == [f"{nic['address']} guest1 spoof check is off, expected on"]
        assert f"! VF {nic['address']}: spoof check is off, expected on" in host.nohype("top", "--once").stdout
    await_view(host, lambda view: not differ(view))


@pytest.mark.usefixtures("guests")
def test_guest_that_ends_meanwhile_is_shown_as_stopped(host: LabHost) -> None:
    host.nohype("guest", "create", "brief", "--memory", "128M", "--image", "minimal")
    try:
        (before,) = (one for one in read_view(host)["activity"] if one["guest"] == "brief")
        assert all(vcpu["ran"] > 0 for vcpu in before["vcpus"]), "it runs"
        host.nohype("guest", "kill", "brief")
        view = await_view(host, lambda view: not [one for one in view["activity"] if one["guest"] == "brief"])
        (guest,) = (one for one in view["guests"] if one["name"] == "brief")
        assert guest["state"] == "stopped"
        assert [core["cpus"] for core in view["cores"] if core["guest"] == "brief"] == guest["cores"], "it keeps its cores"
        check_view(view, read_facts(host))  # its pages are free, and its VF has the defaults again
        assert not [vf for vf in view["vfs"] if vf["differences"]]
    finally:
        host.nohype("guest", "delete", "brief", check=False)
