"""A real browser without a window, driven over the DevTools protocol: Qt's Chromium from PyPI, or one on the PATH."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp

#: Chromium and what is made of it, by the names they are installed under
_INSTALLED = ("chromium", "chromium-headless-shell", "google-chrome", "chrome", "microsoft-edge")
_QT = """
import sys
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
application = QApplication(sys.argv)
view = QWebEngineView()
view.resize(1280, 900)
view.setHtml("")
view.show()
application.exec()
"""
_PATIENCE = 30.0


class NoBrowserError(Exception):
    """No browser could be started; the message says what was tried."""


class Page:
    """One open page: what it logged, what it asked of the network, and what it answers to JavaScript."""

    def __init__(self, address: str) -> None:
        self.logged: list[str] = []
        self.requested: list[str] = []
        self._loaded, self._count = False, 0
        self._loop = asyncio.new_event_loop()
        self._session, self._socket = self._loop.run_until_complete(self._connect(address))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    @staticmethod
    async def _connect(address: str):
        session = aiohttp.ClientSession()
        return session, await session.ws_connect(address, max_msg_size=0)

    def close(self) -> None:
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def send(self, method: str, **params):
        """The result of one command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        self._loop.run_until_complete(self._socket.send_json(message))
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict:
        answer = self._loop.run_until_complete(
            asyncio.wait_for(self._socket.receive_json(), timeout=_PATIENCE)
        )
        values = answer.get("params", {})
        match answer.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requested.append(values["request"]["url"])
            case "Runtime.exceptionThrown":
                self.logged.append(str(values["exceptionDetails"]))
            case "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.logged.append(str(values.get("entry") or values))
        return answer

    def open(self, place: Path | str) -> None:
        """Returns when the file, or what is at the address, is loaded."""
        self.logged.clear()
        self.requested.clear()
        self._loaded = False
        self.send("Page.navigate", url=place if isinstance(place, str) else place.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; of a promise, what it promises."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Returns when the JavaScript condition holds."""
        until = time.monotonic() + _PATIENCE
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < until, (
                f"never true: {condition}; logged: {self.logged}; {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.05)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses and releases a key that has a name, such as Tab or Enter."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36}[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Types a text into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Presses and releases the mouse in the middle of an element."""
        quoted = json.dumps(selector)
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({quoted});"
            " e.scrollIntoView({block: 'center', inline: 'center'});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def dark(self, wanted: bool) -> None:
        value = "dark" if wanted else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser():
    """An open page in the first browser that starts.

    Raises:
        NoBrowserError: none does.
    """
    reasons = []
    for name, command, more in _candidates():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            port = _free_port()
            log = Path(profile) / "log"
            options = [
                f"--remote-debugging-port={port}",
                f"--user-data-dir={profile}/profile",
                "--remote-allow-origins=*",
                "--no-sandbox",  # it shows nothing but what the tests wrote, and the sandbox refuses to run as root
                "--disable-gpu",
                "--no-first-run",
            ]
            environment = {
                **os.environ,
                "QT_QPA_PLATFORM": "offscreen",
                "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(options),
            }
            with log.open("w") as stream:
                process = subprocess.Popen(
                    [*command, *(options if more else [])], stdout=stream, stderr=stream, env=environment
                )
            try:
                address = _address(process, port)
                if address is None:
                    last = log.read_text(errors="replace").strip().splitlines()[-1:]
                    reasons.append(f"{name} does not start: {' '.join(last)}")
                    continue
                page = Page(address)
                try:
                    yield page
                finally:
                    page.close()
                return
            finally:
                process.kill()
                process.wait()
    raise NoBrowserError("; ".join(reasons) or "neither PySide6-WebEngine nor a Chromium is installed")


def _candidates():
    """Name, command, and whether it takes Chromium's options: the pinned one first, which is the same everywhere."""
    if importlib.util.find_spec("PySide6") and importlib.util.find_spec("PySide6.QtWebEngineWidgets"):
        yield "PySide6-WebEngine", [sys.executable, "-c", _QT], False
    for name in _INSTALLED:
        if found := shutil.which(name):
            yield name, [found, "--headless", "about:blank"], True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _address(process: subprocess.Popen, port: int) -> str | None:
    """Where to speak to the first page; None where the browser ends or does not answer."""
    until = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        except OSError:
            pass
        time.sleep(0.05)
    return None
