# SPDX-License-Identifier: Apache-2.0
"""What the code's own constants were chosen by: KL of a real model with each of them varied.

python -m bench.accuracy.real_models.choices MODEL [--documents 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from bench.accuracy.real_models.__main__ import make_samples
from bench.accuracy.real_models.ours import ModelShape, Sealer
from bench.accuracy.real_models.protocol import measure
from bench.accuracy.real_models.reader import LayerPrefix, Reader
from bench.serving.common import table, write_results
from sglang_diffxkv.config import DiffXKVConfig, Tiers
from sglang_diffxkv.policy.budgeting import target
from sglang_diffxkv.policy.budgeting.target import PRIOR

LENGTHS = (1024, 2048)
UTILITY = target.low_utility(*Tiers("K8V4", "K4V2").formats, False)


class Choice(NamedTuple):
    """A configuration, and the constants that are not part of one."""

    name: str
    config: DiffXKVConfig
    centres: bool = True
    utility: float = UTILITY
    prior: float = PRIOR


def choices() -> Iterator[Choice]:
    for tier in ("K8V4", "K4V4", "K4V2"):
        config = DiffXKVConfig(policy="uniform", tiers=Tiers(tier, "K2V2"))
        for centres in (True, False):
            yield Choice(f"uniform {tier}, centred: {centres}", config, centres)
    for ratio in (4.0, 6.0, 8.0):
        config = DiffXKVConfig(target=ratio)
        at = f"diffxkv at {ratio:g}×"
        yield Choice(at, config)
        yield Choice(f"{at}, not centred", config, centres=False)
        for prior in (0.0, 0.1, 1.0):
            yield Choice(f"{at}, prior {prior:g}", config, prior=prior)
        for utility in (0.9, 0.98):
            yield Choice(f"{at}, u_low {utility:g}", config, utility=utility)
        for queries in (128, 256):
            varied = DiffXKVConfig(target=ratio, score_queries=queries)
            yield Choice(f"{at}, {queries} queries", varied)
        for sink in (1, 16):
            yield Choice(f"{at}, {sink} sinks", DiffXKVConfig(target=ratio, sink=sink))
        for tiers in (Tiers("K8V4", "K4V4"), Tiers("K4V4", "K4V2"), Tiers("K8V4", "K2V2")):
            varied = DiffXKVConfig(target=ratio, tiers=tiers)
            yield Choice(f"{at}, {tiers.high}/{tiers.low}", varied)
    for retained in (0.998, 0.999, 0.9995, 0.9998):
        yield Choice(f"diffxkv, target {retained:g}", DiffXKVConfig(target=retained))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--documents", type=int, default=3)
    options = parser.parse_args()
    reader, tried = Reader(options.model), list(choices())
    shape = ModelShape.of(reader.model.config)
    sealers = [_sealer(choice, shape) for choice in tried]
    found: list[list[tuple[float, float, float]]] = [[] for _ in tried]
    for sample in make_samples(options.model, options.documents, LENGTHS):
        states = reader.prefill(sample.before)
        whole = [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]
        full = reader.log_probabilities(sample.after, sample.prefilled, whole)
        for choice, sealer, answers in zip(tried, sealers, found, strict=True):
            with _constants(choice):
                sealed = sealer.seal(states)
            logs = reader.log_probabilities(sample.after, sample.prefilled, sealed.prefix)
            got = measure(full, logs, sample, sealed.nbytes)
            dense = sample.compressed * shape.token_bytes
            answers.append((got.kl, got.agreement, dense / got.nbytes))
    lines: list[list[object]] = [["", "KL", "top-1 agreement", "compression"]]
    rows = []
    for choice, answers in zip(tried, found, strict=True):
        kl, same, ratio = torch.tensor(answers, dtype=torch.float64).mean(0).tolist()
        rows.append({"name": choice.name, "kl": kl, "agreement": same, "compression": ratio})
        lines.append([choice.name, f"{kl:.2g}", f"{same:.1%}", f"{ratio:.2f}×"])
    text = f"""\
{options.documents} documents of {LENGTHS[0]:,} and {LENGTHS[1]:,} tokens, in turns, as in
[real_models.md](real_models.md). Unless another is named, the code's own constants: u_low
{UTILITY:g}, prior {PRIOR:g}, {DiffXKVConfig().score_queries} queries, {DiffXKVConfig().sink} sinks.

{table(lines)}"""
    title = f"{options.model.name}: what the constants were chosen by"
    write_results("real_models_choices", title, {"rows": rows}, text)


def _sealer(choice: Choice, shape: ModelShape) -> Sealer:
    with _constants(choice):
        sealer = Sealer(choice.config, shape)
    if not choice.centres:
        sealer.store.key_means.set(torch.zeros(()))
    return sealer


def _constants(choice: Choice) -> patch.multiple:
    return patch.multiple(target, _OTHER_LOW_UTILITY=choice.utility, PRIOR=choice.prior)


if __name__ == "__main__":
    main()
