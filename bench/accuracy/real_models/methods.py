# SPDX-License-Identifier: Apache-2.0
"""Our policies, each with its knob set for a physical compression of what it compresses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bench.accuracy.real_models.ours import FRAME_ID_BYTES, ModelShape, entry_bytes
from bench.accuracy.real_models.protocol import TARGETS, WINDOW
from bench.accuracy.real_models.tuning import Calibration
from sglang_diffxkv.config import DiffXKVConfig, Tiers
from sglang_diffxkv.eval.variants import ITEMSIZE, KNOBS, VARIANTS, Shape
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, make_layout
from sglang_diffxkv.policy.registry import policy_class
from sglang_diffxkv.policy.settings import ConfigError

log = logging.getLogger(__name__)

QUANTIZED = (3.2, 32 / 9, 16 / 3, 6.4)
"""Compressions of codes of 4 and of 2 bits with a 16-bit scale and zero to 32 or 64 of them."""
GOALS = (2.8, 3.8)
"""Whose loss without prediction is to be had at 4 and 6 with it."""
FURTHEST = 8.8
"""What a peer that prunes and quantizes takes where it is set for 8."""
PREDICTED = "diffxkv, predicted"
POLICIES = ("diffxkv", "xkv", "snapkv")
UNIFORM = ("K8V8", "K8V4", "K4V4", "K4V2", "K2V2")


class Method(NamedTuple):
    """A configuration; `target` is the compression it was set for, None where it is what it is."""

    name: str
    target: float | None
    config: DiffXKVConfig


class Learnt(NamedTuple):
    """What policies were told of the model, from other texts than those that they are asked about.

    Attributes:
        diffkv: as `tuned`. importance: model that `diffxkv` predicts with, beside `diffxkv` without
            one; None: there is none.
    """

    diffkv: Mapping[float, DiffXKVConfig]
    importance: Path | None


def tuned(calibration: Calibration) -> dict[float, DiffXKVConfig]:
    """`diffkv` at each of `TARGETS`; those that no alphas reach are left out, with a warning."""
    config, found = VARIANTS["diffkv"], {}
    assert config is not None
    for target in TARGETS:
        try:
            found[target] = calibration.with_alphas(replace(config, window=WINDOW), target)
        except ConfigError as error:
            log.warning("left out: %s", error)
    return found


def methods(shape: ModelShape, tokens: int, learnt: Learnt) -> Iterator[Method]:
    """What is compared on prompts that leave `tokens` to compress."""
    for target in TARGETS:
        for name in POLICIES:
            yield Method(name, target, with_knob(name, target, shape, tokens))
        if target in learnt.diffkv:
            yield Method("diffkv", target, learnt.diffkv[target])
        yield Method("streaming", target, _streaming(target, tokens))
    further = (*QUANTIZED, *GOALS, FURTHEST)
    for target in further:
        yield Method("diffxkv", target, with_knob("diffxkv", target, shape, tokens))
    for target in () if learnt.importance is None else (*TARGETS, *further):
        config = with_knob("diffxkv", target, shape, tokens)
        yield Method(PREDICTED, target, replace(config, importance=str(learnt.importance)))
    yield Method("diffxkv, default", None, DiffXKVConfig())
    if learnt.importance is not None:
        predicted = DiffXKVConfig(importance=str(learnt.importance))
        yield Method(f"{PREDICTED}, default", None, predicted)
    for tier in UNIFORM:
        config = DiffXKVConfig(policy="uniform", tiers=Tiers(high=tier, low="K2V2"))
        yield Method(f"uniform {tier}", None, config)


def with_knob(name: str, target: float, shape: ModelShape, tokens: int) -> DiffXKVConfig:
    """What `eval` would set, for frames, their ids and directory entries together."""
    config = VARIANTS[name]
    assert config is not None
    high, low = policy_class(config.policy).formats(config)
    layout = make_layout(
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        raw_itemsize=ITEMSIZE,
        high=high,
        low=low,
    )
    dense = shape.token_bytes * PAGE_TOKENS
    frames = dense / target - entry_bytes(shape, layout)
    frames *= layout.frame_bytes / (layout.frame_bytes + FRAME_ID_BYTES)
    asked = Shape(shape.head_dim, shape.kv_heads, tokens)
    found = KNOBS[name](replace(config, window=0), dense / frames, asked)
    return replace(found, window=WINDOW)


def _streaming(target: float, tokens: int) -> DiffXKVConfig:
    """As many whole pages before the window as there are bytes for."""
    config = DiffXKVConfig(policy="streaming")
    pages = int(tokens / target - config.sink) // PAGE_TOKENS
    return replace(config, window=WINDOW + pages * PAGE_TOKENS)
