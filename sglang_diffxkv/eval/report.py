# SPDX-License-Identifier: Apache-2.0
"""Rows as JSON, as a Markdown page and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_diffxkv.eval.plot import Point, plot, points
from sglang_diffxkv.eval.score import TELLS, Row, failures, telling
from sglang_diffxkv.eval.variants import FULL

if TYPE_CHECKING:
    from sglang_diffxkv.eval.documents.score import DocumentRow
    from sglang_diffxkv.eval.run import Options

_NOTE = (
    "`accuracy`: share of answers that are right, with a 95 % interval (Wilson's; over documents "
    "where several questions share one): the bundled model's match the whole answer, white space "
    "aside, those of others have every reference in them. `recall`: share of the references found "
    "(RULER's string match). `agreement`, `KL`: at the tokens of full KV's answers, share with the "
    "same likeliest token, and mean KL(full || policy) in nats, with intervals; the row of "
    "`lossless` shows what rounding alone does. `compression`: bytes that SGLang's own pool takes "
    "in 16 bit for the tokens held, over the bytes in use for them here, of everything that is "
    "allocated, with raw elements of 16 bit, too. "
    "`high / low / pruned`: of the (token, head, layer) entries in sealed pages; `sealed`: share "
    "of tokens in them. Every question is asked when the pages before it have been sealed."
)


def write(rows: Sequence[Row], command: str, options: Options, output: Path | None) -> str:
    """Write JSON, page and plot to `output` and beside it, if given; return the page."""
    page = markdown(rows, "Accuracy against full KV", f"`{command}`\n\n{_setting(options)}")
    if output:
        about = {key: _plain(value) for key, value in options._asdict().items()}
        content = {
            "command": command,
            "options": about,
            "full_kv_fails": [
                {"task": row.task, "length": row.length, "accuracy": row.accuracy}
                for row in failures(rows)
            ],
            "rows": [row._asdict() for row in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")
        output.with_suffix(".md").write_text(page)
        if telling(rows):
            plot(output.with_suffix(".png"), telling(rows))
    return page


def _setting(options: Options) -> str:
    model = f"Model {options.model.name}, in {options.dtype} on {options.device}."
    return f"{model} Filler: {options.filler}. Seed {options.seed}."


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else value


def markdown(rows: Sequence[Row], title: str, about: str) -> str:
    """A page with, for each length, all tasks taken together, and each by itself."""
    parts = [f"# {title}", about, _NOTE]
    if early := [row for row in rows if row.under_pressure]:
        names = ", ".join(dict.fromkeys(map(label, early)))
        parts.append(f"**Memory ran out and pages were sealed early: {names}.**")
    if failed := failures(rows):
        parts.append(_failed(failed))
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        parts.append(f"## {length:,} tokens")
        parts += [summary(telling(here))] if telling(here) else []
        parts.append(lines(here))
    return "\n\n".join(parts) + "\n"


def _failed(rows: Sequence[Row]) -> str:
    cells = ", ".join(f"{row.task} at {row.length:,} tokens ({row.accuracy:.0%})" for row in rows)
    return (
        f"**Full KV itself is right in fewer than {TELLS:.0%} of these, so they tell nothing about "
        f"policies and are left out of summaries and plot: {cells}.**"
    )


def label(row: Row | Point | DocumentRow) -> str:
    """Name of the row's variant."""
    return row.policy if row.target is None else f"{row.policy} at {row.target:g}×"


def outcome(rows: Sequence[Row], seconds: float) -> str:
    """One line about a variant that is through."""
    accuracy = sum(row.accuracy * row.samples for row in rows) / sum(row.samples for row in rows)
    compared = "" if rows[0].policy == FULL else f", KL {_mean_kl(rows):.2g}"
    share = sum(1 / row.physical_compression for row in rows) / len(rows)
    return (
        f"{label(rows[0])}: accuracy {accuracy:.1%}{compared}, compression {1 / share:.2f}, "
        f"{len(rows)} cells in {seconds:.0f} s"
    )


def _mean_kl(rows: Sequence[Row]) -> float:
    return sum(row.mean_kl for row in rows) / len(rows)


def summary(rows: Sequence[Row]) -> str:
    """A line per variant, its tasks taken together; KL is the mean of theirs."""
    body = []
    for point in points(rows):
        kl = _mean_kl([row for row in rows if label(row) == label(point)])
        body.append(
            (
                label(point),
                str(point.samples),
                f"{point.accuracy:.1%} ({point.low:.1%}–{point.high:.1%})",
                "–" if point.policy == FULL else f"{kl:.2g}",
                f"{1 / point.bytes_share:.2f}",
            )
        )
    return table([("policy", "samples, all tasks", "accuracy", "KL", "compression"), *body])


def lines(rows: Sequence[Row]) -> str:
    """A line per row, under a head."""
    return table([_HEAD, *map(_cells, rows)])


_HEAD = (
    "policy",
    "task",
    "samples",
    "prompt tokens",
    "accuracy",
    "recall",
    "agreement",
    "KL",
    "output tokens",
    "compression",
    "high / low / pruned",
    "sealed",
)


def table(cells: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|" + " --- |" * len(cells[0]), *body])


def _cells(row: Row) -> tuple[str, ...]:
    tiers = "–"
    if row.kept_high is not None and row.kept_low is not None and row.pruned is not None:
        tiers = f"{row.kept_high:.0%} / {row.kept_low:.0%} / {row.pruned:.0%}"
    compared = ("–", "–")
    if row.policy != FULL:
        kl = (row.mean_kl_high - row.mean_kl_low) / 2
        agreement = (row.agreement_high - row.agreement_low) / 2
        compared = f"{row.agreement:.1%} ± {agreement:.1%}", f"{row.mean_kl:.2g} ± {kl:.1g}"
    return (
        label(row),
        row.task,
        str(row.samples),
        f"{row.prompt_tokens:,.0f}",
        f"{row.accuracy:.1%} ({row.accuracy_low:.0%}–{row.accuracy_high:.0%})",
        f"{row.recall:.1%}",
        *compared,
        f"{row.output_tokens:.1f}",
        f"{row.physical_compression:.2f}",
        tiers,
        "–" if row.sealed is None else f"{row.sealed:.0%}",
    )
