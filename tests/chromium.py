"""Drives a headless Chromium by its own protocol, over two pipes."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")


class Tab:
    """A page in a browser."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]):
        self._commands, self._answers = commands, answers
        self._number, self._session = 0, ""
        self.messages: list[dict[str, Any]] = []
        """What the browser said without being asked."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: object) -> Any:
        """Call a method of the protocol; answers are found by their number, since events come between them."""
        self._number += 1
        question = {"id": self._number, "method": method, "params": params}
        question |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(question).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.messages.append(answer)
        return answer.get("result", {})

    def open(self, page: Path, width: int = 1000, height: int = 800) -> None:
        """Show a file in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=page.as_uri())

    def value(self, expression: str) -> Any:
        """Return what an expression in JavaScript yields; None while a page is loading."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer or "navigat" in str(answer), answer
        return answer.get("result", {}).get("value")

    def errors(self) -> list[dict[str, Any]]:
        """Return what went wrong in its pages."""
        return [said for said in self.messages if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def _next(self) -> dict[str, Any]:
        text = b""
        while not text.endswith(b"\0"):
            byte = self._answers.read(1)
            assert byte, "the browser has ended"
            text += byte
        return dict(json.loads(text[:-1]))


@contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """Start a browser whose profile is in a folder, and end it afterwards."""
    (for_browser, commands), (answers, from_browser) = os.pipe(), os.pipe()
    options = [*OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    script = f'exec "$@" 3<&{for_browser} 4>&{from_browser}'
    with subprocess.Popen(
        ["bash", "-c", script, "browser", str(BROWSER), *options],
        pass_fds=(for_browser, from_browser),
        stderr=subprocess.DEVNULL,
    ) as browser:
        os.close(for_browser)
        os.close(from_browser)
        try:
            with os.fdopen(commands, "wb", 0) as to_browser, os.fdopen(answers, "rb") as from_it:
                yield Tab(to_browser, from_it)
        finally:
            browser.terminate()
