# SPDX-License-Identifier: Apache-2.0
"""Models with linear layers in real servers: SGLang's kernels for those, in Triton's interpreter.

Slow, so a few tokens of small models: what is tested is how our pool, allocator and backend meet
SGLang's states, their cache at the ends of pages, and its scheduler.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.harness import Server, models_but
from tests.support.hybrid_model import write_granite, write_qwen
from tests.support.workload import assert_healthy, assert_same_outputs, outputs, random_tokens

pytestmark = pytest.mark.long


class Hybrid(NamedTuple):
    """A model, and the files of SGLang that its own needs."""

    write: Callable[[Path], Path]
    files: tuple[str, ...]


MODELS = {
    "mamba2": Hybrid(write_granite, ("granitemoehybrid", "granitemoe")),
    "gated_delta": Hybrid(
        write_qwen,
        ("qwen3_5_text", "qwen3_5", "qwen3_next", "qwen3_vl", "qwen3", "qwen2_moe", "qwen2"),
    ),
}


class Pair(NamedTuple):
    """Servers alike but for the attention layers' backend and pool."""

    ours: Server
    stock: Server


@pytest.fixture(scope="module", params=MODELS)
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    hybrid = MODELS[request.param]
    model = hybrid.write(tmp_path_factory.mktemp("hybrid"))
    paths = [str(Path(__file__).parent / "interpreted"), os.environ.get("PYTHONPATH", "")]
    env = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_MAMBA_CONV_DTYPE": "float32",
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(models_but(*hybrid.files)),
    }
    both = ["--chunked-prefill-size", 128, "--max-running-requests", 4]
    config = json.dumps({"policy": "lossless", "memory_bytes": "16MiB"})
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", config]
    strict = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    stock = ["--attention-backend", "torch_native", "--page-size", 64]
    stock += ["--max-total-tokens", 16384, "--max-mamba-cache-size", 60]
    with (
        Server(model, *both, *args, env=env | strict) as first,
        Server(model, *both, *stock, env=env) as second,
    ):
        yield Pair(first, second)
        assert_healthy(first)


def test_outputs_equal_torch_native(servers: Pair) -> None:
    """Chunks, a prefix whose state is cached, a batch of decode steps; then all at once again."""
    rng = random.Random(3)
    first = random_tokens(rng, 150)
    prompts = [first, first[:130] + random_tokens(rng, 9), first[:7], first + first[:60]]
    items = [{"prompt": p, "max_new_tokens": 12} for p in prompts]
    ours, stock = servers
    expected = [stock.generate(**item) for item in items]
    answers = [ours.generate(**item) for item in items]
    assert_same_outputs(stock, prompts, outputs(expected), outputs(answers))
    cached = [[a["meta_info"]["cached_tokens"] for a in found] for found in (expected, answers)]
    assert cached[0] == cached[1] and sum(cached[0]) >= 256
    again = ours.generate_many(items)
    assert_same_outputs(stock, prompts, outputs(expected), outputs(again))
    stats = ours.stats()
    assert stats["counters"]["sealed"] > 0
    assert ours.violations() == []


def test_the_log_says_what_states_take(servers: Pair) -> None:
    assert "states of linear layers" in servers.ours.log_text()
