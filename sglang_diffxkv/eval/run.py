# SPDX-License-Identifier: Apache-2.0
"""One server per variant, the same prompts for all, a row for each cell."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ByteSize

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.eval.ask import AT_ONCE, CellAnswers, ask, count_requests
from sglang_diffxkv.eval.dtype import ITEMSIZES
from sglang_diffxkv.eval.footprint import in_16_bit
from sglang_diffxkv.eval.progress import Progress
from sglang_diffxkv.eval.prompts import Cell, make_cells
from sglang_diffxkv.eval.report import outcome
from sglang_diffxkv.eval.score import Row, score
from sglang_diffxkv.eval.tasks.registry import NAMES, choose_suite
from sglang_diffxkv.eval.variants import (
    FULL,
    ITEMSIZE,
    KNOBS,
    VARIANTS,
    Shape,
    Variant,
    make_variant,
    served,
)
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.launch import ServerProcess

log = logging.getLogger(__name__)

_SLACK = 256
"""Tokens beside a prompt: its answer."""
_ROOM = 1.5
"""Times the prompts in flight that a pool holds, so that no page is sealed for want of memory."""


class Options(NamedTuple):
    """What to evaluate; see `sglang-diffxkv eval --help`."""

    model: Path
    policies: Sequence[str]
    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    seed: int
    device: str
    targets: Sequence[float]
    """Physical compressions that policies with a knob are set to; none: as configured."""
    dtype: str
    """That servers compute in, one of `ITEMSIZES`."""
    filler: str
    """Name of the text that needles are hidden in."""


class Model(NamedTuple):
    """Of a checkpoint: what bytes depend on, its tokenizer, and the dtype that it is served in."""

    layers: int
    kv_heads: int
    head_dim: int
    tokenizer: Any
    dtype: str
    """One of `ITEMSIZES`."""

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Of one token's KV in SGLang's own pool, in 16 bit."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEMSIZE


def load_model(path: Path, dtype: str = "bfloat16") -> Model:
    """Read a Hugging Face checkpoint's configuration and tokenizer; weights are not loaded.

    Args:
        dtype: that it is to be served in.

    Raises:
        ConfigError: there is none, or none that transformers knows.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a checkpoint: {str(error).splitlines()[0]}") from None
    heads = config.num_attention_heads
    return Model(
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        tokenizer,
        dtype,
    )


def make_variants(
    options: Options, model: Model, configs: Mapping[str, DiffXKVConfig | None] = VARIANTS
) -> list[Variant]:
    """Full KV first, as all others are compared with it; then a variant per policy and target.

    They start from `configs`; those with a target are made for one length each. A target that a
    policy cannot meet is left out, with a warning.

    Raises:
        ConfigError: an unknown name, or nothing but targets that cannot be met.
    """
    shape = Shape(model.head_dim, model.kv_heads, 0)
    variants = [make_variant(FULL, None, shape, configs)]
    refused = None
    for name in dict.fromkeys(options.policies):
        if name not in KNOBS or not options.targets:
            variants.append(make_variant(name, None, shape, configs))
            continue
        for target, length in product(options.targets, options.lengths):
            try:
                sized = shape._replace(tokens=length)
                variants.append(make_variant(name, target, sized, configs))
            except ConfigError as error:
                refused = error
                log.warning("left out: %s", error)
    variants = list(dict.fromkeys(variants))
    if refused and len(variants) == 1:
        raise refused
    return variants


def evaluate(options: Options) -> Iterator[Row]:
    """Rows in the order of variants, tasks and lengths, as soon as each is measured.

    Raises:
        ConfigError: the options ask for something that does not exist or cannot be met.
        ServerError: a server did not start.
    """
    unknown = [task for task in options.tasks if task not in NAMES]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; one of: {', '.join(NAMES)}")
    model = load_model(options.model, options.dtype)
    variants = make_variants(options, model)
    cells = make_cells(
        model.tokenizer,
        list(options.tasks),
        list(options.lengths),
        options.samples,
        options.seed,
        choose_suite(options.model, options.filler),
    )
    yield from compare(options.model, options.device, model, variants, cells)


def compare(
    path: Path,
    device: str,
    model: Model,
    variants: Sequence[Variant],
    cells: Sequence[Cell],
) -> Iterator[Row]:
    """Rows of any variants, the first of which is full KV, on any cells."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    full: dict[int, CellAnswers] = {}
    with (
        tempfile.TemporaryDirectory(prefix="diffxkv-eval-") as folder,
        Progress(_requests(variants, cells)) as progress,
    ):
        for variant in variants:
            begin, rows = time.monotonic(), []
            progress.describe(f"{variant.name}: start")
            arguments = server_arguments(path, device, model, variant, _longest(cells))
            with ServerProcess(*arguments, log=Path(folder) / "server.log") as server:
                for i, cell in _cells_of(variant, cells):
                    progress.describe(f"{variant.name}: {cell.task}, {cell.length} tokens")
                    forced = [answer.ids for answer in full[i].answers] if i in full else None
                    is_ours = variant.config is not None
                    try:
                        found = ask(server.url, cell, forced, is_ours, progress.advance)
                    except Exception as error:
                        error.add_note(server.log_tail())
                        raise
                    found = found._replace(stats=[_in_16_bit(s, model) for s in found.stats])
                    rows.append(score(variant, cell, found, full.setdefault(i, found)))
                    yield rows[-1]
            progress.line(outcome(rows, time.monotonic() - begin))


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


def _in_16_bit(stats: dict[str, Any], model: Model) -> dict[str, Any]:
    return in_16_bit(stats, model.itemsize, model.layers, model.kv_heads, model.head_dim)


def _longest(cells: Sequence[Cell]) -> int:
    return max(len(ids) for cell in cells for p in cell.prompts for ids in (p.ids, p.warm))


def server_arguments(
    path: Path, device: str, model: Model, variant: Variant, longest: int, at_once: int = AT_ONCE
) -> list[object]:
    """Of a server whose pool holds `at_once` prompts of `longest` tokens with room to spare."""
    whole = -(-(longest + _SLACK) // PAGE_TOKENS) * PAGE_TOKENS
    tokens = int(_ROOM * at_once) * whole
    options: list[object] = ["--model-path", path, "--device", device, "--dtype", model.dtype]
    options += ["--max-running-requests", at_once, "--page-size", PAGE_TOKENS]
    # A prompt is compressed once it is whole, as the papers have it.
    options += ["--chunked-prefill-size", whole]
    if device == "cpu":
        options += ["--sleep-on-idle"]
    if variant.config is None:
        options += ["--max-total-tokens", tokens]
        return [*options, *(["--attention-backend", "torch_native"] if device == "cpu" else [])]
    # Half for raw pages: here prompts wait together, uncompressed, to be sealed.
    memory = ByteSize(2 * tokens * model.token_bytes * model.itemsize // ITEMSIZE)
    config = replace(served(variant.config, model.itemsize), memory_bytes=memory, raw_share=0.5)
    return [*options, "--attention-backend", "diffxkv", "--diffxkv-config", config.to_json()]
