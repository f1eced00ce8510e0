# SPDX-License-Identifier: Apache-2.0
"""Prefixes that outlive the server: found again on disk, and not believed where damaged."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import Json, Server
from tests.support.workload import assert_healthy, random_tokens

PAGE = 64
PROMPTS, LENGTH, ANSWER = 8, 600, 24
BUSY = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(dtype="float32", head_dim=64, layers=3)


def serve(model: Path, folder: Path) -> Server:
    """Lossless, so that what was read from disk gives the answers that computing gives."""
    config = {"policy": "lossless", "memory_bytes": "14MiB", "host_bytes": "40MiB"}
    config |= {"disk_path": str(folder), "disk_bytes": "200MiB"}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    return Server(model, *args, "--chunked-prefill-size", "512", "--enable-cache-report", env=BUSY)


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [random_tokens(rng, LENGTH) for _ in range(PROMPTS)]


def ask(server: Server, seed: int) -> list[Json]:
    answers: list[Json] = server.generate_many(
        [{"prompt": prompt, "max_new_tokens": ANSWER} for prompt in prompts(seed)], workers=3
    )
    return answers


def outputs(answers: list[Json]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def cached(answers: list[Json]) -> list[int]:
    return [answer["meta_info"]["cached_tokens"] for answer in answers]


def wait_for_disk(server: Server, pages: int) -> None:
    deadline = time.monotonic() + 60
    while server.stats()["disk"]["pages"] < pages:
        assert time.monotonic() < deadline, server.stats()["disk"]
        time.sleep(0.2)


def test_a_restarted_server_is_warm(model: Path, tmp_path: Path) -> None:
    """It finds what an earlier one has written, but for what was damaged since."""
    with serve(model, tmp_path) as server:
        expected = [outputs(ask(server, seed)) for seed in (1, 2)]
        # The last page of a prompt may stay raw until memory is short.
        wait_for_disk(server, 2 * PROMPTS * (LENGTH // PAGE - 1))
        server.kill()
    for segment in sorted(tmp_path.rglob("*.segment"))[-1:]:
        with segment.open("r+b") as file:
            file.seek(segment.stat().st_size // 2)
            file.write(bytes(64))
    with serve(model, tmp_path) as server:
        answers = [ask(server, seed) for seed in (1, 2)]
        assert [outputs(turn) for turn in answers] == expected
        found = sum(sum(cached(turn)) for turn in answers)
        everything = 2 * PROMPTS * (LENGTH // PAGE) * PAGE
        assert 0.5 * everything < found < everything
        assert server.stats()["disk"]["errors"] >= 1
        assert "a record is damaged" in server.log_text()
        assert server.stats()["host"]["loaded_back"] > 0
        assert_healthy(server)
        last = outputs(ask(server, 3))
        server.kill()  # while it writes
    with serve(model, tmp_path) as server:
        answers = [ask(server, seed) for seed in (1, 2, 3)]
        assert [outputs(turn) for turn in answers] == [*expected, last]
        assert sum(sum(cached(turn)) for turn in answers[:2]) > 0.5 * everything
        assert_healthy(server)
        server.flush_cache()
        assert server.stats()["disk"]["pages"] == 0
        assert sum(cached(ask(server, 1))) == 0
        wait_for_disk(server, PROMPTS * (LENGTH // PAGE - 1))
        check_update_of_weights(server, model, expected[0])
        assert not any(path.stat().st_size for path in tmp_path.rglob("*.segment"))


def check_update_of_weights(server: Server, model: Path, expected: list[list[int]]) -> None:
    """Pages of the old weights are forgotten on every level, and those of the new ones, which the
    disk does not know, are not written."""
    update = server.post("/update_weights_from_disk", {"model_path": str(model)}).json()
    assert update["success"], update
    assert "disk: switched off until the server starts again" in server.log_text()
    answers = ask(server, 1)
    assert (outputs(answers), sum(cached(answers))) == (expected, 0)
    time.sleep(1)  # idle: it would write
    assert server.stats()["disk"]["pages"] == 0
    assert sum(cached(ask(server, 1))) > 0
    assert_healthy(server)
