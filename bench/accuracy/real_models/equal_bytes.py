# SPDX-License-Identifier: Apache-2.0
"""DiffKV's claims at equal bytes: keys need more bits than values, thresholds beat fixed shares.

The bytes are those of a uniform format each time. The thresholds of `diffkv` are tuned to them; the
static ways have as many tokens of each tier in every head, or as many bytes in every page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from bench.accuracy.real_models.fixed_shares import seal_fixed
from bench.accuracy.real_models.methods import with_knob
from bench.accuracy.real_models.ours import ModelShape, Sealed, Sealer
from bench.accuracy.real_models.protocol import WINDOW
from bench.accuracy.real_models.reader import States
from bench.accuracy.real_models.tuning import Calibration
from bench.serving.common import table
from sglang_diffxkv.config import DiffXKVConfig, Tiers

UNIFORM = ("K4V4", "K4V2", "K2V2")
THRESHOLDS = "thresholds"

Seal = Callable[[States], Sealed]


class Way(NamedTuple):
    """One way to take the bytes of a uniform format."""

    bytes_of: str
    name: str


class Measured(NamedTuple):
    """One document's answer; `compression`: 16-bit bytes over those taken."""

    kl: float
    agreement: float
    compression: float


def mean(answers: Sequence[Measured]) -> Measured:
    return Measured(*(sum(x) / len(x) for x in zip(*answers, strict=True)))


def ways(shape: ModelShape, tokens: int, calibration: Calibration) -> Iterator[tuple[Way, Seal]]:
    """What is compared on prompts that leave `tokens` to compress.

    Raises:
        ConfigError: no thresholds reach a format's bytes.
    """
    for tier in UNIFORM:
        uniform = DiffXKVConfig(policy="uniform", tiers=Tiers(tier, "K2V2"))
        target = calibration.compression(uniform)
        tuned = calibration.with_alphas(DiffXKVConfig(policy="diffkv", window=WINDOW), target)
        dynamic = Sealer(tuned, shape)
        high, low = tuned.tiers.high, tuned.tiers.low
        alphas = f"α {tuned.alpha_high:.3g} / {tuned.alpha_low:.3g}"
        yield Way(tier, f"{THRESHOLDS}, {high}/{low}, {alphas}"), dynamic.seal
        swapped = replace(tuned, tiers=Tiers("K4V8", low))
        yield Way(tier, f"the same, K4V8/{low}"), Sealer(swapped, shape).seal
        yield Way(tier, f"fixed share per head, {high}/{low}"), partial(seal_fixed, dynamic)
        static = replace(tuned, alpha_high=0.0, alpha_low=0.0)  # all high, until bytes are short
        capped = calibration.with_caps(static, target)
        yield Way(tier, f"fixed bytes per page, {high}/{low}"), Sealer(capped, shape).seal
        yield Way(tier, f"uniform {tier}"), Sealer(uniform, shape).seal
        solved = with_knob("diffxkv", target, shape, tokens)
        yield Way(tier, "`diffxkv`"), Sealer(solved, shape).seal


def report(found: Mapping[Way, Sequence[Measured]]) -> str:
    """Of each way, and on how many documents it loses more than the thresholds do."""
    lines: list[list[object]] = [
        ["bytes of", "way", "KL", "top-1 agreement", "compression", "worse than thresholds"]
    ]
    thresholds = {
        way.bytes_of: answers for way, answers in found.items() if way.name.startswith(THRESHOLDS)
    }
    for way, answers in found.items():
        beside = thresholds[way.bytes_of]
        worse = sum(x.kl > y.kl for x, y in zip(answers, beside, strict=True))
        x = mean(answers)
        cells = [f"{x.kl:.2g}", f"{x.agreement:.1%}", f"{x.compression:.2f}×"]
        compared = "–" if answers is beside else f"{worse} of {len(answers)} documents"
        lines.append([way.bytes_of, way.name, *cells, compared])
    return table(lines)
