# SPDX-License-Identifier: Apache-2.0
"""What the two papers claim, checked on the bundled model.

Importance differs between layers (XKV), heads and requests (DiffKV); keys need more bits than
values; retention predicts accuracy; thresholds matter as the paper has it.

    python -m bench.accuracy.ddid [--samples 50] [--length 1024]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.accuracy.attention import importances, retained_by_snapkv, retention, share_needed
from bench.serving.common import RESULTS, table, write_results
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.eval.dtype import fast_dtype
from sglang_diffxkv.eval.model import Model, load_model
from sglang_diffxkv.eval.questions.plot import Point, error_bars, points
from sglang_diffxkv.eval.questions.prompts import Cell, make_cells
from sglang_diffxkv.eval.questions.run import compare
from sglang_diffxkv.eval.questions.score import QuestionRecord
from sglang_diffxkv.eval.tasks.registry import choose_suite
from sglang_diffxkv.eval.variants import FULL, VARIANTS, Variant

TASKS = ["niah_multikey", "kv_lookup", "vt", "recall"]
SHARES = [0.02, 0.05, 0.1, 0.2, 0.4]
"""Of tokens that `snapkv` keeps, to vary retention."""
ALPHA_HIGH = [0.1, 0.3, 1.0, 3.0, 10.0]
ALPHA_LOW = [0.0, 0.02, 0.1, 0.3, 1.0]
FORMATS = ["lossless", "int8", "k8v4", "k4v8", "int4"]
TARGET = 0.9
_HIGH, _LOW = DiffXKVConfig().alpha_high, DiffXKVConfig().alpha_low


def variants() -> list[Variant]:
    """Full KV first; a name says what is varied."""
    snapkv, diffkv = VARIANTS["snapkv"], VARIANTS["diffkv"]
    assert snapkv is not None and diffkv is not None
    found = [Variant(name, VARIANTS[name]) for name in (FULL, *FORMATS)]
    found += [Variant(f"keep {s:g}", replace(snapkv, layer_caps=s)) for s in SHARES]
    for high in ALPHA_HIGH:
        found.append(Variant(_alphas(high, _LOW), replace(diffkv, alpha_high=high)))
    for low in ALPHA_LOW:
        if low != _LOW:
            found.append(Variant(_alphas(_HIGH, low), replace(diffkv, alpha_low=low)))
    return found


def _alphas(high: float, low: float) -> str:
    return f"α {high:g} / {low:g}"


def distributions(found: dict[str, list[torch.Tensor]]) -> tuple[str, dict[str, Any]]:
    """Table of the share of tokens that holds `TARGET` of a layer's importance, and its figures.

    Args:
        found: importances by task.
    """
    needed = {  # [N, L, H]
        task: torch.stack([share_needed(item, TARGET) for item in items])
        for task, items in found.items()
    }
    every = torch.cat(list(needed.values()))
    layers, heads = every.shape[1:]
    lines: list[list[object]] = [
        ["layer", "all", *needed, *(f"head {h}" for h in range(heads)), "requests, 10–90 %"]
    ]
    for layer in range(layers):
        spread = every[:, layer].mean(1).quantile(torch.tensor([0.1, 0.9]))
        means = [every[:, layer].mean(), *(values[:, layer].mean() for values in needed.values())]
        means += list(every[:, layer].mean(0))
        ends = f"{spread[0]:.1%}–{spread[1]:.1%}"
        lines.append([layer, *(f"{value:.1%}" for value in means), ends])
    figures = {task: values.mean(0).tolist() for task, values in needed.items()}
    return table(lines), {"share_needed": figures}


def plot_layers(path: Path, items: Sequence[torch.Tensor]) -> None:
    """Retention against the share of tokens kept, a curve per layer and panel per KV head."""
    shares = torch.logspace(-3, 0, 40).tolist()
    curves = torch.stack([torch.stack([retention(x, s) for x in items]).mean(0) for s in shares])
    figure = Figure(figsize=(5 * curves.shape[2], 4), layout="constrained")
    panels = figure.subplots(1, curves.shape[2], sharey=True, squeeze=False)[0]
    for head, panel in enumerate(panels):
        for layer in range(curves.shape[1]):
            panel.plot(shares, curves[:, layer, head], label=f"layer {layer}")
        panel.set(title=f"KV head {head}", xlabel="share of tokens kept", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("retention of importance")
    panels[-1].legend(fontsize="small")
    figure.savefig(path)


def plot_retention(path: Path, retained: Sequence[float], kept: Sequence[Point]) -> None:
    """Exact match against retention; both in the order of `SHARES`."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    panel = figure.subplots()
    y = [point.accuracy for point in kept]
    panel.errorbar(retained, y, error_bars(kept), marker="o", capsize=2)
    panel.set(xlabel="retention R, mean over layers and heads", ylabel="accuracy")
    panel.grid(alpha=0.3)
    figure.savefig(path)


def accuracy_table(found: Sequence[Point], rows: Sequence[QuestionRecord], head: str) -> str:
    """A line per point; `rows` give its KL, the mean over tasks with its 95 % interval."""
    lines: list[list[object]] = [[head, "accuracy", "95 %", "mean KL", "compression", "samples"]]
    for point in found:
        kl = [row.mean_kl for row in rows if row.policy == point.policy]
        half = [(row.mean_kl_high - row.mean_kl) ** 2 for row in rows if row.policy == point.policy]
        interval = sum(half) ** 0.5 / len(half)
        lines.append(
            [
                point.policy,
                f"{point.accuracy:.1%}",
                f"{point.low:.1%}–{point.high:.1%}",
                "–" if point.policy == FULL else f"{sum(kl) / len(kl):.2g} ± {interval:.1g}",
                f"{1 / point.bytes_share:.2f}",
                point.samples,
            ]
        )
    return table(lines)


def measure(
    model: Model, cells: list[Cell], device: str
) -> tuple[list[QuestionRecord], dict[str, list[torch.Tensor]]]:
    """Rows of all `variants` on the server, and importances by task (see `attention`)."""
    rows = []
    for row in compare(model, device, variants(), cells):
        rows.append(row)
        print(row.policy, row.task, f"{row.accuracy:.1%}", flush=True)
    found = {
        cell.task: importances(model.path, [prompt.ids for prompt in cell.prompts])
        for cell in cells
    }
    return rows, found


def report(
    rows: list[QuestionRecord], found: dict[str, list[torch.Tensor]], about: str
) -> tuple[str, Any]:
    every = [item for items in found.values() for item in items]
    shares, figures = distributions(found)
    pooled = {point.policy: point for point in points(rows)}
    kept = [pooled[f"keep {share:g}"] for share in SHARES]
    retained = [
        float(torch.stack([retained_by_snapkv(item, share).mean() for item in every]).mean())
        for share in SHARES
    ]
    plot_layers(RESULTS / "ddid_layers.png", every)
    plot_retention(RESULTS / "ddid_retention.png", retained, kept)
    kept_lines: list[list[object]] = [["tokens kept", "R", "accuracy", "95 %"]]
    for share, value, point in zip(SHARES, retained, kept, strict=True):
        ends = f"{point.low:.1%}–{point.high:.1%}"
        kept_lines.append([f"{share:.0%}", f"{value:.3f}", f"{point.accuracy:.1%}", ends])
    highs = [pooled[_alphas(high, _LOW)] for high in ALPHA_HIGH]
    lows = [pooled[_alphas(_HIGH, low)] for low in ALPHA_LOW]
    text = "\n\n".join(
        [
            about,
            "## Importance differs between layers, heads and requests",
            f"Share of a prompt's tokens that holds {TARGET:.0%} of a head's importance (attention "
            "of the last 64 queries, max over the GQA group, the last 64 tokens left out): mean "
            "over heads and requests, by task, by KV head, and between requests.",
            shares,
            "![retention by layer](ddid_layers.png)",
            "## Keys need more bits than values",
            accuracy_table([pooled[name] for name in (FULL, *FORMATS)], rows, "KV"),
            "## Retention predicts accuracy",
            "`snapkv` keeps a share of each head's tokens; R is the mean over layers, heads and "
            "prompts of what these hold of the importance (the recent window, kept anyway, is in "
            "neither).",
            table(kept_lines),
            "![accuracy by retention](ddid_retention.png)",
            "## Thresholds",
            "`diffkv` with α_h / α_l: below α_l/N pruned, from α_h/N high.",
            accuracy_table(highs, rows, "α_h varied"),
            accuracy_table(lows, rows, "α_l varied"),
        ]
    )
    result = figures | {
        "rows": [asdict(row) for row in rows],
        "retention": dict(zip(map(str, SHARES), retained, strict=True)),
    }
    return text, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--samples", type=int, default=50, help="per task")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = load_model(options.model, fast_dtype(options.device))
    suite = choose_suite(options.model)
    cells = make_cells(
        model.tokenizer, TASKS, [options.length], options.samples, seed=1, suite=suite
    )
    rows, found = measure(model, cells, options.device)
    about = (
        f"Model: {options.model.name}, {model.layers} layers, {model.kv_heads} KV heads. "
        f"{options.samples} prompts of each of {', '.join(TASKS)}, {options.length} tokens; "
        "accuracy is over all of them, from the real server, with every answer read from sealed "
        "pages (see `sglang-diffxkv eval`)."
    )
    text, result = report(rows, found, about)
    write_results("ddid", "The papers' claims on the demo model", result, text)


if __name__ == "__main__":
    main()
