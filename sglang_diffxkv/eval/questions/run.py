# SPDX-License-Identifier: Apache-2.0
"""The same prompts for every variant's server, a record for each cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_diffxkv.client import Client
from sglang_diffxkv.eval.ask import AT_ONCE
from sglang_diffxkv.eval.footprint import in_16_bit
from sglang_diffxkv.eval.model import Model, load_model
from sglang_diffxkv.eval.options import Options, check_tasks
from sglang_diffxkv.eval.progress import Progress
from sglang_diffxkv.eval.questions.answers import CellAnswers, ask, count_requests
from sglang_diffxkv.eval.questions.prompts import Cell, make_cells
from sglang_diffxkv.eval.questions.report import outcome
from sglang_diffxkv.eval.questions.score import QuestionRecord, score
from sglang_diffxkv.eval.servers import Servers, measure_each
from sglang_diffxkv.eval.tasks.registry import NAMES, choose_suite
from sglang_diffxkv.eval.variants import Variant, make_variants


def evaluate(options: Options) -> Iterator[QuestionRecord]:
    """Records in the order of variants, tasks and lengths, as soon as each is measured.

    Raises:
        ConfigError: the options ask for something that does not exist or cannot be met.
        ServerError: a server did not start.
    """
    check_tasks(options.tasks, NAMES)
    model = load_model(options.model, options.dtype)
    variants = make_variants(options, model)
    suite = choose_suite(options.model, options.filler)
    cells = make_cells(
        model.tokenizer, options.tasks, options.lengths, options.samples, options.seed, suite
    )
    yield from compare(model, options.device, variants, cells)


def compare(
    model: Model, device: str, variants: Sequence[Variant], cells: Sequence[Cell]
) -> Iterator[QuestionRecord]:
    """Records of any variants, the first of which is full KV, on any cells."""
    full: dict[int, CellAnswers] = {}
    progress = Progress(_requests(variants, cells))

    def measure(client: Client, variant: Variant) -> Iterator[QuestionRecord]:
        for i, cell in _cells_of(variant, cells):
            progress.describe(f"{variant.name}: {cell.task}, {cell.length} tokens")
            given = [answer.ids for answer in full[i].answers] if i in full else None
            found = ask(client, cell, given, variant.config is not None, progress.advance)
            found = found._replace(stats=[in_16_bit(stats, model) for stats in found.stats])
            yield score(variant, cell, found, full.setdefault(i, found))

    servers = Servers(model, device, _longest(cells), AT_ONCE)
    yield from measure_each(servers, variants, progress, measure, outcome)


def _cells_of(variant: Variant, cells: Sequence[Cell]) -> list[tuple[int, Cell]]:
    """Those that the variant is made for, with their places."""
    return [(i, cell) for i, cell in enumerate(cells) if variant.length in (None, cell.length)]


def _requests(variants: Sequence[Variant], cells: Sequence[Cell]) -> int:
    """Of a whole run: the first variant's answers are those that the others are compared on."""
    return sum(
        count_requests(cell, is_forced=number > 0)
        for number, variant in enumerate(variants)
        for _, cell in _cells_of(variant, cells)
    )


def _longest(cells: Sequence[Cell]) -> int:
    return max(len(ids) for cell in cells for p in cell.prompts for ids in (p.ids, p.warm))
