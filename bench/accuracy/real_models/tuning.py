# SPDX-License-Identifier: Apache-2.0
"""Knobs at a given compression, searched on prompts that nothing is measured on.

The thresholds of `diffkv` are tuned as its paper's user would: α_high : α_low stays what the paper
has, 1 : 0.02, with α_low at most 1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from bench.accuracy.real_models.ours import ModelShape, Sealer
from bench.accuracy.real_models.protocol import WINDOW
from bench.accuracy.real_models.reader import States
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.settings import ConfigError

RATIO = 0.02
"""α_low / α_high in the paper (arXiv 2412.03131)."""
STEPS_PER_OCTAVE = 32
"""Of α_high: a step changes the compression by about a per cent."""
OCTAVES = 12
"""To either side of α_high = 1: from all tokens high to next to none but the protected ones."""
SHARES = 512
"""Steps of `layer_caps`."""


class Calibration:
    """Prompts that configurations are tuned on."""

    def __init__(self, shape: ModelShape, prompts: Iterable[States]) -> None:
        self._shape, self._prompts = shape, list(prompts)

    def compression(self, config: DiffXKVConfig) -> float:
        """16-bit bytes of all that is compressed of the prompts, over those it takes."""
        sealed = [Sealer(config, self._shape).seal(x, config.window) for x in self._prompts]
        tokens = sum(x.keys.shape[2] - WINDOW for x in self._prompts)
        return tokens * self._shape.token_bytes / sum(x.nbytes for x in sealed)

    def with_alphas(self, config: DiffXKVConfig, target: float) -> DiffXKVConfig:
        """`config`, of `diffkv`, with the lowest alphas that reach a compression of `target`.

        Raises:
            ConfigError: none does: what they may not prune is too much.
        """
        steps = range(-OCTAVES * STEPS_PER_OCTAVE, OCTAVES * STEPS_PER_OCTAVE + 1)
        scales = [2 ** (step / STEPS_PER_OCTAVE) for step in steps]
        return search(
            [replace(config, alpha_high=x, alpha_low=min(1.0, RATIO * x)) for x in scales],
            target,
            self.compression,
        )

    def with_caps(self, config: DiffXKVConfig, target: float) -> DiffXKVConfig:
        """`config` with the largest `layer_caps`, one for all layers, that do.

        Raises:
            ConfigError: none does.
        """
        shares = [share / SHARES for share in range(SHARES, 0, -1)]
        caps = [replace(config, layer_caps=share) for share in shares]
        return search(caps, target, self.compression)


def search(
    configs: Sequence[DiffXKVConfig], target: float, compression: Callable[[DiffXKVConfig], float]
) -> DiffXKVConfig:
    """The first that reaches `target`; they compress in ascending order.

    Raises:
        ConfigError: none does.
    """
    found = bisect_left(configs, target, key=compression)
    if found == len(configs):
        most = compression(configs[-1])
        raise ConfigError(
            f"policy {configs[0].policy!r} cannot reach a compression of {target:g}: the most that "
            f"it was asked for gives {most:.2f}"
        )
    return configs[found]
