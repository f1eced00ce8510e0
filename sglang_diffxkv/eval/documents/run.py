# SPDX-License-Identifier: Apache-2.0
"""The same documents for every variant's server, a record for each way to read them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from sglang_diffxkv.client import Client
from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.eval.documents.corpus import load_documents
from sglang_diffxkv.eval.documents.passages import Passage, cut, half_of
from sglang_diffxkv.eval.documents.read import STEP, TASKS, Reading, Session
from sglang_diffxkv.eval.documents.report import outcome
from sglang_diffxkv.eval.documents.score import DocumentRecord, compare, score
from sglang_diffxkv.eval.footprint import in_16_bit
from sglang_diffxkv.eval.model import Model, load_model
from sglang_diffxkv.eval.options import Options, check_tasks
from sglang_diffxkv.eval.progress import Progress
from sglang_diffxkv.eval.servers import Servers, measure_each
from sglang_diffxkv.eval.variants import VARIANTS, Variant, make_variants

AT_ONCE = 4
"""Documents that a pool holds; they are read one by one, as each step is to be one prefill."""


def _all_sealed(config: DiffXKVConfig | None) -> DiffXKVConfig | None:
    """No window: all that is read is sealed. That of `streaming` is all that it keeps."""
    if config is None or config.policy == "streaming":
        return config
    return replace(config, window=0)


CONFIGS: Mapping[str, DiffXKVConfig | None] = {
    name: _all_sealed(config) for name, config in VARIANTS.items()
}


def evaluate_documents(options: Options, files: Sequence[Path]) -> Iterator[DocumentRecord]:
    """Records in the order of variants, lengths and tasks, as soon as each is measured.

    Args:
        options: `lengths` are of documents, in tokens; `samples` of each.
        files: of the documents; none stands for Python's documentation.

    Raises:
        ConfigError: the options ask for something that does not exist or cannot be met.
        ServerError: a server did not start.
    """
    check_tasks(options.tasks, TASKS, " on documents")
    halves = [half_of(length) for length in options.lengths]
    model = load_model(options.model, options.dtype)
    variants = make_variants(options._replace(lengths=halves), model, CONFIGS)
    documents = load_documents(files or None)
    cells = {
        length: cut(model.tokenizer, documents, length, options.samples)
        for length in options.lengths
    }
    if "shared" in options.tasks and min(map(len, cells.values())) < 2:
        raise ConfigError("task 'shared' needs two documents")
    yield from compare_documents(model, options.device, variants, cells, options.tasks)


def compare_documents(
    model: Model,
    device: str,
    variants: Sequence[Variant],
    cells: Mapping[int, Sequence[Passage]],
    tasks: Sequence[str],
) -> Iterator[DocumentRecord]:
    """Records of any variants, the first of which is full KV, on the passages of each length."""
    passages = sum(len(cells[n]) for variant in variants for n in _lengths(variant, cells))
    progress = Progress(passages * len(tasks), " documents")
    servers = Servers(model, device, max(cells) + STEP, AT_ONCE)
    with tempfile.TemporaryDirectory(prefix="diffxkv-full-") as folder:
        full = FullReadings(Path(folder))

        def measure(client: Client, variant: Variant) -> Iterator[DocumentRecord]:
            for length, task in product(_lengths(variant, cells), tasks):
                progress.describe(f"{variant.name}: {task}, {length} tokens")
                compared, stats = [], []
                for number, passage in enumerate(cells[length]):
                    session = Session(client, variant.config is not None)
                    other = cells[length][(number + 1) % len(cells[length])]
                    reading = TASKS[task](session, passage, other)
                    if variant.config is None:
                        full.put(task, passage, number, reading)
                    if session.stats is not None:
                        stats.append(in_16_bit(session.stats, model))
                    compared.append(compare(passage, full.get(task, passage, number), reading))
                    progress.advance()
                yield score(variant, task, length, compared, stats)

        yield from measure_each(servers, variants, progress, measure, outcome)


def _lengths(variant: Variant, lengths: Iterable[int]) -> list[int]:
    """Those whose halves the variant is made for."""
    return [length for length in lengths if variant.length in (None, half_of(length))]


class FullReadings:
    """Full KV's readings, in files: 50 long documents would be a gigabyte."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, task: str, passage: Passage, number: int, reading: Reading) -> None:
        np.savez(self._file(task, passage, number), **reading._asdict())

    def get(self, task: str, passage: Passage, number: int) -> Reading:
        with np.load(self._file(task, passage, number)) as arrays:
            return Reading(**arrays)

    def _file(self, task: str, passage: Passage, number: int) -> Path:
        return self._folder / f"{task}-{len(passage.ids)}-{number}.npz"
