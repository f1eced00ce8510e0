# SPDX-License-Identifier: Apache-2.0
"""Servers of several scheduler processes: each has its own pages on disk, and finds them again."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import Json, Server
from tests.support.workload import assert_healthy, random_tokens

pytestmark = pytest.mark.long

PAGE = 64
PROMPTS, LENGTH, ANSWER = 10, 600, 16
ENV = {
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",  # replicas on one NUMA node
}


def serve(model: Path, folder: Path, policy: str, *parallel: object) -> Server:
    """With less memory than the prompts take, so that pages come and go by all levels."""
    config = {"policy": policy, "memory_bytes": "8MiB", "host_bytes": "6MiB"}
    config |= {"disk_path": str(folder), "disk_bytes": "200MiB"}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    args += ["--chunked-prefill-size", "512", "--enable-cache-report"]
    return Server(model, *args, *parallel, env=ENV)


def ask(server: Server) -> list[Json]:
    rng = random.Random(4)
    prompts = [random_tokens(rng, LENGTH) for _ in range(PROMPTS)]
    # One by one, so that replicas take turns, and take the same ones again.
    return [server.generate(prompt, max_new_tokens=ANSWER) for prompt in prompts]


def outputs(answers: list[Json]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def all_stats(server: Server) -> list[Json]:
    stats = server.stats()
    return stats if isinstance(stats, list) else [stats]


@pytest.mark.parametrize(
    "parallel, policy",
    [("--tp-size", "lossless"), ("--dp-size", "lossless"), ("--tp-size", "diffxkv")],
)
def test_they_are_warm_after_a_restart(
    make_model: Callable[..., Path], tmp_path: Path, parallel: str, policy: str
) -> None:
    """With a policy that loses nothing all answers are equal."""
    model = make_model(dtype="float32", head_dim=64, layers=3)
    with serve(model, tmp_path, policy, parallel, 2) as server:
        expected = outputs(ask(server))
        assert outputs(ask(server)) == expected or policy != "lossless"
        offloaded = sum(x["host"]["offloaded"] for x in all_stats(server))
        assert offloaded > 0 or policy != "lossless", "compressed, they all fit"
        time.sleep(3)
        assert_healthy(server)
        server.kill()
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.segment")}
    assert len(folders) == 2, "one a process"
    with serve(model, tmp_path, policy, parallel, 2) as server:
        answers = ask(server)
        assert outputs(answers) == expected or policy != "lossless"
        found = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
        assert found > 0.5 * PROMPTS * (LENGTH // PAGE) * PAGE
        assert sum(x["disk"]["hits"] for x in all_stats(server)) > 0
        assert_healthy(server)
        assert "Found rank divergence" not in server.log_text()
