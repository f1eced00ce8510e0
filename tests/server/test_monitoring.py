# SPDX-License-Identifier: Apache-2.0
"""What dashboard and alerts ask for is what a server exposes: SGLang's names as much as ours."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_diffxkv import bundled_model
from sglang_diffxkv.metrics import LEVELS, PREFIX
from tests.support.harness import Server
from tests.support.monitoring import Labels, asked, exposed, expressions
from tests.support.workload import assert_healthy

CONFIG = {"memory_bytes": "24MiB"}
PROMPT = "Nobody on the quay knew the name of the ship that had left at dawn. " * 10
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}
"""SGLang exposes its counters of retractions once there is one."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    args = ["--attention-backend", "diffxkv", "--enable-metrics"]
    args += ["--diffxkv-config", json.dumps(CONFIG)]
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


def levels_that_are_off(server: Server) -> tuple[str, ...]:
    """Prefixes of metrics that this server does not have, with our names for the others' parts."""
    stats = server.stats()
    return tuple(f"{PREFIX}{level}_" for level in LEVELS if not stats.get(level))


@pytest.mark.parametrize("shows, expression", expressions())
def test_it_is_exposed(
    server: Server, samples: dict[str, list[Labels]], shows: str, expression: str
) -> None:
    ours = {f"{PREFIX}{level}_{key}" for level, keys in LEVELS.items() for key in keys}
    found = list(asked(expression))
    assert found, shows
    for name, wanted in found:
        if name.startswith(levels_that_are_off(server)):
            assert name in ours
            continue
        assert name in samples, f"{shows}: no server exposes {name}"
        matching = [labels for labels in samples[name] if wanted.items() <= labels.items()]
        assert matching, f"{shows}: {name} has {samples[name][0]}, not {wanted}"
