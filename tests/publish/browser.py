"""Headless Chromium over its debugging pipe: enough to open a page, listen to it, and look at it. No driver is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@dataclass
class Seen:
    """What a page did while it was open: requests it made, what it wrote to the console, and how wide it is."""

    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    width: int = 0
    screenshot: bytes = b""


@dataclass(frozen=True, slots=True)
class Tab:
    """A page that is open."""

    send: Callable[[str, dict[str, Any]], dict[str, Any]]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.send(method, params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")


class Browser:
    """One Chromium. Commands go down one pipe as JSON that ends in a zero byte, answers and events come up the other."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        down_read, self._down = os.pipe()
        up, up_write = os.pipe()

        def hand_over() -> None:  # the browser wants its pipe at 3 and 4
            os.dup2(os.dup(down_read), 3)
            os.dup2(os.dup(up_write), 4)

        self._process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
            ],
            preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down_read)
        os.close(up_write)
        self._up = os.fdopen(up, "rb")
        self._serial = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._down)
        self._up.close()

    @contextlib.contextmanager
    def tab(self, url: str, width: int = 1280, *, dark: bool = False) -> Iterator[Tab]:
        """Open ``url`` in a tab ``width`` CSS pixels wide; it is loaded."""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = Tab(lambda method, params: self._call(method, params, session))
        for domain in ("Page", "Network", "Log", "Runtime"):
            tab.call(f"{domain}.enable")
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        tab.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        tab.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        yield tab
        self._call("Target.closeTarget", {"targetId": target})

    def look(self, page: Path, width: int, *, dark: bool = False, tall: bool = False) -> Seen:
        """Open ``page`` in a tab ``width`` CSS pixels wide. tall: the screenshot is of the whole page."""
        seen = Seen()
        with self.tab(page.as_uri(), width, dark=dark) as tab:
            seen.width = int(tab.evaluate("document.documentElement.scrollWidth"))
            picture = tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=tall)
            seen.screenshot = base64.b64decode(picture["data"])
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                seen.requests.append(event["params"]["request"]["url"])
            elif event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                seen.console.append(json.dumps(event["params"]))
        return seen

    def _call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._serial += 1
        message = {"id": self._serial, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._serial:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _read(self) -> dict[str, Any]:
        parts = []
        while (byte := self._up.read(1)) != b"\0":
            assert byte, "the browser is gone"
            parts.append(byte)
        message: dict[str, Any] = json.loads(b"".join(parts))
        return message
