# SPDX-License-Identifier: Apache-2.0
"""Rows as JSON and as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sglang_diffxkv.eval.score import Row

_NOTE = (
    "`exact match`: the whole answer, white space aside, with a 95 % interval (Wilson). `recall`: "
    "share of answers with every reference in them. `agreement`, `KL`: at the tokens of full KV's "
    "answers, share with the same likeliest token, and mean KL(full || policy) in nats over the "
    "256 likeliest tokens and the rest. `compression`: bytes that SGLang's own pool takes for the "
    "tokens held, over all bytes in use, raw pages and directory included. `high / low / pruned`: "
    "of the (token, head, layer) entries in sealed pages; `sealed`: share of tokens in them. Every "
    "prompt is sent once to fill the cache, and asked again: answers are read from sealed pages."
)


def write_json(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """`{"rows": [...]}` and what the rows were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = about | {"rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(rows: Sequence[Row], title: str, about: str) -> str:
    """A page with one table per length."""
    parts = [f"# {title}", about, _NOTE]
    for length in sorted({row.length for row in rows}):
        parts.append(f"## {length:,} tokens")
        parts.append(table([row for row in rows if row.length == length]))
    return "\n\n".join(parts) + "\n"


def label(row: Row) -> str:
    """Name of the row's variant."""
    return row.policy if row.target is None else f"{row.policy} at {row.target:g}×"


_HEAD = (
    "policy",
    "task",
    "samples",
    "exact match",
    "recall",
    "agreement",
    "KL",
    "output tokens",
    "compression",
    "high / low / pruned",
    "sealed",
)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line per row."""
    return lines([_HEAD, *(_cells(row) for row in rows)])


def lines(cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *body])


def _cells(row: Row) -> tuple[str, ...]:
    tiers = "–"
    if row.kept_high is not None and row.kept_low is not None and row.pruned is not None:
        tiers = f"{row.kept_high:.0%} / {row.kept_low:.0%} / {row.pruned:.0%}"
    exact = f"{row.exact_match:.1%} ({row.exact_match_low:.0%}–{row.exact_match_high:.0%})"
    return (
        label(row),
        row.task,
        str(row.samples),
        exact,
        f"{row.recall:.1%}",
        f"{row.agreement:.1%}",
        f"{row.mean_kl:.2g}",
        f"{row.output_tokens:.1f}",
        f"{row.physical_compression:.2f}",
        tiers,
        "–" if row.sealed is None else f"{row.sealed:.0%}",
    )
