# SPDX-License-Identifier: Apache-2.0
"""Records about documents as JSON, as a Markdown page and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_diffxkv.eval.ask import TOP
from sglang_diffxkv.eval.documents.plot import plot
from sglang_diffxkv.eval.documents.read import STEP
from sglang_diffxkv.eval.documents.score import DocumentRecord
from sglang_diffxkv.eval.estimate import Estimate
from sglang_diffxkv.eval.options import Options
from sglang_diffxkv.eval.page import by_length, head_of_page, table, tiers_cell, write_files

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
    records: Sequence[DocumentRecord],
    command: str,
    options: Options,
    output: Path | None,
    files: Sequence[Path],
) -> str:
    """Write JSON, page and plot to `output` and beside it, if given; return the page.

    Args:
        files: the documents'; none stands for Python's documentation.
    """
    names = ", ".join(path.name for path in files) or "Python's documentation"
    model = f"Model {options.model.name}, in {options.dtype} on {options.device}"
    page = markdown(records, f"`{command}`\n\n{model}, on {names}.")
    if output:
        content = {"command": command, "options": options, "documents": names, "rows": records}
        write_files(output, content, page)
        plot(output.with_suffix(".png"), records)
    return page


def markdown(records: Sequence[DocumentRecord], about: str) -> str:
    """A page with a table for each length."""
    parts = head_of_page("Documents against full KV", about, _NOTE, records)
    for length, here in by_length(records):
        parts += [f"## {length:,} tokens", table([_HEAD, *map(_cells, here)])]
    return "\n\n".join(parts) + "\n"


def outcome(records: Sequence[DocumentRecord], seconds: float) -> str:
    """One line about a variant that is through."""
    first = records[0]
    found = [
        f"{record.task} "
        + (f"perplexity {record.whole.perplexity.mean:.2f}" if record.is_full else _kl(record))
        for record in records
    ]
    return (
        f"{first.label}: {', '.join(found)}, compression {first.physical_compression:.2f}, "
        f"in {seconds:.0f} s"
    )


def _kl(record: DocumentRecord) -> str:
    return f"KL {record.whole.mean_kl.mean:.2g} ({record.whole.agreement.mean:.1%} agree)"


def _cells(record: DocumentRecord) -> tuple[str, ...]:
    whole, compared = record.whole, ("–",) * 5
    if not record.is_full:
        compared = (
            _estimate(whole.perplexity_ratio, ".3f"),
            _estimate(whole.mean_kl, ".2g"),
            _estimate(whole.p99_kl, ".2g"),
            _estimate(whole.agreement, ".1%"),
            " ".join(f"{part.mean_kl.mean:.2g}" for part in record.parts),
        )
    return (
        record.label,
        record.task,
        str(record.documents),
        _estimate(whole.perplexity, ".2f"),
        *compared,
        f"{record.physical_compression:.2f}",
        tiers_cell(record),
    )


def _estimate(found: Estimate, form: str) -> str:
    return f"{found.mean:{form}} ({found.low:{form}}–{found.high:{form}})"
