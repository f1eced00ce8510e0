# SPDX-License-Identifier: Apache-2.0
"""One server per variant, the same documents for all, a row for each way to read them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.eval.client import Client
from sglang_diffxkv.eval.documents.corpus import load_documents
from sglang_diffxkv.eval.documents.passages import Passage, cut, half_of
from sglang_diffxkv.eval.documents.read import STEP, TASKS, Reading, Session
from sglang_diffxkv.eval.documents.report import outcome
from sglang_diffxkv.eval.documents.score import Compared, DocumentRow, compare, score
from sglang_diffxkv.eval.footprint import in_16_bit
from sglang_diffxkv.eval.progress import Progress
from sglang_diffxkv.eval.run import Model, Options, load_model, make_variants, server_arguments
from sglang_diffxkv.eval.variants import VARIANTS, Variant
from sglang_diffxkv.launch import ServerProcess

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


def evaluate_documents(options: Options, files: Sequence[Path]) -> Iterator[DocumentRow]:
    """Rows in the order of variants, lengths and tasks, as soon as each is measured.

    Args:
        options: `lengths` are of documents, in tokens; `samples` of each.
        files: of the documents; none stands for Python's documentation.

    Raises:
        ConfigError: the options ask for something that does not exist or cannot be met.
        ServerError: a server did not start.
    """
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r} on documents; one of: {', '.join(TASKS)}")
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
    yield from compare_documents(
        options.model, options.device, model, variants, cells, options.tasks
    )


def compare_documents(
    path: Path,
    device: str,
    model: Model,
    variants: Sequence[Variant],
    cells: Mapping[int, Sequence[Passage]],
    tasks: Sequence[str],
) -> Iterator[DocumentRow]:
    """Rows of any variants, the first of which is full KV, on the passages of each length."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    count = sum(
        len(cells[length]) for variant in variants for length in _lengths(variant, cells)
    ) * len(tasks)
    with (
        tempfile.TemporaryDirectory(prefix="diffxkv-eval-") as folder,
        Progress(count, " documents") as progress,
    ):
        full = FullReadings(Path(folder))
        for variant in variants:
            begin, rows = time.monotonic(), []
            progress.describe(f"{variant.name}: start")
            arguments = server_arguments(path, device, model, variant, max(cells) + STEP, AT_ONCE)
            with ServerProcess(*arguments, log=Path(folder) / "server.log") as server:
                for length, task in product(_lengths(variant, cells), tasks):
                    progress.describe(f"{variant.name}: {task}, {length} tokens")
                    try:
                        found = _read_all(server.url, variant, task, cells[length], full, progress)
                    except Exception as error:
                        error.add_note(server.log_tail())
                        raise
                    stats = [_in_16_bit(s, model) for s in found.stats]
                    rows.append(score(variant, task, length, found.compared, stats))
                    yield rows[-1]
            progress.line(outcome(rows, time.monotonic() - begin))


def _lengths(variant: Variant, lengths: Iterable[int]) -> list[int]:
    """Those whose halves the variant is made for."""
    return [length for length in lengths if variant.length in (None, half_of(length))]


def _in_16_bit(stats: dict[str, Any], model: Model) -> dict[str, Any]:
    return in_16_bit(stats, model.itemsize, model.layers, model.kv_heads, model.head_dim)


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


class _Found(NamedTuple):
    compared: list[Compared]
    stats: list[dict[str, Any]]
    """Of our pool; none of SGLang's own."""


def _read_all(
    url: str,
    variant: Variant,
    task: str,
    passages: Sequence[Passage],
    full: FullReadings,
    progress: Progress,
) -> _Found:
    found = _Found([], [])
    for number, passage in enumerate(passages):
        session = Session(Client(url), variant.config is not None)
        reading = TASKS[task](session, passage, passages[(number + 1) % len(passages)])
        if variant.config is None:
            full.put(task, passage, number, reading)
        if session.stats is not None:
            found.stats.append(session.stats)
        found.compared.append(compare(passage, full.get(task, passage, number), reading))
        progress.advance()
    return found
