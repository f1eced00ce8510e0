# SPDX-License-Identifier: Apache-2.0
"""Debian's Chromium, headless: DevTools commands and events through two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium")
_TIMEOUT_S = 60.0
_ROOT_NEEDS = ["--no-sandbox"] if os.geteuid() == 0 else []


class BrowserError(RuntimeError):
    """The browser ended, did not answer in time, or refused a command."""


class Browser:
    """One page of a browser, as a context manager.

    Attributes:
        problems: what it wrote to its console as warnings and errors, exceptions, and requests
            that failed, but for those that a server answered with a status.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._session: dict[str, str] = {}
        self._buffer, self._number = b"", 0

    def __enter__(self) -> Self:
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        child_in, self._commands = os.pipe()
        self._answers, child_out = os.pipe()
        assert CHROMIUM is not None, "there is no chromium here"
        options = [*_ROOT_NEEDS, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={self._profile}", "--remote-debugging-pipe", "about:blank"]
        # It reads commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{child_in} 4>&{child_out}', "bash", CHROMIUM, *options],
            pass_fds=(child_in, child_out),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(child_in)
        os.close(child_out)
        targets = self.command("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.command("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The JSON value of a JavaScript expression."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, script: str, accept: Callable[[Any], bool] = bool) -> Any:
        """The first value of an expression that is accepted; looks often."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not accept(value := self.run(script)):
            if time.monotonic() > deadline:
                raise BrowserError(f"{script} is still {value!r}; {self.problems}")
            time.sleep(0.1)
        return value

    def show(self, width: int, height: int, scheme: str) -> None:
        """Set the window's size, and whether the user prefers ``light`` or ``dark``."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """A PNG of the whole page."""
        answer = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._number:
                self._note(answer)
            elif "error" in answer:
                raise BrowserError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], _TIMEOUT_S)[0]:
                raise BrowserError(f"no answer within {_TIMEOUT_S:.0f} s")
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise BrowserError("the browser has ended")
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.loadingFailed":
            self.problems.append(str(params))
