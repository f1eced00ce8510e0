# SPDX-License-Identifier: Apache-2.0
"""A real server on the code that serves GPUs, its kernels in Triton's interpreter.

Slow, so a few tokens of a small model: what is tested is how the parts meet, in SGLang's own loop.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.harness import Server
from tests.server.workload import (
    assert_healthy,
    assert_same_outputs,
    outputs,
    random_tokens,
)

AS_GPU = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent / "as_gpu")}


def start(model: Path, env: dict[str, str], **config: object) -> Server:
    options = ["--attention-backend", "diffxkv", "--chunked-prefill-size", 128]
    config |= {"memory_bytes": "24MiB"}
    return Server(model, *options, "--diffxkv-config", json.dumps(config), env=env)


@pytest.fixture(scope="module")
def small(make_model: Callable[..., Path]) -> Path:
    return make_model(layers=2)


@pytest.fixture(scope="module")
def stock(small: Path) -> Iterator[Server]:
    options = ["--attention-backend", "torch_native", "--page-size", 64]
    with Server(small, *options, "--max-total-tokens", 65536) as server:
        yield server


def prompts() -> list[list[int]]:
    """Chunked, of odd lengths, one with the prefix of another; 64 and 65 tokens open a page."""
    rng = random.Random(4)
    first = random_tokens(rng, 300)
    return [first, first[:256] + random_tokens(rng, 21), *(random_tokens(rng, n) for n in (1, 62))]


def test_lossless_equals_stock(small: Path, stock: Server) -> None:
    with start(small, AS_GPU, policy="lossless") as server:
        requests = [{"prompt": prompt, "max_new_tokens": 6} for prompt in prompts()]
        expected, got = (outputs(each.generate_many(requests)) for each in (stock, server))
        assert_same_outputs(stock, prompts(), expected, got)
        assert server.stats()["sealed_pages"] > 0
        assert_healthy(server)


def first_logprobs(server: Server, prompt: list[int]) -> dict[int, float]:
    """The ten best first tokens and their log-probabilities."""
    answer = server.generate(prompt, max_new_tokens=3, return_logprob=True, top_logprobs_num=10)
    return {token: value for value, token, _ in answer["meta_info"]["output_top_logprobs"][0]}


def test_compressed_equals_the_hosts_kernels(small: Path) -> None:
    """Scored, graded, packed, shared: asked twice, so that the second answer reads sealed pages."""
    found, tiers = [], []
    for env in (AS_GPU, {}):
        with start(small, env, policy="diffkv") as server:
            for prompt in prompts()[:2]:
                server.generate(prompt, max_new_tokens=1)
            found.append([first_logprobs(server, prompt) for prompt in prompts()[:2]])
            stats = server.stats()
            assert stats["sealed_pages"] >= 3
            tiers.append(stats["tier_tokens"])
            assert_healthy(server)
    for ours, expected in zip(*found, strict=True):
        both = ours.keys() & expected.keys()
        assert len(both) >= 9
        assert max(abs(ours[token] - expected[token]) for token in both) < 5e-3
    assert tiers[0]["high"] and tiers[0]["low"]
    # Scores are rounded differently: a token may fall on the other side of a threshold.
    assert all(tiers[0][name] == pytest.approx(tiers[1][name], abs=5) for name in tiers[1])
