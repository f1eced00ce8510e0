# SPDX-License-Identifier: Apache-2.0
"""A model's answers on a cache whose sealed part is not what the model wrote, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sglang_diffxkv.kernels.layout import PAGE_TOKENS

WINDOW = 64
"""Recent tokens that stay raw, and the rest of a page before them."""
MAX_ANSWER = 24


class Prefill(NamedTuple):
    """One prompt of n tokens with full KV, and the model's own answer to it.

    Attributes:
        q: fp32 [L, Hq, n, D], after RoPE.
        kv: fp32 [2, L, H, n, D], keys (after RoPE) and values.
        ids: int64 [n + m - 1], the prompt and all but the last of the m answer tokens.
        logprobs: fp32 [m, vocabulary], before each answer token.
        answer: int64 [m].
    """

    q: torch.Tensor
    kv: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    answer: torch.Tensor

    @property
    def sealed(self) -> int:
        """How many tokens are in sealed pages: all full pages before the window."""
        return (self.q.shape[2] - WINDOW) // PAGE_TOKENS * PAGE_TOKENS


class Agreement(NamedTuple):
    """With full KV, of one answer: its mean KL in nats over its tokens, and whether it is equal."""

    kl: float
    same: bool


class Reader:
    """A causal language model of transformers, in fp32."""

    def __init__(self, path: Path) -> None:
        AttentionInterface.register("recording", self._attend)
        AttentionMaskInterface.register("recording", sdpa_mask)
        self._queries: list[torch.Tensor] = []
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="recording", local_files_only=True
        ).eval()

    def _attend(
        self, module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        self._queries.append(query)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    @torch.no_grad()
    def prefill(self, prompt: Sequence[int]) -> Prefill:
        """Full KV of a prompt, and the likeliest answer."""
        self._queries.clear()
        cache, ids = DynamicCache(), torch.tensor([prompt])
        step = self._model(ids, past_key_values=cache)
        q = torch.cat(self._queries)
        kv = _contents(cache)
        logprobs, answer = [], []
        end = self._model.generation_config.eos_token_id
        while len(answer) < MAX_ANSWER and end not in answer:
            logprobs.append(step.logits[0, -1].log_softmax(-1))
            answer.append(int(logprobs[-1].argmax()))
            step = self._model(torch.tensor([answer[-1:]]), past_key_values=cache)
        ids = torch.cat([ids[0], torch.tensor(answer[:-1], dtype=torch.int64)])
        return Prefill(q, kv, ids, torch.stack(logprobs), torch.tensor(answer))

    @torch.no_grad()
    def agreements(self, prefill: Prefill, sealed: torch.Tensor) -> list[Agreement]:
        """How the answer changes where sealed tokens are read as `sealed`.

        All later tokens of the prompt are computed anew over them, as in a request that finds the
        sealed pages in the prefix cache; then the answer's tokens are given.

        Args:
            sealed: fp32 [B, 2, L, H, prefill.sealed, D], B variants.
        """
        self._queries.clear()
        cache = DynamicCache()
        for layer in range(sealed.shape[2]):
            cache.update(sealed[:, 0, layer], sealed[:, 1, layer], layer)
        ids = prefill.ids[prefill.sealed :].expand(len(sealed), -1)
        logits = self._model(ids, past_key_values=cache).logits[:, -len(prefill.answer) :]
        found = logits.log_softmax(-1)
        kl = (prefill.logprobs.exp() * (prefill.logprobs - found)).sum(-1).mean(-1)
        same = (found.argmax(-1) == prefill.answer).all(-1)
        return [Agreement(*pair) for pair in zip(kl.tolist(), same.tolist(), strict=True)]


def _contents(cache: DynamicCache) -> torch.Tensor:
    return torch.stack(
        [torch.cat([getattr(layer, side) for layer in cache.layers]) for side in ("keys", "values")]
    ).clone()
