# SPDX-License-Identifier: Apache-2.0
"""What predicting importance adds to a prefill: both timed in turns, on one thread.

python -m bench.accuracy.importance_cost MODEL IMPORTANCE [--tokens 1024] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.accuracy.real_models.ours import ModelShape
from bench.accuracy.real_models.reader import Reader, States
from bench.serving.common import table, write_results
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, make_layout
from sglang_diffxkv.policy.importance.file import load_importance
from sglang_diffxkv.policy.importance.model import ImportanceModel


def predict(model: ImportanceModel, states: States) -> None:
    """Of all layers' pages of a prompt."""
    for layer, (keys, values) in enumerate(zip(states.keys, states.values, strict=True)):
        by_page = (x.transpose(0, 1).unflatten(0, (-1, PAGE_TOKENS)) for x in (keys, values))
        model.predict(layer, *by_page)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("importance", type=Path, help="that `sglang-diffxkv calibrate` wrote")
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader = Reader(options.model)
    shape = ModelShape.of(reader.model.config)
    layout = make_layout(
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        raw_itemsize=4,
        high=FORMATS["K8V4"],
        low=FORMATS["K4V2"],
    )
    model = load_importance(options.importance, layout, shape.layers).model
    ids = torch.randint(reader.model.config.vocab_size, (options.tokens,))
    states = reader.prefill(ids)
    rounds = []
    for _ in range(options.rounds):
        both = seconds(lambda: predict(model, states)), seconds(lambda: reader.prefill(ids))
        rounds.append(both)
    predicting, prefill = torch.tensor(rounds).T
    share = predicting / prefill
    rows = [
        [name, f"{x.median():.4g}", f"{x.min():.4g} to {x.max():.4g}"]
        for name, x in (
            ("importance of its pages, ms", 1000 * predicting),
            (f"prefill of {options.tokens:,} tokens, ms", 1000 * prefill),
            ("share of prefill, %", 100 * share),
        )
    ]
    write_results(
        "importance_cost",
        f"{options.model.name}: what predicting importance costs",
        {"rounds": rounds},
        f"One thread, fp32, plain torch, {options.rounds} rounds in turns; the weights of the "
        f"importance model take {model.nbytes / 2**20:.2f} MiB.\n\n"
        + table([["", "median", "range"], *rows]),
    )


if __name__ == "__main__":
    main()
