# SPDX-License-Identifier: Apache-2.0
"""kvpress: methods that drop tokens, and keep what they keep in 16 bit.

The cache of a prompt keeps its window's number of tokens and a share of the others', chosen by the
press from all of them; nothing is charged for saying which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KVzipPress,
    SnapKVPress,
)
from transformers import DynamicCache

from bench.accuracy.peers.compressed import RAW_BYTES, Compressed
from bench.accuracy.real_models.protocol import WINDOW
from bench.accuracy.real_models.reader import LayerPrefix, Prefix, Reader, States

_Key = tuple[str, float]
"""Of a press: its name, and the compression it is set for."""
PRESSES: dict[str, Callable[[float], BasePress]] = {
    "kvpress SnapKV": lambda ratio: SnapKVPress(ratio, window_size=WINDOW),
    "kvpress ExpectedAttention": lambda ratio: ExpectedAttentionPress(ratio),
    "kvpress AdaKV ExpectedAttention": lambda ratio: AdaKVPress(ExpectedAttentionPress(ratio)),
}
"""Those that work layer by layer, by the share of the tokens that they drop."""


KVZIP = "kvpress KVzip"
QUANTIZED, BY_CODES = "quanto int4, keys by channel", 32 / 9
"""What KVzip is combined with, as kvpress can, and its compression."""
COMBINED = f"{KVZIP}, {QUANTIZED}"


def press_methods(targets: Sequence[float]) -> list[_Key]:
    """All that `pressed` yields."""
    single = [(name, target) for name in (*PRESSES, KVZIP) for target in targets]
    return single + [(COMBINED, target) for target in targets if target > BY_CODES]


def pressed(
    reader: Reader,
    ids: torch.Tensor,
    states: States,
    codes: Compressed,
    targets: Sequence[float],
) -> Iterator[Compressed]:
    """Every press at every compression in `targets`, of a prompt `ids` (int64 [n]).

    Args:
        codes: the same prompt by `QUANTIZED`, for what KVzip leaves of it.
    """
    layers, heads, tokens, dim = states.keys.shape
    dense = 2 * RAW_BYTES * layers * heads * (tokens - WINDOW) * dim
    ratios = {target: _dropped(tokens, target) for target in targets}
    pruning = _Asked(
        {
            (name, target): press(ratio)
            for name, press in PRESSES.items()
            for target, ratio in ratios.items()
        }
    )
    with torch.no_grad(), pruning(reader.model):
        reader.model.model(ids[None], past_key_values=DynamicCache())
    for (name, target), prefix in pruning.found.items():
        yield Compressed(name, target, prefix, dense / target)
    zipping = {(KVZIP, target): ratio for target, ratio in ratios.items()}
    for target in targets:
        if target > BY_CODES:
            zipping[COMBINED, target] = _dropped(tokens, target / BY_CODES)
    kvzip = _AskedKVzip(zipping)
    with torch.no_grad(), kvzip(reader.model):
        reader.model.model(input_ids=ids[None], past_key_values=DynamicCache())
    whole = [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]
    for (name, target), kept in kvzip.found.items():
        if name == KVZIP:
            yield Compressed(name, target, _masked(whole, kept), dense / target)
            continue
        # What it drops of the raw window counts as saved: all methods are charged for all of it.
        before, window = torch.stack(kept).float().split([tokens - WINDOW, WINDOW], -1)
        saved = dense / (tokens - WINDOW) * WINDOW * (1 - float(window.mean()))
        nbytes = codes.nbytes * float(before.mean()) - saved
        yield Compressed(name, target, _masked(codes.prefix, kept), nbytes)


def _dropped(tokens: int, compression: float) -> float:
    """Share of all tokens, so that those outside the window are compressed so much."""
    return 1 - (WINDOW + (tokens - WINDOW) / compression) / tokens


def _masked(prefix: Prefix, kept: Sequence[torch.Tensor]) -> Prefix:
    return [layer._replace(kept=mask) for layer, mask in zip(prefix, kept, strict=True)]


class _Asked(BasePress):
    """Several presses in one prefill: each is shown the full cache, which stays as it is.

    Attributes:
        found: what each of them leaves, by its key.
    """

    def __init__(self, presses: dict[_Key, BasePress]) -> None:
        self._presses = presses
        self.found: dict[_Key, list[LayerPrefix]] = {key: [] for key in presses}

    def post_init_from_model(self, model: Any) -> None:
        for press in self._presses.values():
            press.post_init_from_model(model)

    def compress(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for key, press in self._presses.items():
            module.masked_key_indices = None
            left = press.compress(module, hidden_states, keys, values, attentions, kwargs)
            kept = None if module.masked_key_indices is None else _kept(module, keys)
            self.found[key].append(LayerPrefix(left[0][0], left[1][0], kept))
        module.masked_key_indices = None
        return keys, values


class _AskedKVzip(KVzipPress):
    """KVzip at several ratios, which differ in nothing but the last step.

    It expects a prompt in a chat template, whose first tokens it leaves unscored: here is none.
    """

    def __init__(self, ratios: dict[_Key, float]) -> None:
        super().__init__(compression_ratio=max(ratios.values()))
        self._ratios = ratios
        self.found: dict[_Key, list[torch.Tensor]] = {}

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        self.prefix_length = 0
        return super().prepare(*args, **kwargs)

    def compress_post(self, model: Any) -> None:
        for key, ratio in self._ratios.items():
            self.compression_ratio = ratio
            super().compress_post(model)
            self.found[key] = [
                _kept(layer.self_attn, self._cache.layers[i].keys)
                for i, layer in enumerate(model.model.layers)
            ]
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None


def _kept(module: Any, keys: torch.Tensor) -> torch.Tensor:
    """bool [H, n]: what a press that drops tokens head by head has left of keys [1, H, n, D]."""
    kept = torch.ones(keys.shape[:3], dtype=torch.bool)
    kept[module.masked_key_indices] = False
    return kept[0]
