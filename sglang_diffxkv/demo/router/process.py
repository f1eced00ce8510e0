# SPDX-License-Identifier: Apache-2.0
"""Runs SGLang's router, the package `sglang-router`, as a subprocess in front of workers."""

import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import requests

from sglang_diffxkv.launch import ServerError, free_port, server_environment

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.2


def require_router() -> None:
    """Raise ServerError where the package is not installed, as it is optional."""
    if find_spec("sglang_router") is None:
        raise ServerError("no router is installed: pip install 'sglang-diffxkv[router]'")


class RouterProcess:
    """The router with `args`, from entering the context (it then knows the workers) to leaving it.

    Attributes:
        url: where it answers.
        metrics_url: where its Prometheus metrics are.
        log: the file that its output goes to.
    """

    def __init__(self, workers: Sequence[str], *args: object, log: Path) -> None:
        """`workers` are addresses of servers that answer."""
        port, metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self.log = log
        self._workers = len(workers)
        command: list[object] = [sys.executable, "-m", "sglang_router.launch_router"]
        command += ["--host", "127.0.0.1", "--port", port, "--worker-urls", *workers]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", metrics_port, *args]
        self._command = [str(part) for part in command]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                # The folder it is started in must not hide packages that it imports.
                env=server_environment() | {"PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # as the workers, whose program ends it
            )
        try:
            self._wait_for_workers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the router; harmless where it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def healthy_workers(self) -> int:
        """How many workers it sends requests to; 0 where it does not answer."""
        try:
            workers = requests.get(f"{self.url}/workers", timeout=5).json()["workers"]
        except (requests.RequestException, KeyError):
            return 0
        return sum(worker["is_healthy"] for worker in workers)

    def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            if self.healthy_workers() == self._workers:
                return
            time.sleep(_POLL_S)
        tail = self.log.read_text(errors="replace")[-2000:]
        raise ServerError(f"the router did not find its {self._workers} workers\n{tail}")
