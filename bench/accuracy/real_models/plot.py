# SPDX-License-Identifier: Apache-2.0
"""KL and perplexity against physical compression, a line for each method."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.accuracy.real_models.results import OURS, Results
from bench.accuracy.real_models.summary import Summary, summarize

LEAST_KL, MOST_PERPLEXITY = 2e-4, 1.35
"""What is shown: codes of 8 bits lie below, most of 2 bits above."""
MARKERS = "os^vD*Px<>dhp8"


def plot(path: Path, results: Results) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, curve) in enumerate(_curves(results).items()):
        curve.sort(key=lambda s: s.compression)
        x = [s.compression for s in curve]
        ours = curve[0].row.family == OURS
        style: dict[str, Any] = {
            "label": name,
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "-" if ours else "--",
            "linewidth": 3 if name.startswith("diffxkv,") else 1.2,
            "color": "black" if name.startswith("diffxkv,") else f"C{i % 10}",
            "zorder": 3 if name.startswith("diffxkv,") else 2,
        }
        kl = [s.kl for s in curve]
        ends = [[k.value - k.low for k in kl], [k.high - k.value for k in kl]]
        left.errorbar(x, [k.value for k in kl], ends, capsize=2, **style)
        right.plot(x, [s.perplexity.value for s in curve], **style)
    full = math.exp(sum(results.full.values()) / max(1, len(results.full)))
    right.axhline(full, color="grey", linewidth=1, label="full KV")
    left.set(ylabel="KL(full || compressed), nats per token", yscale="log")
    left.set_ylim(bottom=LEAST_KL)
    right.set(ylabel=f"perplexity (up to {MOST_PERPLEXITY:g} times that of full KV)")
    right.set_ylim(0.99 * full, MOST_PERPLEXITY * full)
    for panel in (left, right):
        panel.set(xlabel="physical compression", xscale="log")
        panel.set_xticks([2, 3, 4, 6, 8, 12], ["2", "3", "4", "6", "8", "12"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def _curves(results: Results) -> dict[str, list[Summary]]:
    """Methods with several settings on one line: targets, and numbers of bits."""
    curves: dict[str, list[Summary]] = defaultdict(list)
    for row in results.rows:
        name = row.name.split(" K")[0] if row.family == OURS else row.name
        name = name.replace(" int4", "").replace(" int2", "").replace(", groups of 32", "")
        curves[name].append(summarize(results, row))
    return curves
