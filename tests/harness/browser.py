"""A real headless Chromium, driven by ChromeDriver (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name of an element's id in the protocol


class Browser:
    """One window."""

    def __init__(self, port: int, capabilities: dict[str, Any]) -> None:
        self._port = port
        self._session = ""
        self._session = self._call("POST", "session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def open(self, url: str) -> None:
        self._ask("POST", "url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """The value of a function's body in the page."""
        return self._ask("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str) -> Any:
        """The value of an asynchronous expression in the page; an exception becomes its name."""
        wrapped = f"const done = arguments[0]; (async () => {script})().then(done, (error) => done(error.name))"
        return self._ask("POST", "execute/async", {"script": wrapped, "args": []})

    def until(self, condition: str, seconds: float = 120) -> Any:
        """Waits until an expression of the page is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, (condition, self.run("return document.body.innerText"))
            time.sleep(0.1)
        return found

    def click(self, selector: str) -> None:
        self._ask("POST", f"element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._ask("POST", f"element/{self._find(selector)}/value", {"text": text})

    def accept_question(self) -> None:
        self._ask("POST", "alert/accept", {})

    def set_scheme(self, name: str) -> None:
        """ "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self._ask("POST", "goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def screenshot(self, file: Path) -> None:
        """Of the whole page."""
        params = {"format": "png", "captureBeyondViewport": True}
        found = self._ask("POST", "goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": params})
        file.write_bytes(base64.b64decode(found["data"]))

    def messages(self) -> list[str]:
        """Of the page's console since the last call: errors of scripts, violations of the policy."""
        return [entry["message"] for entry in self._ask("POST", "se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("DELETE", f"session/{self._session}")

    def _find(self, selector: str) -> str:
        return str(self._ask("POST", "element", {"using": "css selector", "value": selector})[_ELEMENT])

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        return self._call(method, f"session/{self._session}/{path}", body)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=180)
        try:
            connection.request(method, f"/{path}", None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value


@contextmanager
def start_browser(profile: Path) -> Iterator[Browser]:
    """``profile``: an empty folder."""
    assert DRIVER
    assert BROWSER
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert driver.stdout
        line = next(line for line in driver.stdout if "started successfully" in line)
        port = int(re.findall(r"port (\d+)", line)[0])
        options = {"binary": BROWSER, "args": [*_ARGUMENTS, f"--user-data-dir={profile}", "--window-size=1200,1600"]}
        # The manager's certificate on the TLS port is one of the tests.
        browser = Browser(
            port, {"acceptInsecureCerts": True, "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        )
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(60)
        if driver.stdout:
            driver.stdout.close()
