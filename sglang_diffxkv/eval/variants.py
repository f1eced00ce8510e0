# SPDX-License-Identifier: Apache-2.0
"""What is compared: SGLang's own pool and configurations of ours, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from sglang_diffxkv.config import ConfigError, DiffXKVConfig, Tiers
from sglang_diffxkv.eval.dtype import ITEMSIZE
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.eval.options import Options
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, PageLayout, TierFormat, make_layout
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.policy.budgeting.learner import PlanSettings
from sglang_diffxkv.policy.registry import policy_class

log = logging.getLogger(__name__)


class Variant(NamedTuple):
    """A named way to hold KV; `config` is None for SGLang's own pool."""

    name: str
    config: DiffXKVConfig | None
    target: float | None = None
    """Physical compression that it was made for, of 16-bit elements."""
    length: int | None = None
    """Of the prompts that it was made for; None: any."""


class Shape(NamedTuple):
    """What bytes depend on: the model, and the length of prompts. Raw elements take 16 bits."""

    head_dim: int
    kv_heads: int
    tokens: int


def _uniform(name: str) -> DiffXKVConfig:
    return DiffXKVConfig(policy="uniform", tiers=Tiers(high=name, low="K2V2"))


FULL = "full"
VARIANTS: Mapping[str, DiffXKVConfig | None] = {
    FULL: None,
    "lossless": DiffXKVConfig(policy="lossless"),
    "int8": _uniform("K8V8"),
    "int4": _uniform("K4V4"),
    "int2": _uniform("K2V2"),
    "k8v4": _uniform("K8V4"),
    "k4v8": _uniform("K4V8"),
    "uniform": _uniform("K8V4"),
    "streaming": DiffXKVConfig(policy="streaming", window=256),
    "snapkv": DiffXKVConfig(policy="snapkv", layer_caps=0.25),
    "diffkv": DiffXKVConfig(policy="diffkv"),
    "xkv": DiffXKVConfig(policy="xkv"),
    "diffxkv": DiffXKVConfig(policy="diffxkv"),
}
"""Without a target; `uniform` is the format that a target picks."""


def make_variant(
    name: str,
    target: float | None,
    shape: Shape,
    configs: Mapping[str, DiffXKVConfig | None] = VARIANTS,
) -> Variant:
    """The variant `name` of `configs`, its knob set so that its compression meets `target`.

    Raises:
        ConfigError: no such variant, or one that cannot meet the target at this length.
    """
    if name not in configs:
        raise ConfigError(f"unknown policy {name!r}; one of: {', '.join(configs)}")
    config = configs[name]
    if target is None or config is None or name not in KNOBS:
        return Variant(name, config)
    return Variant(name, KNOBS[name](config, target, shape), target, shape.tokens)


def make_variants(
    options: Options, model: Model, configs: Mapping[str, DiffXKVConfig | None] = VARIANTS
) -> list[Variant]:
    """Full KV first, as all others are compared with it; then a variant per policy and target.

    They start from `configs`; those with a target are made for one length each. A target that a
    policy cannot meet is left out, with a warning.

    Raises:
        ConfigError: an unknown name, or nothing but targets that cannot be met.
    """
    if options.importance is not None:
        configs = {
            name: _predicting(config, options.importance) for name, config in configs.items()
        }
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


def _predicting(config: DiffXKVConfig | None, importance: Path) -> DiffXKVConfig | None:
    """With an importance model, where the policy has a use for one."""
    if config is None or not issubclass(policy_class(config.policy).settings, PlanSettings):
        return config
    return replace(config, importance=str(importance))


def served(config: DiffXKVConfig, itemsize: int) -> DiffXKVConfig:
    """What a server whose raw elements take `itemsize` bytes is told: it counts in its own."""
    high, _ = policy_class(config.policy).formats(config)
    if config.target is None or config.target < 1 or high.is_raw:
        return config
    return replace(config, target=config.target * itemsize / ITEMSIZE)


def _set_caps(config: DiffXKVConfig, target: float, shape: Shape) -> DiffXKVConfig:
    """A share of every layer's bytes: exact, as the policy keeps to it.

    Not what a user of DiffKV would do, who raises both thresholds until the bytes are what is
    wanted: that takes the distribution of importance, and so a server run for each target first.
    `bench.accuracy.real_models`, which needs no server, does search them.
    """
    layout = _layout(shape, *policy_class(config.policy).formats(config))
    share = _page_bytes(config, target, shape) / full_bytes(layout)
    if share >= 1:
        return config
    # A frame per page and layer is lost to rounding at most.
    share -= layout.frame_bytes / full_bytes(layout)
    if share <= 0:
        raise ConfigError(_too_much(config, target, shape))
    return replace(config, layer_caps=share)


def _set_target(config: DiffXKVConfig, target: float, shape: Shape) -> DiffXKVConfig:
    """The compression of sealed pages; the policies keep to it within a per cent or two."""
    dense = 2 * shape.kv_heads * shape.head_dim * ITEMSIZE * PAGE_TOKENS
    allowed = _page_bytes(config, target, shape)
    if not 0 < allowed < dense:
        raise ConfigError(_too_much(config, target, shape))
    return replace(config, target=dense / allowed)


def _set_window(config: DiffXKVConfig, target: float, shape: Shape) -> DiffXKVConfig:
    """The recent tokens; a page that it covers in part stays raw, and the first keeps its sinks."""
    window = int(shape.tokens / target) - PAGE_TOKENS - config.sink
    if window < PAGE_TOKENS:
        raise ConfigError(_too_much(config, target, shape))
    return replace(config, window=window)


def _set_format(config: DiffXKVConfig, target: float, shape: Shape) -> DiffXKVConfig:
    """The most precise format that takes few enough bytes."""
    allowed = _page_bytes(config, target, shape)
    for name in ("K8V8", "K8V4", "K4V4", "K4V2", "K2V2"):
        layout = _layout(shape, FORMATS[name], FORMATS[name])
        frames = -(-full_bytes(layout) // layout.frame_bytes)
        if frames * layout.frame_bytes <= allowed:
            return replace(config, tiers=Tiers(high=name, low="K2V2"))
    raise ConfigError(_too_much(config, target, shape))


KNOBS: Mapping[str, Callable[[DiffXKVConfig, float, Shape], DiffXKVConfig]] = {
    "uniform": _set_format,
    "streaming": _set_window,
    "snapkv": _set_caps,
    "diffkv": _set_caps,
    "xkv": _set_target,
    "diffxkv": _set_target,
}


def _page_bytes(config: DiffXKVConfig, target: float, shape: Shape) -> float:
    """Bytes that a sealed (page, layer) may take so that all pages of a prompt meet the target."""
    dense = 2 * shape.kv_heads * shape.head_dim * ITEMSIZE
    sealed = max(0, shape.tokens - config.window) // PAGE_TOKENS
    raw = -(-shape.tokens // PAGE_TOKENS) - sealed
    if not sealed:
        raise ConfigError(_too_much(config, target, shape))
    return dense * (shape.tokens / target - raw * PAGE_TOKENS) / sealed


def _layout(shape: Shape, high: TierFormat, low: TierFormat) -> PageLayout:
    return make_layout(
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        raw_itemsize=ITEMSIZE,
        high=high,
        low=low,
    )


def _too_much(config: DiffXKVConfig, target: float, shape: Shape) -> str:
    return (
        f"policy {config.policy!r} cannot reach a compression of {target:g} on prompts of "
        f"{shape.tokens} tokens with a window of {config.window}: lower the target, or ask for "
        "longer prompts"
    )
