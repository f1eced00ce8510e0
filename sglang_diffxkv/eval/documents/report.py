# SPDX-License-Identifier: Apache-2.0
"""Rows about documents as JSON, as a Markdown page and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_diffxkv.eval.client import TOP
from sglang_diffxkv.eval.documents.plot import plot
from sglang_diffxkv.eval.documents.read import STEP
from sglang_diffxkv.eval.documents.score import DocumentRow
from sglang_diffxkv.eval.report import label, table
from sglang_diffxkv.eval.score import Estimate
from sglang_diffxkv.eval.variants import FULL

if TYPE_CHECKING:
    from sglang_diffxkv.eval.run import Options

_NOTE = (
    "The first half of each document, in whole pages, is sent first and sealed, all of it (there "
    "is no window, but with `streaming`); then the tokens of its second half are predicted. "
    f"`half`: in one request. `grow`: in steps of {STEP} tokens, which read what those before them "
    "left, sealed. `shared`: as `half`, but another document's text followed the first half when "
    "it was sealed. `ratio`: to full KV's perplexity on the same tokens. `KL`: KL(full || policy) "
    f"in nats per token, over the tokens among both lists of {TOP} likeliest, the rest taken as "
    "one. `agreement`: share of tokens before which both find the same one likeliest. "
    "`KL by quarter`: means, along the second half. In brackets 95 % intervals, by bootstrap over "
    "documents. `compression`: bytes that SGLang's own pool takes in 16 bit for the tokens held "
    "before the second half is read, over the bytes in use for them here, of everything that is "
    "allocated, with raw elements of 16 bit, too. `high / low / pruned`: of the (token, head, "
    "layer) entries in sealed pages."
)
_HEAD = (
    "policy",
    "task",
    "documents",
    "perplexity",
    "ratio",
    "KL",
    "KL, 99th percentile",
    "agreement",
    "KL by quarter",
    "compression",
    "high / low / pruned",
)


def write(
    rows: Sequence[DocumentRow],
    command: str,
    options: Options,
    files: Sequence[Path],
    output: Path | None,
) -> str:
    """Write JSON, page and plot to `output` and beside it, if given; return the page.

    Args:
        files: the documents'; none stands for Python's documentation.
    """
    names = ", ".join(path.name for path in files) or "Python's documentation"
    model = f"Model {options.model.name}, in {options.dtype} on {options.device}"
    page = markdown(rows, f"`{command}`\n\n{model}, on {names}.")
    if output:
        content = {
            "command": command,
            "options": _plain(options),
            "documents": names,
            "rows": _plain(rows),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")
        output.with_suffix(".md").write_text(page)
        plot(output.with_suffix(".png"), rows)
    return page


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def markdown(rows: Sequence[DocumentRow], about: str) -> str:
    """A page with a table for each length."""
    parts = ["# Documents against full KV", about, _NOTE]
    if early := [row for row in rows if row.under_pressure]:
        names = ", ".join(dict.fromkeys(map(label, early)))
        parts.append(f"**Memory ran out and pages were sealed early: {names}.**")
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        parts += [f"## {length:,} tokens", table([_HEAD, *map(_cells, here)])]
    return "\n\n".join(parts) + "\n"


def outcome(rows: Sequence[DocumentRow], seconds: float) -> str:
    """One line about a variant that is through."""
    first = rows[0]
    found = [
        f"{row.task} "
        + (f"perplexity {row.whole.perplexity.mean:.2f}" if row.policy == FULL else _kl(row))
        for row in rows
    ]
    return (
        f"{label(first)}: {', '.join(found)}, compression {first.physical_compression:.2f}, "
        f"in {seconds:.0f} s"
    )


def _kl(row: DocumentRow) -> str:
    return f"KL {row.whole.mean_kl.mean:.2g} ({row.whole.agreement.mean:.1%} agree)"


def _cells(row: DocumentRow) -> tuple[str, ...]:
    whole, tiers, compared = row.whole, "–", ("–",) * 5
    if row.kept_high is not None and row.kept_low is not None and row.pruned is not None:
        tiers = f"{row.kept_high:.0%} / {row.kept_low:.0%} / {row.pruned:.0%}"
    if row.policy != FULL:
        compared = (
            _estimate(whole.perplexity_ratio, ".3f"),
            _estimate(whole.mean_kl, ".2g"),
            _estimate(whole.p99_kl, ".2g"),
            _estimate(whole.agreement, ".1%"),
            " ".join(f"{part.mean_kl.mean:.2g}" for part in row.parts),
        )
    return (
        label(row),
        row.task,
        str(row.documents),
        _estimate(whole.perplexity, ".2f"),
        *compared,
        f"{row.physical_compression:.2f}",
        tiers,
    )


def _estimate(found: Estimate, form: str) -> str:
    return f"{found.mean:{form}} ({found.low:{form}}–{found.high:{form}})"
