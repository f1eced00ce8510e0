# SPDX-License-Identifier: Apache-2.0
"""A causal language model that goes on from keys and values which somebody else kept for it.

Needs torch and transformers only: it also runs where the peers are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM


class States(NamedTuple):
    """What a model computed for n tokens: fp32 queries [L, Hq, n, D], keys and values [L, H, n, D],
    queries and keys after RoPE."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class LayerPrefix(NamedTuple):
    """What is left of the tokens before, in one layer.

    Attributes:
        keys, values: fp32 [H, P, D].
        kept: bool [H, P], what may be attended to; None: everything.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor | None = None

    def followed_by(self, keys: torch.Tensor, values: torch.Tensor) -> LayerPrefix:
        """With the tokens [H, T, D] after it, all of which are kept."""
        kept = self.kept
        if kept is not None:
            kept = torch.cat([kept, kept.new_ones(keys.shape[:2])], 1)
        return LayerPrefix(
            torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1), kept
        )


Prefix = Sequence[LayerPrefix]


class Reader:
    """A local checkpoint in fp32, whose attention is the plain one of torch."""

    def __init__(self, model: Path) -> None:
        AttentionInterface.register("reader", self._attend)
        AttentionMaskInterface.register("reader", lambda *args, **kwargs: None)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="reader", local_files_only=True
        ).eval()
        self._prefix: Prefix | None = None
        self._states: list[tuple[torch.Tensor, ...]] | None = None

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> States:
        """Full attention over `ids` (int64 [n])."""
        self._states = []
        self._forward(ids, 0)
        found, self._states = self._states, None
        return States(*(torch.cat(side) for side in zip(*found, strict=True)))

    @torch.no_grad()
    def log_probabilities(self, ids: torch.Tensor, start: int, prefix: Prefix) -> torch.Tensor:
        """Of what follows each of `ids` (int64 [T], the first at position `start`): [T, V]."""
        self._prefix = prefix
        try:
            hidden = self._forward(ids, start)
        finally:
            self._prefix = None
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return logits.log_softmax(-1)

    def _forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        positions = torch.arange(start, start + len(ids))[None]
        found = self.model.model(ids[None], position_ids=positions, use_cache=False)
        hidden: torch.Tensor = found.last_hidden_state[0]
        return hidden

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
        if self._prefix is None:
            if self._states is not None:
                self._states.append((query, key, value))
            out = attend(query[0], LayerPrefix(key[0], value[0]), scaling)[None]
        else:
            layer = self._prefix[module.layer_idx]
            out = attend(query[0], layer.followed_by(key[0], value[0]), scaling)[None]
        return out.transpose(1, 2), None


def attend(query: torch.Tensor, context: LayerPrefix, scale: float | None) -> torch.Tensor:
    """Causal attention of the last T tokens of `context`; query and result fp32 [Hq, T, D]."""
    if context.kept is None:
        mask = _causal(query.shape[1], context.keys.shape[1])
        return scaled_dot_product_attention(
            query[None], context.keys[None], context.values[None], mask, scale=scale,
            enable_gqa=True,
        )[0]  # fmt: skip
    by_head = []
    heads = query.unflatten(0, (len(context.keys), -1))
    for q, k, v, kept in zip(heads, context.keys, context.values, context.kept, strict=True):
        k, v = k[kept], v[kept]
        mask = _causal(q.shape[1], len(k))
        by_head.append(
            scaled_dot_product_attention(
                q, k.expand(len(q), -1, -1), v.expand(len(q), -1, -1), mask, scale=scale
            )
        )
    return torch.cat(by_head)


def _causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
