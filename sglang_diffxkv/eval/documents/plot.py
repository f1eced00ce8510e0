# SPDX-License-Identifier: Apache-2.0
"""Distance from full KV against bytes, and along the second half."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from sglang_diffxkv.eval.documents.score import PARTS, DocumentRow
from sglang_diffxkv.eval.report import label
from sglang_diffxkv.eval.variants import FULL

_MARKERS = "os^vD*Px<>d"


def plot(path: Path, rows: Sequence[DocumentRow]) -> None:
    """Write a picture: a column for each length and task, KL against bytes above, by part below."""
    from matplotlib.figure import Figure

    others = [row for row in rows if row.policy != FULL]
    columns = [
        (length, task)
        for length, task in product(
            sorted({row.length for row in rows}), dict.fromkeys(row.task for row in rows)
        )
    ]
    figure = Figure(figsize=(5.6 * len(columns), 8), layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="row", squeeze=False)
    for column, (length, task) in enumerate(columns):
        here = [row for row in others if (row.length, row.task) == (length, task)]
        above, below = panels[:, column]
        for i, policy in enumerate(dict.fromkeys(row.policy for row in here)):
            _draw(above, below, [row for row in here if row.policy == policy], i)
        above.set(title=f"{length:,} tokens, {task}", xlabel="bytes, relative to full KV")
        below.set(xlabel="quarter of the second half", xticks=range(1, PARTS + 1))
    for panel in panels[0]:
        panel.set(xscale="log", yscale="log")
    for panel in panels[1]:
        panel.set_yscale("log")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("mean KL(full || policy), nats per token")
    for panel in panels[:, -1]:
        panel.legend(fontsize="small")
    figure.savefig(path)


def _draw(above: Any, below: Any, rows: Sequence[DocumentRow], number: int) -> None:
    """One policy: its curve over targets, and a line of quarters for each of them."""
    curve = sorted(rows, key=lambda row: row.physical_compression)
    x = [1 / row.physical_compression for row in curve]
    kl = [row.whole.mean_kl for row in curve]
    ends = [[k.mean - k.low for k in kl], [k.high - k.mean for k in kl]]
    style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number}"}
    above.errorbar(x, [k.mean for k in kl], ends, capsize=2, label=rows[0].policy, **style)
    for row in curve:
        parts = [part.mean_kl.mean for part in row.parts]
        below.plot(range(1, PARTS + 1), parts, label=label(row), **style)
