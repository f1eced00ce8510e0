# SPDX-License-Identifier: Apache-2.0
"""A real server on the code that serves GPUs, its kernels in Triton's interpreter.

Slow, so a few tokens of a small model: what is tested is how the parts meet, in SGLang's own loop.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.harness import ColdServer, Server
from tests.support.workload import assert_healthy, assert_same_outputs, outputs, random_tokens

AS_GPU = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent / "as_gpu")}
CONFIG = json.dumps({"policy": "diffkv", "memory_bytes": "24MiB"})


class Pair(NamedTuple):
    """Servers alike but for the kernels that they run on."""

    gpu: Server
    host: Server


@pytest.fixture(scope="module")
def servers(make_model: Callable[..., Path]) -> Iterator[Pair]:
    options = ["--attention-backend", "diffxkv", "--chunked-prefill-size", 128]
    options += ["--diffxkv-config", CONFIG]
    model = make_model(layers=2)
    with ColdServer(model, *options, env=AS_GPU) as gpu, Server(model, *options) as host:
        assert "as_gpu:" in gpu.log_text() and "as_gpu:" not in host.log_text()
        yield Pair(gpu, host)
        assert_healthy(gpu)


def prompts() -> list[list[int]]:
    """Chunked, of odd lengths, one with the prefix of another; the last ones open a second page."""
    rng = random.Random(4)
    first = random_tokens(rng, 300)
    return [first, first[:256] + random_tokens(rng, 21), *(random_tokens(rng, n) for n in (1, 62))]


def test_raw_pages_give_the_same_answers(servers: Pair) -> None:
    """All at once: chunked prefill, a batch of decode steps, pages opened on the way."""
    lossless = {"custom_params": {"diffxkv": {"quality": "lossless"}}}
    requests = [{"prompt": p, "max_new_tokens": 6, "sampling": lossless} for p in prompts()]
    got, expected = (outputs(each.generate_many(requests)) for each in servers)
    assert_same_outputs(servers.host, prompts(), expected, got)


def first_logprobs(server: Server, prompt: list[int]) -> dict[int, float]:
    """The ten best first tokens and their log-probabilities."""
    answer = server.generate(prompt, max_new_tokens=3, return_logprob=True, top_logprobs_num=10)
    return {token: value for value, token, _ in answer["meta_info"]["output_top_logprobs"][0]}


def test_sealed_pages_give_the_same_answers(servers: Pair) -> None:
    """Scored, graded, packed, shared: asked twice, so that the second answer reads sealed pages."""
    found, tiers = [], []
    for server in servers:
        for prompt in prompts()[:2]:
            server.generate(prompt, max_new_tokens=1)
        found.append([first_logprobs(server, prompt) for prompt in prompts()[:2]])
        stats = server.stats()
        assert stats["sealed_pages"] >= 3
        tiers.append(stats["tier_tokens"])
    for ours, expected in zip(*found, strict=True):
        both = ours.keys() & expected.keys()
        assert len(both) >= 9
        assert max(abs(ours[token] - expected[token]) for token in both) < 5e-3
    assert tiers[0]["high"] and tiers[0]["low"]
    # Scores are rounded differently: a token may fall on the other side of a threshold.
    assert all(tiers[0][name] == pytest.approx(tiers[1][name], abs=5) for name in tiers[1])
