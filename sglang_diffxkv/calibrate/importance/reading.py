# SPDX-License-Identifier: Apache-2.0
"""What a model holds of a text, and how much it attends to each token when it reads it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_diffxkv.config import ConfigError

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
"""Between the first reading and the second (KVzip, arXiv 2505.23416)."""
_QUERIES_AT_ONCE = 256
_NAME = "diffxkv_calibrate"


class Read(NamedTuple):
    """One text of n tokens in one layer.

    Attributes:
        keys, values: [H, n, D], keys after RoPE.
        needed: fp32 [H, n], sum over the queries of the second reading of the squared attention
            that each pays to the token, max over the GQA group.
    """

    keys: torch.Tensor
    values: torch.Tensor
    needed: torch.Tensor


class TextReader:
    """A local checkpoint, whose attention is watched."""

    def __init__(self, model: Path, device: str, dtype: torch.dtype) -> None:
        """
        Raises:
            ConfigError: transformers does not know the model, or cannot load it.
        """
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

        name = f"{_NAME}_{id(self)}"  # transformers knows it for good
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, attn_implementation=name, local_files_only=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{model}: importance cannot be learnt: {reason}") from None
        self._model = loaded.to(device).eval()
        self._watch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], None] | None = None

    @torch.no_grad()
    def read_again(self, text: torch.Tensor, request: torch.Tensor) -> list[Read]:
        """All layers' reads of a text, int64 [n], that is read, and then read again."""
        found: list[Read] = []
        n, second = len(text), len(text) + len(request)

        def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
            found.append(Read(k[:, :n], v[:, :n], needed(q[:, second:], k, n, scale)))

        self._forward(torch.cat([text, request, text]), 0, watch)
        return found

    @torch.no_grad()
    def first_keys(self, text: torch.Tensor, start: int) -> torch.Tensor:
        """Keys of the first layer [H, n, D] of a text, int64 [n], that begins at a position."""
        found: list[torch.Tensor] = []
        self._forward(text, start, lambda q, k, v, scale: found.append(k))
        return found[0].float()

    def _forward(self, ids: torch.Tensor, start: int, watch: Any) -> None:
        ids = ids.to(self._model.device)
        positions = torch.arange(start, start + len(ids), device=ids.device)
        self._watch = watch
        self._model.base_model(ids[None], position_ids=positions[None], use_cache=False)

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        assert self._watch is not None
        self._watch(query[0], key[0], value[0], scale)
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None


def needed(q: torch.Tensor, keys: torch.Tensor, n: int, scale: float) -> torch.Tensor:
    """Squared attention to the first n of `keys` [H, N, D] by the last S queries [Hq, S, D].

    Returns:
        fp32 [H, n], summed over the queries, max over the GQA group.
    """
    heads, total, _ = keys.shape
    found = torch.zeros(heads, q.shape[0] // heads, n, device=q.device)
    place = torch.arange(total, device=q.device)
    grouped = q.float().unflatten(0, (heads, -1))
    for first in range(0, q.shape[1], _QUERIES_AT_ONCE):
        part = grouped[:, :, first : first + _QUERIES_AT_ONCE]
        own = total - q.shape[1] + first + torch.arange(part.shape[2], device=q.device)
        scores = part @ keys.float()[:, None].transpose(-1, -2) * scale
        attention = scores.masked_fill(place > own[:, None], -torch.inf).softmax(-1)
        found += attention[..., :n].square().sum(2)
    return found.amax(1)
