# SPDX-License-Identifier: Apache-2.0
"""Models with sliding windows, soft caps and attention sinks through a real server."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_diffxkv.client import Json
from tests.support.harness import Server, models_but
from tests.support.window_models import WINDOW, write_window_model
from tests.support.workload import TIE, assert_healthy, mixed_prompts, outputs, random_tokens

FILES = {"gemma3": "gemma3_causal", "gemma2": "gemma2", "gpt_oss": "gpt_oss"}
MODELS = {"gemma3": "wwwwwf", "gemma2": "wfwf", "gpt_oss": "wfwf"}
EXPERTS_PER_TOKEN = 2
HOST_BYTES = {"gemma2": 16 << 20}
"""Pages of full-attention layers go there; a prefix is found again as long as SGLang has kept its
window layers' KV, too."""
ENVIRONMENT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


class Served:
    """A kind of model, a server of it, and the reference: transformers in fp32."""

    def __init__(self, kind: str, folder: Path, server: Server) -> None:
        self.kind, self.server = kind, server
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def generate(self, items: list[Json], workers: int = 16) -> list[Any]:
        answers = self.server.generate_many(items, workers)
        for item, got in zip(items, outputs(answers), strict=True):
            self._assert_greedy(item["prompt"], got, "min_new_tokens" in item.get("sampling", {}))
        return answers

    def _assert_greedy(self, prompt: list[int], got: list[int], goes_on: bool) -> None:
        """Each token is the best one behind all before it, up to ties; if it goes on, no EOS."""
        routed = {"output_router_logits": True} if self.kind == "gpt_oss" else {}
        with torch.no_grad():
            found = self._model(torch.tensor([prompt + got]), **routed)
        logits = found.logits[0, len(prompt) - 1 : -1]
        if goes_on:
            logits[:, self._model.config.eos_token_id] = -torch.inf
        chosen = logits.log_softmax(-1)
        lacks = chosen.max(-1).values - chosen[torch.arange(len(got)), torch.tensor(got)]
        if routed:
            lacks[_routers_tie(found.router_logits)[len(prompt) - 1 : -1]] = 0
        assert float(lacks.max()) < TIE, f"{self.kind}: prompt of {len(prompt)}: {lacks}"


def _routers_tie(by_layer: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Tokens [T] whose last chosen expert and the next best are level in a layer: which of them it
    is depends on the batch's products, and changes what is said. One of some thousands."""
    best = torch.stack(by_layer).topk(EXPERTS_PER_TOKEN + 1).values
    tie = (best[..., -2] - best[..., -1] < 1e-4).any(0)
    assert int(tie.sum()) <= 2
    return tie


@pytest.fixture(
    scope="module",
    params=["gemma3", pytest.param("gemma2", marks=pytest.mark.long), "gpt_oss"],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Lossless, in so little memory that requests evict each other's prefixes."""
    kind: str = request.param
    folder = write_window_model(tmp_path_factory.mktemp(kind), kind, MODELS[kind])
    config: Json = {"policy": "lossless", "memory_bytes": "20MiB", "raw_share": 0.3}
    config["host_bytes"] = HOST_BYTES.get(kind, 0)
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    args += ["--chunked-prefill-size", 128, "--schedule-conservativeness", 0.1]
    if kind == "gpt_oss":  # what SGLang has for its experts on a CPU
        args += ["--moe-runner-backend", "triton"]
    env = ENVIRONMENT | {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(models_but(FILES[kind]))}
    with Server(folder, *args, env=env) as server:
        yield Served(kind, folder, server)
        assert_healthy(server)


def test_outputs_are_those_of_the_model(served: Served) -> None:
    """Prompts of 1 to 1,200 tokens, chunked, with shared prefixes, and each twice."""
    prompts = mixed_prompts(seed=1, count=18, longest=1200)
    prompts += [random_tokens(random.Random(n), n) for n in (WINDOW - 1, WINDOW, WINDOW + 1)]
    items: list[Json] = [
        {"prompt": p, "max_new_tokens": 8 + 5 * (i % 20)} for i, p in enumerate(prompts)
    ]
    served.generate(items)
    again = served.generate(items[2::3])
    assert sum(a["meta_info"]["cached_tokens"] for a in again) > 500
    counters = served.server.stats()["counters"]
    assert counters["sealed"] > 50 and counters["evicted"] > 0
    if served.kind in HOST_BYTES:
        assert counters["offloaded"] > 0


def test_after_retraction(served: Served) -> None:
    rng = random.Random(6)
    sampling = {"ignore_eos": False, "min_new_tokens": 420}
    items = [
        {"prompt": random_tokens(rng, 60), "max_new_tokens": 420, "sampling": sampling}
        for _ in range(24)
    ]
    served.generate(items, workers=24)
    assert "Retract requests" in served.server.log_text()


def test_memory_of_both_kinds_is_counted(served: Served) -> None:
    server = served.server
    served.generate([{"prompt": random_tokens(random.Random(8), 700), "max_new_tokens": 4}])
    stats = server.stats()
    windows = stats["window_layers"]
    assert windows["layers"] == MODELS[served.kind].count("w") * (
        4 // len(MODELS[served.kind]) or 1
    )
    assert 0 < windows["tokens_held"] <= windows["tokens_total"]
    assert windows["bytes_total"] + stats["bytes_total"] <= 20 << 20
    assert "with a window of 100 tokens get" in server.log_text()
    server.post("/flush_cache", {})
    assert server.stats()["window_layers"]["tokens_held"] == 0
    assert server.violations() == []
