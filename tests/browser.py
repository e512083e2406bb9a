"""Chromium without a screen, spoken to over the two pipes of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)


def chromium() -> str:
    """Return where Chromium is, or fail: a report that was not opened was not tested."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise AssertionError("there is no Chromium on PATH. `make test-slow` installs it when run as root.")


class Browser:
    """One tab; `events` holds all that the browser told of its own accord.

    Args:
        profile: a new and empty folder.
        timeout_s: after so long without an answer the browser is ended.
    """

    def __init__(self, profile: Path, timeout_s: int = 120) -> None:
        self.events: list[dict[str, Any]] = []
        self._profile, self._timeout_s = profile, timeout_s
        self._count, self._session, self._rest = 0, "", b""

    def __enter__(self) -> Browser:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()

        def three_and_four() -> None:
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        command = [chromium(), *FLAGS.split(), f"--user-data-dir={self._profile}", "about:blank"]
        # close_fds would close 3 and 4 again
        self._process = subprocess.Popen(
            command, preexec_fn=three_and_four, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        tab = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda told: told.get("id") == self._count)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        def late(*_: object) -> None:
            raise TimeoutError(f"Chromium said nothing for {self._timeout_s} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(self._timeout_s)
        try:
            while True:
                told = self._next()
                if "method" in told:
                    self.events.append(told)
                if wanted(told):
                    return told
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, page: Path, width: int, height: int) -> None:
        """Load a file into a window of that size, as a phone does: the width is that of the screen."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        self.call("Page.navigate", url=page.absolute().as_uri())
        if not any(told["method"] == "Page.loadEventFired" for told in self.events):
            self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """Return what an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def errors(self) -> list[str]:
        """Return what the page complained of."""
        bad = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        bad += [
            e for e in self.events if e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] != "verbose"
        ]
        bad += [e for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        return [json.dumps(e["params"]) for e in bad]

    def requested(self) -> list[str]:
        """Return the addresses that were asked for."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shown = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 0.5})
        path.write_bytes(base64.b64decode(shown["data"]))
