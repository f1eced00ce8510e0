# SPDX-License-Identifier: Apache-2.0
"""`QuantizedCache` of transformers, with quanto and with HQQ.

The prompt comes in two updates, all but its window first, with the keys and values of full
attention: so the window stays in the cache's residual, which otherwise protects no prompt token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import QuantizedCache

from bench.accuracy.peers.compressed import Compressed, nbytes
from bench.accuracy.real_models.protocol import WINDOW
from bench.accuracy.real_models.reader import LayerPrefix, States


class Setting(NamedTuple):
    """Arguments of `QuantizedCache`; what an axis means differs between its backends."""

    name: str
    backend: str
    nbits: int
    axis_key: int
    axis_value: int
    group: int


SETTINGS = (
    # As transformers has them: groups of 64 elements, here a token's.
    Setting("quanto int4", "quanto", 4, 0, 0, 64),
    Setting("quanto int2", "quanto", 2, 0, 0, 64),
    # As KIVI: keys by channel, groups of so many tokens.
    Setting("quanto int4, keys by channel", "quanto", 4, -1, 0, 64),
    Setting("quanto int4, keys by channel, groups of 32", "quanto", 4, -1, 0, 32),
    Setting("quanto int2, keys by channel", "quanto", 2, -1, 0, 64),
    Setting("quanto int2, keys by channel, groups of 32", "quanto", 2, -1, 0, 32),
    # HQQ's axis 1 has a token's elements in a group; axis 0 has a channel's of all heads.
    Setting("hqq int4", "hqq", 4, 1, 1, 64),
    Setting("hqq int2", "hqq", 2, 1, 1, 64),
    Setting("hqq int4, keys by channel", "hqq", 4, 0, 1, 64),
    Setting("hqq int2, keys by channel", "hqq", 2, 0, 1, 64),
)


def quantized(states: States, config: Any) -> Iterator[Compressed]:
    """All `SETTINGS`; `config`: of the model."""
    for setting in SETTINGS:
        cache = QuantizedCache(
            setting.backend, config, setting.nbits, setting.axis_key, setting.axis_value,
            setting.group, residual_length=2 * WINDOW,
        )  # fmt: skip
        yield Compressed(setting.name, None, *_compress(cache, states))


def _compress(cache: QuantizedCache, states: States) -> tuple[list[LayerPrefix], int]:
    prefix, total = [], 0
    for index, (keys, values) in enumerate(zip(states.keys, states.values, strict=True)):
        keys, values = keys[None], values[None]
        cache.update(keys[:, :, :-WINDOW], values[:, :, :-WINDOW], index)
        layer = cache.layers[index]
        total += nbytes([layer._quantized_keys, layer._quantized_values])
        seen = cache.update(keys[:, :, -WINDOW:], values[:, :, -WINDOW:], index)
        assert layer.keys.shape[2] == WINDOW, "the window was quantized, too"
        prefix.append(LayerPrefix(*(side[0].to(torch.float32) for side in seen)))
    return prefix, total
