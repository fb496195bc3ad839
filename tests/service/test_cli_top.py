"""`nohype top` and `nohype map --svg`: what people see of a host with guests in several states."""

from __future__ import annotations

import json
import re
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli.main import nohype
from orchestrator.cli.map_svg import draw_svg
from orchestrator.cli.top_pages import PAGES, Reading
from orchestrator.client.host_shapes import Host
from orchestrator.errors import NoRoom, RequestError
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import Served
from tests.harness.example_host import GUESTS, HOSTILE, serve_example
from tests.harness.terminal import Terminal, run_on_terminal

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_example(tmp_path_factory.mktemp("example")) as served:
        yield served


def run(served: Served, *words: str) -> Result:
    return CliRunner().invoke(nohype, ["--socket", str(served.path), *words], catch_exceptions=False)


def test_all_pages_are_printed_once(served: Served) -> None:
    lines = run(served, "top", "--once").output.splitlines()
    assert [line for line in lines if line.startswith("--- ")] == [f"--- {name}" for name, _ in PAGES.values()]
    rows = {line.split()[0]: line for line in lines if " pass, " in line or "FAIL" in line or "not audited" in line}
    assert "2 pass, " in rows["web"]
    assert "1 pass, 1 not measured" in rows["db"]
    assert "FAIL core-exclusive" in rows["batch"]
    assert "not audited" in rows["idle"]


def test_what_needs_a_person_is_on_top_with_the_command(served: Served) -> None:
    lines = run(served, "top", "--once").output.splitlines()
    alerts = [line for line in lines[: lines.index("--- cores")] if line.startswith("!")]
    assert any("batch differs from its claim: suspended -> nohype events --guest batch" in line for line in alerts)
    assert any("proof core-exclusive of batch failed" in line and line.endswith("-> nohype audit") for line in alerts)


def test_json_is_the_document_with_rates(served: Served) -> None:
    found = json.loads(run(served, "top", "--once", "--json").output)
    assert {guest["name"] for guest in found["guests"]} == set(GUESTS)
    assert set(found["rates"]) == set(GUESTS) - {"idle"}
    assert all(vcpu["ran"] == 0 and vcpu["classes"] is not None for vcpus in found["rates"].values() for vcpu in vcpus)


def test_plan_says_whether_a_guest_fits_now_and_why_not(served: Served, tmp_path: Path) -> None:
    def plan(**fields: object) -> tuple[list[str], dict[str, Any]]:
        file = tmp_path / "request.json"
        file.write_text(json.dumps({"name": "next", "image": IMAGE, "memory": "64M", **fields}))
        head = run(served, "top", "--once", "--plan", str(file)).output.partition("--- ")[0]
        return head.splitlines(), json.loads(run(served, "top", "--once", "--json", "--plan", str(file)).output)["plan"]

    lines, found = plan(cores=2)
    assert found["fits"]
    assert any(line.startswith("plan next: fits now: CPUs ") for line in lines)
    made = served.client.create({"name": "next", "image": IMAGE, "memory": "64M", "cores": 2})
    assert f"CPUs {', '.join(made['cores'])} of node {made['node']}" in found["text"]
    served.client.delete("next")
    for fields, reason in (({"cores": 15}, "whole cores are free"), ({"memory": "64G"}, "huge pages of 2M are free")):
        lines, found = plan(**fields)
        assert not found["fits"]
        assert any(line.startswith("plan next: refused now: ") for line in lines)
        assert any(reason in one for one in found["reasons"]), found
        assert all(f"  {one}" in lines for one in found["reasons"])
    assert "refused now: the name web is taken" in plan(name="web")[1]["text"]
    assert "refused now: " in plan(image="none")[1]["text"]
    assert len(served.client.guests()) == len(GUESTS), "nothing was claimed"


@pytest.mark.parametrize("text", ["", "[]", "{", "1", "\udcff"])
def test_plan_of_a_file_without_a_request_is_a_clear_error(served: Served, tmp_path: Path, text: str) -> None:
    file = tmp_path / "request.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match="is not "):
        run(served, "top", "--once", "--plan", str(file))


def test_largest_guest_of_a_node_gets_room_and_a_larger_one_does_not(served: Served, tmp_path: Path) -> None:
    page = run(served, "top", "--once").output.partition("--- nodes\n")[2]
    sizes = re.findall(r"(\d+) cores, (\d+)M$", page.partition("--- ")[0], re.MULTILINE)
    assert len(sizes) == 2
    for cores, memory in sizes:
        served.client.plan({"name": "next", "image": IMAGE, "memory": f"{memory}M", "cores": int(cores)})
    most = max(int(cores) for cores, _ in sizes)
    with pytest.raises(NoRoom):
        served.client.plan({"name": "next", "image": IMAGE, "memory": "64M", "cores": most + 1})


def test_vf_with_a_setting_that_differs_is_marked_and_red(served: Served) -> None:
    host = served.client.host()
    reading = Reading(host, {}, {})
    assert not [line for line, colour in PAGES["3"][1](reading, 200) if colour or "!" in line]
    vf = next(vf for vf in host["vfs"] if vf["guest"] == "web")
    vf |= {"spoof_check": False, "differences": ["spoof check is off, expected on"]}
    lines = [line for line, colour in PAGES["3"][1](reading, 200) if colour == "red"]
    assert len(lines) == 2
    assert vf["address"] in lines[0]
    assert lines[0].endswith("web !")
    assert re.search(r" off +off +vepa ", lines[0])
    assert lines[1] == f"! VF {vf['address']}: spoof check is off, expected on"
    vf |= {"spoof_check": None, "differences": [], "why": "no such device"}
    assert (f"not measured, VF {vf['address']}: no such device", "yellow") in list(PAGES["3"][1](reading, 200))


@pytest.fixture
def terminal(served: Served) -> Iterator[Terminal]:
    with run_on_terminal("--socket", str(served.path), "top", "--interval", "1", size=(120, 40)) as terminal:
        terminal.until(b"EXITS/S")
        yield terminal


def test_keys_choose_the_page_and_end(terminal: Terminal) -> None:
    terminal.type(b"3")
    terminal.until(b"0000:10:10.0")
    terminal.type(b"5")
    terminal.until(b"LAST MINUTE")
    terminal.type(b"q")
    assert terminal.wait() == 0
    assert terminal.mode == terminal.before
    assert terminal.shown.endswith(b"\x1b[?1049l")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored_after_a_signal(terminal: Terminal, number: signal.Signals) -> None:
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    assert terminal.mode == terminal.before
    assert terminal.shown.endswith(b"\x1b[?1049l")


def test_manager_that_ends_is_reported_and_keys_still_work(tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(serve_example(tmp_path))
        words = ("--socket", str(served.path), "top", "--interval", "1")
        with run_on_terminal(*words, size=(160, 40)) as terminal:
            terminal.until(b"EXITS/S")
            stack.close()
            terminal.until(b"\x1b[31mvalues of ")
            terminal.type(b"q")
            assert terminal.wait() == 0


def test_small_terminal_says_what_is_missing(served: Served) -> None:
    with run_on_terminal("--socket", str(served.path), "top", size=(40, 6)) as terminal:
        terminal.until(b"more lines")
        terminal.type(b"\x03")
        assert terminal.wait() == 0


def parse(host: Host) -> ET.Element:
    return ET.fromstring("".join(draw_svg(host)))


def test_picture_shows_each_core_with_its_owner(served: Served) -> None:
    host = served.client.host()
    titles = [title.text or "" for title in parse(host).iter(f"{SVG}title")]
    for core in host["cores"]:
        wanted = f"core with CPUs {core['cpus']}, socket {core['socket']}: {core['use']}"
        assert titles.count(f"{wanted} by {core['guest']}" if core["guest"] else wanted) == 1
    for pf in host["survey"]["pfs"]:
        assert all(sum(vf["address"] in title for title in titles) == 1 for vf in pf["vfs"])


def test_picture_is_one_file_without_scripts_whatever_names_are(served: Served) -> None:
    host = served.client.host()
    host["guests"][0]["name"] = host["cores"][1]["guest"] = f"\x1b]0;x\x07\x00{HOSTILE}\ud800"
    host["lights"][1]["subject"] = host["guests"][0]["name"]
    host["survey"]["pfs"][0]["interface"] = '"><script/>'
    picture = parse(host)
    names = {element.tag for element in picture.iter()}
    assert names <= {f"{SVG}{name}" for name in ("svg", "title", "style", "rect", "g", "text")}
    for element in picture.iter():
        assert not [name for name in element.attrib if name.startswith("on") or "href" in name]
    texts = "".join(element.text or "" for element in picture.iter())
    assert HOSTILE in texts
    assert "url(" not in texts
    assert "@import" not in texts


def test_verdict_that_is_missing_is_never_green(served: Served) -> None:
    host = served.client.host()
    for text in parse(host).iter(f"{SVG}text"):
        words = text.text or ""
        if "not measured" in words or "not audited" in words or "FAIL" in words or "outdated" in words:
            assert text.get("class") in ("open", "bad"), words


def test_picture_is_written_to_a_file(served: Served, tmp_path: Path) -> None:
    assert run(served, "map", "--svg", str(tmp_path / "host.svg")).exit_code == 0
    assert ET.parse(tmp_path / "host.svg").getroot().tag == f"{SVG}svg"
    failed = CliRunner().invoke(nohype, ["--socket", str(served.path), "map", "--svg", str(tmp_path / "none" / "host.svg")])
    assert failed.exit_code == 1
    assert "Could not open file" in failed.output


def test_large_host_is_drawn_with_each_core(tmp_path: Path) -> None:
    with serve_example(tmp_path, Server(cores=1000, nodes=4, vfs=64, pages=4096, disks=1)) as served:
        host = served.client.host()
    picture = parse(host)
    cores = [title for title in picture.iter(f"{SVG}title") if (title.text or "").startswith("core ")]
    assert len(cores) == 1000
    assert int(picture.get("width", "")) <= 1200
    reading = Reading(host, {}, {})
    assert all(list(show(reading, 80)) for _, show in PAGES.values())
