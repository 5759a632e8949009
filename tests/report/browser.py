"""A real headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PATIENCE = 30.0


class Browser:
    """One page of one browser; everything it was asked to fetch or complained about is kept."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.last = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are kept."""
        self.last += 1
        self.socket.send(json.dumps({"id": self.last, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(PATIENCE))
            if message.get("id") == self.last:
                assert "error" not in message, f"{method}: {message}"
                return message["result"]
            self.events.append(message)

    def evaluate(self, code: str) -> Any:
        """Return the value of a JavaScript expression in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path: Path, *, width: int, dark: bool = False, mobile: bool = False) -> None:
        """Load a local file in a window of that width and wait until it is there."""
        self.events.clear()
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def until(self, code: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(code):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.05)

    def screenshot(self, path: Path, *, whole: bool = True) -> bytes:
        """Write a PNG of the whole page (or of the window) and return it."""
        image = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        path.write_bytes(image)
        return image

    def pdf(self, path: Path) -> bytes:
        """Print to a PDF file and return it."""
        data = base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])
        path.write_bytes(data)
        return data

    def seen(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == kind]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile and end it afterwards."""
    assert BINARY
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    command = [BINARY, *options, f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_page(profile / "DevToolsActivePort"), max_size=None, origin=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _page(port_file: Path) -> str:
    """Wait for the browser to write its port and return the address of its first page."""
    import httpx

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if port_file.exists() and (lines := port_file.read_text().split()):
            with httpx.Client(trust_env=False) as client:
                targets = client.get(f"http://127.0.0.1:{lines[0]}/json/list").json()
            pages = [target for target in targets if target["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise TimeoutError("Chromium did not open its DevTools port")
