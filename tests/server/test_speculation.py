# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding on whole servers: nothing that is lossless changes, whatever happens."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.demo_model import write_eagle_draft
from tests.support.harness import Json, Server
from tests.support.workload import (
    answer_in_json,
    assert_healthy,
    assert_same_outputs,
    expected_outputs,
    hang_up,
    mixed_prompts,
    outputs,
    random_tokens,
)

NODES = {"NGRAM": 8, "STANDALONE": 4, "EAGLE": 3}
MEMORY = {"NGRAM": "20MiB", "STANDALONE": "56MiB", "EAGLE": "28MiB"}
"""The draft model's KV is in it."""


@pytest.fixture(
    scope="module",
    params=["NGRAM", *(pytest.param(x, marks=pytest.mark.long) for x in ("STANDALONE", "EAGLE"))],
)
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def draft(algorithm: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """STANDALONE drafts with the model itself."""
    if algorithm == "EAGLE":
        return write_eagle_draft(tmp_path_factory.mktemp("eagle"))
    return model if algorithm == "STANDALONE" else None


@pytest.fixture(scope="module")
def server(algorithm: str, model: Path, draft: Path | None) -> Iterator[Server]:
    """Little memory and chunks of 128, so that all 16 workers' requests never fit together."""
    config = {"policy": "lossless", "memory_bytes": MEMORY[algorithm], "raw_share": 0.3}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    args += ["--chunked-prefill-size", "128", "--schedule-conservativeness", "0.1"]
    args += ["--constrained-json-disable-any-whitespace"]
    args += ["--speculative-algorithm", algorithm]
    args += ["--speculative-num-draft-tokens", str(NODES[algorithm])]
    args += ["--speculative-draft-model-path", str(draft)] if draft else []
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    with Server(model, *args, env=env) as server:
        yield server
        assert_healthy(server)


def accepted_length(answer: Json) -> float:
    """Tokens per verification, the target's own among them."""
    length: float = answer["meta_info"]["spec_accept_length"]
    return length


def test_outputs_equal_those_without(stock_server: Server, server: Server) -> None:
    """With prefix hits, chunks and eviction; again on pages that other requests have sealed."""
    prompts = mixed_prompts(seed=1, count=48)
    items = [{"prompt": p, "max_new_tokens": 8 + 5 * (i % 20)} for i, p in enumerate(prompts)]
    expected = expected_outputs(stock_server, items)
    answers = server.generate_many(items)
    assert_same_outputs(stock_server, prompts, expected, outputs(answers))
    assert sum(a["meta_info"]["cached_tokens"] for a in answers) > 1000
    counters = server.stats()["counters"]
    assert counters["sealed"] > 200 and counters["evicted"] > 0
    again = server.generate_many(items[2::3])
    assert_same_outputs(stock_server, prompts[2::3], expected[2::3], outputs(again))


def test_drafts_are_accepted(algorithm: str, stock_server: Server, server: Server) -> None:
    """NGRAM drafts what it has seen; a model that drafts for itself lacks the first token only.

    EAGLE's has learnt nothing.
    """
    prompt = random_tokens(random.Random(4), 900)
    first, second = (server.generate(prompt, max_new_tokens=96) for _ in range(2))
    (expected,) = expected_outputs(stock_server, [{"prompt": prompt, "max_new_tokens": 96}])
    assert first["output_ids"] == second["output_ids"] == expected
    assert accepted_length(second) > (1 if algorithm == "EAGLE" else 0.7 * NODES[algorithm])


def test_outputs_after_retraction(stock_server: Server, server: Server) -> None:
    rng = random.Random(6)
    prompts = [random_tokens(rng, rng.randint(10, 90)) for _ in range(16)]
    # where EOS is not ignored SGLang admits on an estimate of the length, here far too low
    sampling = {"ignore_eos": False, "min_new_tokens": 420}
    items = [{"prompt": p, "max_new_tokens": 420, "sampling": sampling} for p in prompts]
    expected = expected_outputs(stock_server, items)
    assert_same_outputs(stock_server, prompts, expected, outputs(server.generate_many(items)))
    assert "Retract requests" in server.log_text()


def _send(server: Server, kind: str, item: Json) -> Any:
    if kind == "abort":
        return hang_up(server, item["prompt"])
    if kind == "json":
        return answer_in_json(server, item["prompt"])
    sampling = {"top_k": 20, "top_p": 0.9, "temperature": 0.8} if kind == "sampled" else {}
    return server.generate(**item, sampling=sampling)["output_ids"]


def test_requests_of_all_kinds(stock_server: Server, server: Server) -> None:
    """Random lengths, shared prefixes, aborts, JSON schemas and sampling at once."""
    rng = random.Random(7)
    kinds = rng.choices(["plain", "sampled", "json", "abort"], [70, 10, 10, 10], k=120)
    prompts = mixed_prompts(seed=2, count=120, longest=600)
    items = [{"prompt": p, "max_new_tokens": rng.randint(1, 24)} for p in prompts]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda job: _send(server, *job), zip(kinds, items, strict=True)))
    plain = [i for i, kind in enumerate(kinds) if kind == "plain"]
    expected = expected_outputs(stock_server, [items[i] for i in plain])
    assert_same_outputs(
        stock_server, [prompts[i] for i in plain], expected, [got[i] for i in plain]
    )
    schemas = [i for i, kind in enumerate(kinds) if kind == "json"]
    for i in schemas:
        assert json.loads(got[i]).keys() == {"name", "old"}
        assert answer_in_json(stock_server, prompts[i]) == got[i]
    for i, kind in enumerate(kinds):
        if kind == "sampled":
            assert len(got[i]) == items[i]["max_new_tokens"]
    assert_healthy(server)
