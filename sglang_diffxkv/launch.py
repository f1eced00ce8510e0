# SPDX-License-Identifier: Apache-2.0
"""Runs `sglang serve` as a subprocess of a command-line program, and ends it with all its children.

This is for programs that need a server for a while; it changes nothing about how SGLang serves.
"""

import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import requests

from sglang_diffxkv.client import Client

START_TIMEOUT_S = 600.0
_POLL_S = 0.3


class ServerError(RuntimeError):
    """A server that did not start, or ended; the text ends with the last lines of its log."""


class ServerProcess(Client):
    """`sglang serve` with `args`, from entering the context (it then answers) to leaving it.

    Requests raise `ServerError` where the server is gone.

    Attributes:
        url: where it answers, on a free port of the loopback interface.
        log: the file that its output goes to.
        start_seconds: from launch to the first answer, known once it runs.
    """

    def __init__(
        self,
        *args: object,
        log: Path,
        env: dict[str, str] | None = None,
        start_timeout: float = START_TIMEOUT_S,
    ) -> None:
        """`env` is added to the environment that the server inherits."""
        port = free_port()
        super().__init__(f"http://127.0.0.1:{port}")
        self.log = log
        self.start_seconds = 0.0
        self._env = server_environment() | (env or {})
        self._start_timeout = start_timeout
        # The script beside this interpreter: the environment need not be activated.
        sglang = Path(sys.executable).with_name("sglang")
        own = ("serve", "--host", "127.0.0.1", "--port", port, "--skip-server-warmup")
        self._command = [str(part) for part in (sglang, *own, *args)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers; again, at the same address, after it has ended."""
        begin = time.monotonic()
        self._process = self._launch()
        try:
            self._wait_until_healthy(begin + self._start_timeout)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin

    def _launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C reaches this program only, which then stops the server.
                start_new_session=True,
            )

    def stop(self) -> None:
        """End the server and all its children; harmless where it has ended."""
        tree = self._tree()
        # Children first: asked alone, the main process takes many seconds to drain.
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=3)
        self._kill(alive)

    def kill(self) -> None:
        """End all its processes at once, none of which is told: SIGKILL."""
        self._kill(self._tree())

    def _kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()
        self._process = None

    def _tree(self) -> list[psutil.Process]:
        """Its processes, the main one last."""
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(self._process.pid)
                return [*root.children(recursive=True), root]
        return []

    def is_alive(self) -> bool:
        """Whether the main process runs; SGLang ends it when its scheduler dies."""
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(line[:500] for line in self.log_text().splitlines()[-lines:])

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            return super()._request(method, path, **options)
        except requests.ConnectionError as error:
            raise ServerError(f"no answer to {method} {path}\n{self.log_tail()}") from error

    def _wait_until_healthy(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise ServerError(f"the server ended while starting\n{self.log_tail()}")
            if self.is_healthy():
                return
            time.sleep(_POLL_S)
        raise ServerError(f"no answer after {self._start_timeout:.0f} s\n{self.log_tail()}")


def server_environment() -> dict[str, str]:
    """This process's environment, less what makes a server start slowly."""
    env = dict(os.environ)
    # Three processes import some thousand modules each: never without their bytecode.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    # /health then answers once the server is up, without a request of its own.
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    return env


def default_device() -> str:
    """`cuda` where torch has one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def free_port() -> int:
    """A port below those that the kernel hands out: it is bound many seconds from now, and by then
    anything else on the machine could have been given one of those."""
    for port in random.SystemRandom().sample(range(10000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("no free port between 10000 and 32000")
