# SPDX-License-Identifier: Apache-2.0
"""Records as JSON, as a Markdown page and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_diffxkv.eval.options import Options
from sglang_diffxkv.eval.page import by_length, head_of_page, table, tiers_cell, write_files
from sglang_diffxkv.eval.questions.plot import plot, points
from sglang_diffxkv.eval.questions.score import TELLS, QuestionRecord, failures, telling
from sglang_diffxkv.eval.record import label
from sglang_diffxkv.eval.variants import FULL

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


def write(
    records: Sequence[QuestionRecord], command: str, options: Options, output: Path | None
) -> str:
    """Write JSON, page and plot to `output` and beside it, if given; return the page."""
    model = f"Model {options.model.name}, in {options.dtype} on {options.device}."
    setting = f"{model} Filler: {options.filler}. Seed {options.seed}."
    page = markdown(records, "Accuracy against full KV", f"`{command}`\n\n{setting}")
    if output:
        failed = [
            {"task": record.task, "length": record.length, "accuracy": record.accuracy}
            for record in failures(records)
        ]
        content = {"command": command, "options": options, "full_kv_fails": failed}
        write_files(output, content | {"rows": records}, page)
        if telling(records):
            plot(output.with_suffix(".png"), telling(records))
    return page


def markdown(records: Sequence[QuestionRecord], title: str, about: str) -> str:
    """A page with, for each length, all tasks taken together, and each by itself."""
    parts = head_of_page(title, about, _NOTE, records)
    if failed := failures(records):
        parts.append(_failed(failed))
    for length, here in by_length(records):
        parts.append(f"## {length:,} tokens")
        parts += [summary(telling(here))] if telling(here) else []
        parts.append(table([_HEAD, *map(_cells, here)]))
    return "\n\n".join(parts) + "\n"


def _failed(records: Sequence[QuestionRecord]) -> str:
    cells = ", ".join(f"{x.task} at {x.length:,} tokens ({x.accuracy:.0%})" for x in records)
    return (
        f"**Full KV itself is right in fewer than {TELLS:.0%} of these, so they tell nothing about "
        f"policies and are left out of summaries and plot: {cells}.**"
    )


def outcome(records: Sequence[QuestionRecord], seconds: float) -> str:
    """One line about a variant that is through."""
    samples = sum(record.samples for record in records)
    accuracy = sum(record.accuracy * record.samples for record in records) / samples
    compared = "" if records[0].is_full else f", KL {_mean_kl(records):.2g}"
    share = sum(1 / record.physical_compression for record in records) / len(records)
    return (
        f"{records[0].label}: accuracy {accuracy:.1%}{compared}, compression {1 / share:.2f}, "
        f"{len(records)} cells in {seconds:.0f} s"
    )


def _mean_kl(records: Sequence[QuestionRecord]) -> float:
    return sum(record.mean_kl for record in records) / len(records)


def summary(records: Sequence[QuestionRecord]) -> str:
    """A line per variant, its tasks taken together; KL is the mean of theirs."""
    body = []
    for point in points(records):
        name = label(point.policy, point.target)
        kl = _mean_kl([record for record in records if record.label == name])
        body.append(
            (
                name,
                str(point.samples),
                f"{point.accuracy:.1%} ({point.low:.1%}–{point.high:.1%})",
                "–" if point.policy == FULL else f"{kl:.2g}",
                f"{1 / point.bytes_share:.2f}",
            )
        )
    return table([("policy", "samples, all tasks", "accuracy", "KL", "compression"), *body])


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


def _cells(record: QuestionRecord) -> tuple[str, ...]:
    compared = ("–", "–")
    if not record.is_full:
        kl = (record.mean_kl_high - record.mean_kl_low) / 2
        agreement = (record.agreement_high - record.agreement_low) / 2
        compared = f"{record.agreement:.1%} ± {agreement:.1%}", f"{record.mean_kl:.2g} ± {kl:.1g}"
    return (
        record.label,
        record.task,
        str(record.samples),
        f"{record.prompt_tokens:,.0f}",
        f"{record.accuracy:.1%} ({record.accuracy_low:.0%}–{record.accuracy_high:.0%})",
        f"{record.recall:.1%}",
        *compared,
        f"{record.output_tokens:.1f}",
        f"{record.physical_compression:.2f}",
        tiers_cell(record),
        "–" if record.sealed is None else f"{record.sealed:.0%}",
    )
