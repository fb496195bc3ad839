"""The page of `nohype web` in a real headless Chromium. ``NOHYPE_SCREENSHOTS=FOLDER`` keeps pictures of it."""

from __future__ import annotations

import os
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.server import Server
from tests.harness import browser as harness
from tests.harness.api_server import Served
from tests.harness.browser import Browser, start_browser
from tests.harness.example_host import GUESTS, HOSTILE, serve_example, set_activity
from tests.service.test_web import run_server

pytestmark = pytest.mark.skipif(
    not (harness.BROWSER and harness.DRIVER), reason="Chromium is not installed: apt-get install chromium chromium-driver"
)

ATTACK = f"\x1b]0;x\x07<img src=x onerror=alert(1)>{HOSTILE}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with start_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_example(tmp_path_factory.mktemp("example")) as served:
        yield served


@pytest.fixture(scope="module")
def page(served: Served, browser: Browser) -> Iterator[Browser]:
    with run_server(served.client) as web:
        browser.open(web.address)
        browser.until("document.querySelectorAll('#guests tr').length === 4")
        yield browser


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("NOHYPE_SCREENSHOTS"):
        for scheme in ("light", "dark"):
            browser.set_scheme(scheme)
            browser.screenshot(Path(folder) / f"{name}-{scheme}.png")
        browser.set_scheme("light")


def cells(page: Browser, guest: str) -> dict[str, str]:
    """Text and class of the cells of a guest's row, by number."""
    rows: list[list[str]] = page.run(
        "return [...document.querySelectorAll('#guests tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    return {str(number): text for row in rows if row[0].split()[-1] == guest for number, text in enumerate(row)}


def test_page_shows_the_host_without_a_violation_of_its_policy(page: Browser, served: Served) -> None:
    assert page.run("return location.hash") == ""
    assert {cells(page, name)["1"] for name in GUESTS} == {"running", "stopped"}
    assert page.run("return document.querySelectorAll('#cores .cell').length") == 16
    assert "suspended" in page.run("return document.getElementById('attention').innerText")
    keep(page, "host")
    # The icon that browsers ask for is not there.
    assert [message for message in page.messages() if "favicon.ico" not in message] == []


def test_rates_are_shown_live(page: Browser, served: Served) -> None:
    started = time.monotonic()
    deadline = started + 120
    while cells(page, "web")["6"] in ("-", "0.0"):
        set_activity(served, time.monotonic() - started)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    found = cells(page, "web")
    assert found["4"].endswith("%")
    assert "msr" in found["7"]
    assert cells(page, "idle")["6"] == "-"


def test_only_complete_proofs_are_green(page: Browser) -> None:
    kinds = page.run("return [...document.querySelectorAll('#guests tr')].map(r => [r.cells[0].innerText, r.cells[8].className])")
    assert {name.split()[-1]: kind for name, kind in kinds} == {"web": "pass", "db": "open", "batch": "fail", "idle": "open"}
    rows = page.run("return [...document.querySelectorAll('#proofs tr')].map(r => [r.cells[2].innerText, r.cells[2].className])")
    assert {kind for verdict, kind in rows if verdict != "pass"} == {"open", "fail"}


def test_hostile_text_is_shown_as_text(page: Browser) -> None:
    assert HOSTILE in page.run("return document.getElementById('proofs').innerText")
    assert page.run("return document.querySelectorAll('script, img, iframe').length") == 1  # the page's own script


def test_page_cannot_be_made_to_run_or_load_anything_else(page: Browser) -> None:
    """What a hostile text could do if it became markup after all."""
    for attack in (
        "document.body.innerHTML = '<img src=x>'",
        "document.createElement('script').src = '/app.js'",
        "document.body.insertAdjacentHTML('beforeend', 'x')",
        "await fetch('http://127.0.0.1:1/')",
    ):
        assert page.run_async(f"{{ {attack}; return 'done'; }}") == "TypeError", attack
    page.messages()  # violations of the policy, as they should be


def test_page_of_another_site_gets_and_changes_nothing(page: Browser, served: Served, tmp_path: Path) -> None:
    """Another port of the same host is another site for scripts, though not for cookies."""
    target = page.run("return location.origin")
    version = served.client.guest("web")["version"]
    with run_server(served.client) as other:
        back = page.run("return location.href")
        page.open(f"http://localhost:{other.server_port}/style.css")
        assert page.run("return sessionStorage.getItem('nohype-token')") is None
        page.open("data:text/html,<title>evil</title>")  # without a policy of its own
        for request in (
            f"fetch('{target}/v1/guests')", f"fetch('{target}/v1/guests/web/kill', {{method: 'POST'}})",
            f"fetch('{target}/v1/guests', {{headers: {{Authorization: 'Bearer x'}}}})",
        ):  # fmt: skip
            assert page.run_async(f"{{ return (await {request}).status; }}") == "TypeError"
        assert page.run_async(f"{{ return (await fetch('{target}/', {{mode: 'no-cors'}})).type; }}") == "TypeError"
        page.open(back)
    assert served.client.guest("web")["version"] == version
    # The session is that of the tab and the origin.
    page.until("document.querySelectorAll('#guests tr').length === 4")


def test_guest_is_stopped_and_started_by_the_keyboard(page: Browser, served: Served) -> None:
    page.type("button[aria-label='start: guest idle']", "\ue007")  # Enter
    page.until("document.querySelector(\"button[aria-label='stop: guest idle']\")")
    assert served.client.guest("idle")["state"] == "running"
    page.type("button[aria-label='force off: guest idle']", "\ue007")
    page.accept_question()
    page.until("document.querySelector(\"button[aria-label='start: guest idle']\")")
    assert served.client.guest("idle")["state"] == "stopped"


def test_arrow_keys_move_in_the_map(page: Browser) -> None:
    page.run("document.querySelector('#cores .cell').focus()")
    page.type("#cores .cell[tabindex='0']", "\ue014\ue014")  # right
    assert page.run("return document.activeElement.title") == page.run(
        "return document.querySelectorAll('#cores .cell')[2].title"
    )
    page.type("#cores .cell[tabindex='0']", "\ue010")  # end
    assert page.run("return document.getElementById('core').textContent").startswith("core with CPUs 30-31")
    assert page.run("return document.querySelectorAll(\"#cores .cell[tabindex='0']\").length") == 1


def test_console_shows_text_and_passes_lines(page: Browser, served: Served) -> None:
    ours, theirs = os.openpty()
    try:
        tty.setraw(theirs)
        served.world.hypervisor.ptys["web"] = Path(os.ttyname(theirs))
        page.click("button[aria-label='console: guest web']")
        page.until("!document.getElementById('console').hidden")
        served.world.hypervisor.write("web", b"login: \x1b[31mred\x1b[0m " + ATTACK.encode() + b"\x1b[")
        served.world.hypervisor.write("web", b"2Jend\r\n")
        page.until("document.getElementById('screen').textContent.includes('end')")
        shown = page.run("return document.getElementById('screen').textContent")
        assert shown == f"login: red <img src=x onerror=alert(1)>{HOSTILE}end\n"
        assert page.run("return document.querySelectorAll('#screen *').length") == 0
        keep(page, "console")
        page.type("#line", "uname -a\ue007")
        assert os.read(ours, 100) == b"uname -a\r"
        page.click("#interrupt")
        assert os.read(ours, 100) == b"\x03"
        page.click("#close")
    finally:
        os.close(ours)
        os.close(theirs)


def test_events_arrive_by_themselves(page: Browser, served: Served) -> None:
    served.client.create({"name": "later", "image": "minimal", "memory": "64M"})
    page.until("[...document.querySelectorAll('#events tr')].some(r => r.cells[1].innerText === 'later')")
    served.client.delete("later")
    page.until("document.querySelectorAll('#guests tr').length === 4")


def test_measuring_renews_the_age(page: Browser) -> None:
    page.click("#measure")
    page.until("/measured [0-9] s ago/.test(document.getElementById('age').textContent)")


def test_cpus_of_unmanaged_guests_are_marked(page: Browser, served: Served) -> None:
    xml = "<domain><name>db7</name><uuid>00000000-0000-0000-0000-000000000007</uuid><vcpu>1</vcpu></domain>"
    served.world.hypervisor.domains.define(xml, threads="28-29")
    found = "c => c.textContent === '@@' && c.title.endsWith('; unmanaged guest db7')"
    page.until(f"[...document.querySelectorAll('#cores .cell')].some({found})")


def test_thousand_cores_are_drawn_and_refreshed(browser: Browser, tmp_path: Path) -> None:
    server = Server(cores=1000, nodes=4, vfs=64, pages=4096, disks=1)
    with serve_example(tmp_path, server) as served, run_server(served.client) as web:
        browser.open(web.address)
        browser.until("document.querySelectorAll('#cores .cell').length === 1000")
        keep(browser, "large")
        cell = "document.querySelectorAll('#cores .cell')[1]"
        browser.run(f"window.kept = {cell}")
        served.client.delete("web")
        browser.until("document.querySelectorAll('#guests tr').length === 3")
        # Cells stay the same elements: one that has the focus keeps it.
        assert browser.run(f"return window.kept === {cell}")


def test_page_without_a_manager_says_how_old_it_is_and_is_not_green(browser: Browser, served: Served) -> None:
    colour = "getComputedStyle(document.querySelector('#guests .pass')).color"
    with run_server(served.client) as web:
        browser.open(web.address)
        browser.until("document.querySelectorAll('#guests .pass').length")
        fresh = browser.run(f"return {colour}")
    browser.until("!document.getElementById('stale').hidden")
    assert "the manager has not responded since" in browser.run("return document.getElementById('stale').textContent")
    assert browser.run(f"return {colour}") != fresh


def test_address_that_was_opened_shows_why_nothing_comes(browser: Browser, served: Served) -> None:
    with run_server(served.client) as web:
        web.session.open(web.session.word)
        browser.open(web.address)
        browser.until("document.getElementById('problem').textContent.includes('opened before')")
        assert browser.run("return document.querySelectorAll('#guests tr').length") == 0
