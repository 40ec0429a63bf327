"""A headless Chromium driven over the DevTools protocol on a pipe: no port, no further package."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
)
EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. Every wait ends after `deadline` seconds; `events` holds what the page reported meanwhile."""

    def __init__(self, profile: Path, deadline: float = 180.0) -> None:
        assert EXECUTABLE is not None
        self.deadline, self.events, self._buffer, self._serial = deadline, [], b"", 0
        read_here, write_there = os.pipe()
        read_there, self._out = os.pipe()
        self._in = read_here
        # Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
        script = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there} >/dev/null 2>&1'
        command = ["bash", "-c", script, EXECUTABLE, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(read_there, write_there))
        os.close(read_there)
        os.close(write_there)
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _receive(self, until: float) -> dict:
        while b"\0" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"chromium did not answer within {self.deadline} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("chromium ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params: object) -> dict:
        self._serial += 1
        message = {"id": self._serial, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self.deadline
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._serial:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path, width: int, height: int, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri())
        until = time.monotonic() + self.deadline
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive(until))

    def evaluate(self, expression: str, wait: bool = False) -> object:
        """The expression's value; with `wait` that of the promise that it gives."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=wait)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def point(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, whole: bool = True) -> bytes:
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def close(self) -> None:
        # Asked first: a killed browser leaves its helper processes behind.
        self._session = None
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(10)
        os.close(self._in)
        os.close(self._out)


def drawn(browser: Browser, page: Path, width: int, dark: bool) -> None:
    """It draws in that mode, nothing is wider than the window, it logs no error, it fetches nothing."""
    browser.open(page, width, 900, dark)
    image = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
    assert image.shape[1] == width and image.std() > 10
    assert (image.mean() < 100) == dark
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    wide = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('pre, svg, .scroll') && "
        "e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position !== 'absolute').length"
    )
    assert browser.evaluate(wide) == 0
    bad = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    assert [e for e in browser.events if e.get("method") in bad] == []
    urls = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith(("file://", "data:")) for url in urls) and urls


AXE = """axe.run(document, {resultTypes: ['violations']}).then(r => JSON.stringify(r.violations.map(
    v => v.id + ': ' + v.nodes.slice(0, 3).map(n => n.html.slice(0, 120)).join(' | '))))"""


def barriers(browser: Browser, page: Path, width: int, dark: bool) -> list[str]:
    """What axe-core finds, all folds open."""
    browser.open(page, width, 900, dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.evaluate(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8") + ";0")
    return json.loads(browser.evaluate(AXE, wait=True))
