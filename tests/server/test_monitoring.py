# SPDX-License-Identifier: Apache-2.0
"""What dashboard and alerts ask for is what a server exposes: SGLang's names as much as ours."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_diffxkv import bundled_model
from sglang_diffxkv.metrics import LEVELS
from tests.support.harness import Server
from tests.support.monitoring import (
    Labels,
    alerts,
    asked,
    dashboard,
    exposed,
    expressions,
    filled_in,
)
from tests.support.prometheus import PROMETHEUS, Prometheus
from tests.support.workload import assert_healthy

CONFIG = {"memory_bytes": "24MiB", "host_bytes": "8MiB", "disk_bytes": "64MiB"}
PROMPT = "Nobody on the quay knew the name of the ship that had left at dawn. " * 10
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}
"""SGLang exposes its counters of retractions once there is one."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With all levels: one that is off has no metrics."""
    config = CONFIG | {"disk_path": str(tmp_path_factory.mktemp("disk"))}
    args = ["--attention-backend", "diffxkv", "--enable-metrics"]
    args += ["--diffxkv-config", json.dumps(config)]
    model = Path(bundled_model.__file__).parent
    with Server(model, *args, env=RETRACT) as server:
        yield server
        assert_healthy(server)


@pytest.fixture(scope="module")
def samples(server: Server) -> dict[str, list[Labels]]:
    """All that is exposed after some requests, one of which streams."""
    for _ in range(2):  # the second time they find their prefixes
        list(server.stream(PROMPT, max_new_tokens=8))
        items = [{"prompt": f"{PROMPT}{n}", "max_new_tokens": 60} for n in range(8)]
        server.generate_many(items)
    time.sleep(1.5)  # gauges are exported once a second at most
    server.generate(PROMPT, max_new_tokens=4)
    return exposed(server.get("/metrics").text)


def test_levels_say_all_that_statistics_do(server: Server) -> None:
    stats = server.stats()
    assert {level: set(stats[level]) for level in LEVELS} == {x: set(LEVELS[x]) for x in LEVELS}


@pytest.mark.parametrize("shows, expression", expressions())
def test_it_is_exposed(samples: dict[str, list[Labels]], shows: str, expression: str) -> None:
    found = list(asked(expression))
    assert found, shows
    for name, wanted in found:
        assert name in samples, f"{shows}: no server exposes {name}"
        matching = [labels for labels in samples[name] if wanted.items() <= labels.items()]
        assert matching, f"{shows}: {name} has {samples[name][0]}, not {wanted}"


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus: apt-get install prometheus")
def test_every_panel_shows_something(server: Server, tmp_path: Path) -> None:
    """In a real Prometheus, which takes all alerts, too."""
    with Prometheus(server.url, tmp_path) as prometheus:
        begin = time.monotonic()
        while time.monotonic() < begin + 8:
            list(server.stream(PROMPT, max_new_tokens=8))
            items = [{"prompt": f"{n}{PROMPT}", "max_new_tokens": 60} for n in range(4)]
            server.generate_many(items)
        time.sleep(2)  # the last are scraped
        panels = [panel for panel in dashboard()["panels"] if panel.get("targets")]
        empty = [
            (panel["title"], target["expr"])
            for panel in panels
            for target in panel["targets"]
            if not prometheus.query(filled_in(target["expr"], "10s"))
        ]
        assert empty == []
        rules = prometheus.rules()
        assert {rule["name"] for rule in rules} == {alert["alert"] for alert in alerts()}
        assert all(rule["health"] == "ok" for rule in rules), rules
