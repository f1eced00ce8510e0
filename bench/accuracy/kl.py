# SPDX-License-Identifier: Apache-2.0
"""KL divergence of next-token distributions from those with full KV, through the real server.

Each prompt is sent twice. The first request seals its pages; the second, a few tokens longer, reads
them through the prefix cache, and returns the log-probabilities of the whole vocabulary after each
of the added tokens. Stock SGLang answers the same requests with full KV.

    python -m bench.accuracy.kl [--prompts 32] [--only K8V8 K8V4]
"""

from __future__ import annotations

import argparse
import random
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from bench.serving.common import (
    PAPER,
    Shape,
    demo_model,
    diffxkv_server,
    random_prompt,
    stock_server,
    table,
    write_results,
)
from tests.support.harness import Json, Server

VOCAB = 320
ADDED = 32
"""Tokens that the second request adds: the distributions after each are compared."""
CACHE_TOKENS = 65536
CHUNK = 512
CONFIGS: dict[str, Json] = {
    "lossless": {"policy": "lossless"},
    **{
        tier: {"policy": "uniform", "tiers": {"high": tier, "low": "K4V2"}}
        for tier in ("K8V8", "K8V4", "K4V4", "K4V2")
    },
    "diffkv": {"policy": "diffkv"} | PAPER,
}


class Answers(NamedTuple):
    """float64 [N, ADDED, VOCAB] log-probabilities of N prompts, and where their KV came from."""

    logprobs: torch.Tensor
    cached_share: float
    sealed_share: float


class Divergence(NamedTuple):
    """Of one configuration from full KV; KL in nats, its interval over prompts."""

    mean_kl: float
    interval: float
    median_kl: float
    p99_kl: float
    top1_agreement: float
    samples: int


def make_prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [random_prompt(rng, rng.randint(300, 1500) + ADDED) for _ in range(count)]


def ask(server: AbstractContextManager[Server], prompts: list[list[int]]) -> Answers:
    with server as running:
        # A page is sealed once later tokens have judged it, hence a few decode steps.
        for prompt in prompts:
            running.generate(prompt[:-ADDED], max_new_tokens=4)
        state = running.server_info()["internal_states"][0].get("diffxkv")
        found = [_distributions(running, prompt) for prompt in prompts]
    sealed = state["sealed_pages"] * 64 / state["tokens_held"] if state else 0.0
    cached = sum(tokens for _, tokens in found)
    return Answers(
        torch.stack([logprobs for logprobs, _ in found]),
        cached / sum(len(prompt) for prompt in prompts),
        sealed,
    )


def _distributions(server: Server, prompt: list[int]) -> tuple[torch.Tensor, int]:
    """Log-probabilities [ADDED, VOCAB] after each added token, and how many tokens were cached."""
    answer = server.generate(
        prompt,
        max_new_tokens=1,
        return_logprob=True,
        logprob_start_len=len(prompt) - ADDED,
        top_logprobs_num=VOCAB,
    )
    meta = answer["meta_info"]
    assert meta["cached_tokens"] > 0, "the prompt's pages were not in the cache"
    # The first entry would be the distribution before the first added token, which SGLang omits.
    rows = meta["input_top_logprobs"][1:] + meta["output_top_logprobs"]
    logprobs = torch.full((ADDED, VOCAB), -torch.inf, dtype=torch.float64)
    for row, entries in zip(logprobs, rows, strict=True):
        values, ids, _ = zip(*entries, strict=True)
        row[torch.tensor(ids)] = torch.tensor(values, dtype=torch.float64)
    return logprobs, meta["cached_tokens"]


def diverge(full: torch.Tensor, ours: torch.Tensor) -> Divergence:
    """KL(full || ours) and agreement of the likeliest token; both float64 [N, ADDED, VOCAB]."""
    full, ours = full.log_softmax(-1), ours.log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1)
    # Positions of one prompt share its KV, so only prompts count as independent samples.
    per_prompt = kl.mean(1)
    return Divergence(
        mean_kl=float(kl.mean()),
        interval=1.96 * float(per_prompt.std()) / len(per_prompt) ** 0.5,
        median_kl=float(kl.median()),
        p99_kl=float(kl.flatten().quantile(0.99)),
        top1_agreement=float((full.argmax(-1) == ours.argmax(-1)).double().mean()),
        samples=kl.numel(),
    )


def report(shape: Shape, prompts: list[list[int]], rows: dict[str, Json]) -> str:
    lines: list[list[object]] = [
        ["KV", "mean KL", "± 95 %", "median", "p99", "top-1 agreement", "samples", "sealed"]
    ]
    for name, row in rows.items():
        figures = [f"{row[key]:.2e}" for key in ("mean_kl", "interval", "median_kl", "p99_kl")]
        agreement = f"{row['top1_agreement']:.1%}"
        lines.append([name, *figures, agreement, row["samples"], f"{row['sealed_share']:.0%}"])
    return "\n\n".join(
        [
            f"KL(full KV || compressed), nats, over the whole vocabulary of {VOCAB}, against stock "
            f"`torch_native`; float32 demo model {shape._asdict()}. **Its weights and the prompts "
            "are random: this compares formats, and says little about trained models.** "
            f"{len(prompts)} prompts of {min(map(len, prompts)) - ADDED} to "
            f"{max(map(len, prompts)) - ADDED} tokens, {ADDED} distributions after each, with the "
            "prompt read from the prefix cache. K8V8 to K4V2: policy `uniform`. `sealed`: share "
            "of cached tokens in sealed pages; the others are in raw pages (window of 64). "
            "`lossless` shows what rounding alone does. Interval over prompts.",
            table(lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    options = parser.parse_args()
    shape, prompts, rows = Shape(), make_prompts(options.prompts), {}
    args = ["--chunked-prefill-size", CHUNK]
    with demo_model(shape, dtype="float32") as model:
        stock = stock_server(model, CACHE_TOKENS, *args, dtype="float32")
        full = ask(stock, prompts).logprobs
        for name in options.only:
            config = CONFIGS[name] | {"memory_bytes": CACHE_TOKENS * 2 * shape.token_bytes}
            answers = ask(diffxkv_server(model, config, *args, dtype="float32"), prompts)
            shares = {"cached_share": answers.cached_share, "sealed_share": answers.sealed_share}
            rows[name] = diverge(full, answers.logprobs)._asdict() | shares
            print(name, rows[name], flush=True)
    result = {"prompts": len(prompts), "added": ADDED, "configurations": rows}
    title = "KL divergence from full KV"
    write_results("kl", title, result, report(shape, prompts, rows))


if __name__ == "__main__":
    main()
