"""A real Chromium without a window, driven through its DevTools protocol over a pipe."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_PATIENCE = 30  # seconds


class Browser:
    """One page of a browser. `errors` are what it has said of errors on its console."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for its profile."""
        pipes = (*os.pipe(), *os.pipe())
        # Above 3 and 4, which are the browser's.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes]
        for end in pipes:
            os.close(end)
        hear, self._hears, self._says, say = ends
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        # It reads from descriptor 3 and writes to 4.
        line = f'exec "$@" 3<&{hear} 4>&{say} {hear}<&- {say}>&-'
        command = ["bash", "-c", line, "bash", CHROMIUM, *flags, f"--user-data-dir={folder}"]
        self._process = subprocess.Popen(
            command, pass_fds=(hear, say), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(hear)
        os.close(say)
        self._numbers = itertools.count(1)
        self._read = b""
        self._session = None
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(1280, 900)

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(_PATIENCE)
        os.close(self._hears)
        os.close(self._says)

    def call(self, method: str, **params: object) -> dict:
        """Call a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._hears, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._heed(answer)

    def _next(self) -> dict:
        while b"\0" not in self._read:
            got = os.read(self._says, 1 << 20)
            assert got, "the browser has ended"
            self._read += got
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _heed(self, event: dict) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["exception"]["description"])
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str(params["args"]))

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in pixels; below 500 that of a telephone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def open(self, url: str) -> float:
        """Load a page anew; the seconds until its program has drawn it."""
        self.call("Page.navigate", url="about:blank")
        started = time.monotonic()
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.body.dataset.shown")
        return time.monotonic() - started

    def js(self, expression: str) -> object:
        """The value of an expression, that of its promise if it is one."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never: {condition}; {self.errors}"
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        """What the elements that are not hidden hold, in sight or not."""
        return self.js(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".filter((e) => e.checkVisibility()).map((e) => e.textContent)"
        )

    def click(self, selector: str) -> None:
        """Click with the mouse on the middle of the first such element."""
        one = f"document.querySelector({json.dumps(selector)})"
        self.wait(one)
        self.js(f"{one}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.js(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"({one}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def type(self, text: str) -> None:
        """Type into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, file: Path, *, dark: bool = False) -> None:
        """Write what is in the window as a PNG file."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        shot = self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that is closed at the end."""
    made = Browser(folder)
    try:
        yield made
    finally:
        made.close()
