# SPDX-License-Identifier: Apache-2.0
"""Layer budgets on real importances: what solving them is worth, and whether targets are met.

Importances are those of the bundled model's attention to the queries that policy `diffxkv`
samples; grading, frames and retention are the package's own.

    python -m bench.accuracy.budgets [--samples 25] [--length 1024]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from bench.accuracy.bundled import parse
from bench.accuracy.ddid import TASKS
from bench.serving.common import table, write_results
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.eval.variants import ITEMSIZE
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, measure
from sglang_diffxkv.policy.base import SealContext, TierPolicy
from sglang_diffxkv.policy.budgeting.budget import (
    Prices,
    least_bytes,
    most_retained,
    rank_bins,
    rank_tokens,
)
from sglang_diffxkv.policy.budgeting.sketch import BINS
from sglang_diffxkv.policy.budgeting.target import raw_page_bytes
from sglang_diffxkv.policy.methods.diffxkv import DiffXKVPolicy
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.policy.retention import RetentionMeter
from sglang_diffxkv.policy.scoring import spread_queries

COMPRESSIONS = [2.5, 3.0, 4.0, 6.0, 8.0]
RETENTIONS = [0.99, 0.97, 0.95, 0.9, 0.8]
SHOWN = 4.0
"""Compression whose budgets by layer are listed."""


class Outcome(NamedTuple):
    """Of one prompt."""

    retention: float
    compression: float
    layer_share: torch.Tensor
    """[L], shares of the bytes of all layers."""


def contexts(path: Path, prompts: Sequence[list[int]], queries: int) -> list[SealContext]:
    """What a policy sees when the full pages of each prompt before its window are sealed."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    return [_context(model, ids, queries) for ids in prompts]


@torch.no_grad()
def _context(model: torch.nn.Module, ids: list[int], queries: int) -> SealContext:
    n, heads = len(ids), model.config.num_key_value_heads
    pages = (n - DiffXKVConfig().window) // PAGE_TOKENS
    found = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    at = spread_queries([n], queries).offsets
    later = (at[:, None] > torch.arange(pages * PAGE_TOKENS)).float()
    seen = (at[:, None] + 1) * later
    received = torch.stack([a[0][:, at, : pages * PAGE_TOKENS] for a in found])  # [L, Hq, Q, T]
    mean = (received * seen).sum(2) / later.sum(0).clamp(min=1) / n
    by_head = mean.unflatten(1, (heads, -1)).amax(2).unflatten(-1, (pages, PAGE_TOKENS))
    number = torch.arange(pages)
    return SealContext(
        importance=by_head.permute(2, 0, 1, 3).contiguous(),
        count=later.sum(0).view(pages, PAGE_TOKENS),
        position=number,
        context=torch.full((pages,), n),
        sequence=torch.zeros_like(number),
        quality=torch.zeros_like(number),
    )


def build(model: Model, layers: int, **fields: Any) -> TierPolicy:
    return make_policy(
        DiffXKVConfig(policy="diffxkv", **fields),
        head_dim=model.head_dim,
        num_kv_heads=model.kv_heads,
        raw_itemsize=ITEMSIZE,
        num_layers=layers,
    )


def outcome(policy: TierPolicy, ctx: SealContext, tiers: torch.Tensor) -> Outcome:
    layers = tiers.shape[1]
    meter = RetentionMeter(policy, layers, "cpu")
    meter.add(ctx, tiers)
    frame = policy.layout.frame_bytes
    nbytes = -(-measure(tiers, policy.layout).nbytes // frame) * frame  # [P, L]
    raw = raw_page_bytes(policy.layout, layers) * len(tiers)
    known = [r for r in meter.by_layer() if r is not None]
    return Outcome(sum(known) / len(known), raw / float(nbytes.sum()), nbytes.sum(0) / nbytes.sum())


def equal_layers(model: Model, target: float) -> Callable[[SealContext], torch.Tensor]:
    """Grades each layer by itself, so that all get the same bytes."""
    alone = build(model, 1, target=target)

    def grade(ctx: SealContext) -> torch.Tensor:
        layers = ctx.importance.split(1, dim=1)
        return torch.cat([alone.assign(ctx._replace(importance=x)) for x in layers], 1)

    return grade


def compare_budgets(model: Model, found: dict[str, list[SealContext]]) -> tuple[str, Any]:
    """Retention with solved budgets and with equal ones, in the same bytes."""
    lines: list[list[object]] = [
        ["target", "budgets", "compression", "mean R", "1 - R", *(f"R, {task}" for task in found)]
    ]
    figures = {}
    for target in COMPRESSIONS:
        solved = build(model, model.layers, target=target)
        graders = {"solved": solved.assign, "equal": equal_layers(model, target)}
        for name, grade in graders.items():
            by_task = {
                task: [outcome(solved, ctx, grade(ctx)) for ctx in items]
                for task, items in found.items()
            }
            every = [item for items in by_task.values() for item in items]
            r = statistics.mean(item.retention for item in every)
            compression = statistics.mean(item.compression for item in every)
            means = [statistics.mean(x.retention for x in items) for items in by_task.values()]
            lines.append(
                [target, name, f"{compression:.2f}", f"{r:.4f}", f"{1 - r:.4f}"]
                + [f"{mean:.4f}" for mean in means]
            )
            figures[f"{target:g} {name}"] = {"retention": r, "compression": compression}
    return table(lines), figures


def shares_by_layer(model: Model, found: dict[str, list[SealContext]]) -> tuple[str, Any]:
    """Which layers get the bytes at `SHOWN`, by task and between requests."""
    policy = build(model, model.layers, target=SHOWN)
    shares = {
        task: torch.stack([outcome(policy, x, policy.assign(x)).layer_share for x in items])
        for task, items in found.items()
    }
    every = torch.cat(list(shares.values()))
    lines: list[list[object]] = [["layer", "all", *shares, "requests, 10–90 %"]]
    for layer in range(model.layers):
        low, high = every[:, layer].quantile(torch.tensor([0.1, 0.9])).tolist()
        means = [every[:, layer].mean(), *(values[:, layer].mean() for values in shares.values())]
        lines.append([layer, *(f"{mean:.1%}" for mean in means), f"{low:.1%}–{high:.1%}"])
    return table(lines), {task: values.mean(0).tolist() for task, values in shares.items()}


def check_targets(model: Model, contexts: Sequence[SealContext]) -> tuple[str, Any]:
    """Retention asked for and got: from a request's own scores, and page by page by the plan."""
    lines: list[list[object]] = [["asked", "own budgets", "worst request", "by the plan"]]
    lines[0] += ["compression, own", "by the plan"]
    figures = {}
    for target in RETENTIONS:
        policy = build(model, model.layers, target=target, learn_share=1.0)
        assert isinstance(policy, DiffXKVPolicy)
        own = [outcome(policy, ctx, policy.assign(ctx)) for ctx in contexts]
        for ctx in contexts[::2]:
            policy.observe(ctx)
            policy.learner.wait()
        lone = [_by_plan(policy, ctx) for ctx in contexts[1::2]]
        worst = max((item.retention for item in own), key=lambda r: abs(r - target))
        means = [statistics.mean(item.retention for item in items) for items in (own, lone)]
        held = [statistics.harmonic_mean([x.compression for x in items]) for items in (own, lone)]
        lines.append(
            [target, f"{means[0]:.4f}", f"{worst:.4f}", f"{means[1]:.4f}"]
            + [f"{value:.2f}" for value in held]
        )
        figures[f"{target:g}"] = {"own": means[0], "worst": worst, "plan": means[1]}
    return table(lines), figures


def _by_plan(policy: DiffXKVPolicy, ctx: SealContext) -> Outcome:
    """Every page of a sequence graded alone, as generated text is; judged as one sequence."""
    apart = ctx._replace(sequence=torch.arange(len(ctx.sequence)))
    return outcome(policy, ctx, policy.assign(apart))


def time_solver(rounds: int = 7) -> tuple[str, Any]:
    """Seconds to solve budgets of 64 layers x 8 KV heads x 128K tokens."""
    prices = Prices(202, 106, 0.98)
    heads = 64 * 8
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(heads * BINS, generator=rng) ** 4
    tokens = torch.full_like(weights, 128 * 1024 / BINS)
    chunk = torch.rand(heads * 8192, generator=rng) ** 4

    def bins() -> None:
        order = weights.argsort(descending=True)
        ranking = rank_bins((weights * tokens)[order], tokens[order])
        most_retained(ranking, prices, float(tokens.sum()) * 50)
        least_bytes(ranking, prices, 0.9 * float(ranking.mass[-1]))

    def single() -> None:
        ranking = rank_tokens(chunk.sort(descending=True, stable=True).values)
        least_bytes(ranking, prices, 0.9 * float(ranking.mass[-1]))

    cases = {
        "plan: both limits, from histograms of 64 × 8 × 128K tokens": bins,
        "request: one limit, token by token, a chunk of 64 × 8 × 8K": single,
    }
    lines: list[list[object]] = [["what", "seconds, median", "least–most"]]
    figures = {}
    for name, run in cases.items():
        run()
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        ends = f"{min(seconds):.3f}–{max(seconds):.3f}"
        lines.append([name, f"{statistics.median(seconds):.3f}", ends])
        figures[name] = seconds
    return table(lines), figures


def main() -> None:
    options, model, cells = parse(__doc__.splitlines()[0], TASKS)
    queries = DiffXKVConfig().score_queries
    found = {
        cell.task: contexts(BUNDLED, [prompt.ids for prompt in cell.prompts], queries)
        for cell in cells
    }
    every = [item for items in zip(*found.values(), strict=True) for item in items]
    compared, solved = compare_budgets(model, found)
    shared, shares = shares_by_layer(model, found)
    targets, met = check_targets(model, every)
    timed, seconds = time_solver()
    text = "\n\n".join(
        [
            f"Model: {BUNDLED.name}, {model.layers} layers, {model.kv_heads} KV heads. "
            f"{options.samples} prompts of each of {', '.join(TASKS)}, {options.length} tokens.",
            "## Solved budgets against equal ones",
            "Mean retention over layers and prompts. *Equal*: every layer gets the same bytes, "
            "which its own tokens and heads compete for. Compression is of sealed pages, frames "
            "and all.",
            compared,
            f"## Bytes by layer at {SHOWN:g}×",
            shared,
            "## Retention asked for and got",
            "*Own budgets*: all pages of a prompt together. *By the plan*: every page by itself, "
            "with the thresholds of a plan that was solved from the other half of the prompts.",
            targets,
            "## Time of the solver",
            timed,
        ]
    )
    figures = {"budgets": solved, "shares": shares, "retention": met, "seconds": seconds}
    write_results("budgets", "Layer budgets on real importances", figures, text)


if __name__ == "__main__":
    main()
