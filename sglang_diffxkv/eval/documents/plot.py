# SPDX-License-Identifier: Apache-2.0
"""Distance from full KV against bytes, and along the second half."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from sglang_diffxkv.eval.documents.score import PARTS, DocumentRecord
from sglang_diffxkv.eval.page import marker, panels


def plot(path: Path, records: Sequence[DocumentRecord]) -> None:
    """Write a picture: a column for each length and task, KL against bytes above, by part below."""
    others = [record for record in records if not record.is_full]
    lengths = sorted({record.length for record in records})
    columns = list(product(lengths, dict.fromkeys(record.task for record in records)))
    figure, drawn = panels(len(columns), 5.6, sharey="row")
    for column, (length, task) in enumerate(columns):
        here = [record for record in others if (record.length, record.task) == (length, task)]
        above, below = drawn[:, column]
        for i, policy in enumerate(dict.fromkeys(record.policy for record in here)):
            _draw(above, below, [record for record in here if record.policy == policy], i)
        above.set(title=f"{length:,} tokens, {task}", xlabel="bytes, relative to full KV")
        below.set(xlabel="quarter of the second half", xticks=range(1, PARTS + 1))
        above.set_xscale("log")
    for panel in drawn.flat:
        panel.set_yscale("log")
    for panel in drawn[:, 0]:
        panel.set_ylabel("mean KL(full || policy), nats per token")
    for panel in drawn[:, -1]:
        panel.legend(fontsize="small")
    figure.savefig(path)


def _draw(above: Any, below: Any, records: Sequence[DocumentRecord], number: int) -> None:
    """One policy: its curve over targets, and a line of quarters for each of them."""
    curve = sorted(records, key=lambda record: record.physical_compression)
    x = [1 / record.physical_compression for record in curve]
    kl = [record.whole.mean_kl for record in curve]
    ends = [[k.mean - k.low for k in kl], [k.high - k.mean for k in kl]]
    style: dict[str, Any] = {"marker": marker(number), "color": f"C{number}"}
    above.errorbar(x, [k.mean for k in kl], ends, capsize=2, label=records[0].policy, **style)
    for record in curve:
        parts = [part.mean_kl.mean for part in record.parts]
        below.plot(range(1, PARTS + 1), parts, label=record.label, **style)
