# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus with the configuration of `deploy/monitoring`, that watches one server."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import requests
import yaml

from sglang_diffxkv.launch import free_port
from tests.support.monitoring import FOLDER

PROMETHEUS = shutil.which("prometheus")
STARTS_IN_S = 60


class Prometheus:
    """As a context manager; `folder` is empty, and for its files. Scrapes every second."""

    def __init__(self, watched: str, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        for path in (FOLDER / "prometheus").glob("*.yml"):
            shutil.copy(path, folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        targets = [{"targets": [urlsplit(watched).netloc]}]
        (folder / "servers.yml").write_text(yaml.safe_dump(targets))

    def __enter__(self) -> Self:
        command = [str(PROMETHEUS), f"--config.file={self._folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={self._folder / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{self._port}"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + STARTS_IN_S
        while not self._is_up():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.2)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _is_up(self) -> bool:
        """Whether it answers, and has seen the server."""
        try:
            return any(sample["value"][1] == "1" for sample in self.query("up"))
        except requests.ConnectionError:
            return False

    def query(self, expression: str) -> list[Any]:
        """Samples of a PromQL expression, now."""
        answer = self._get("query", query=expression)
        assert answer["status"] == "success", (expression, answer)
        found: list[Any] = answer["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """The alerts, with their health."""
        groups = self._get("rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _get(self, what: str, **params: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{what}"
        return requests.get(url, params=params, timeout=30).json()
