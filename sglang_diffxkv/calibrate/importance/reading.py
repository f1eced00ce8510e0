# SPDX-License-Identifier: Apache-2.0
"""What a model holds of a text, and how much it attends to each token when it reads it again."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_diffxkv.config import ConfigError

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
"""Between the first reading and the second (KVzip, arXiv 2505.23416)."""
_QUERIES_AT_ONCE = 256
_NAME = "diffxkv_calibrate"
"""Of `_attend` among transformers' attention functions."""

_UNKNOWN = "its attention does not go through transformers' interface"

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Takes queries [Hq, N, D], keys and values [H, N, D] of a layer, and the scale of scores."""
_watch: ContextVar[Watch] = ContextVar("watch")
"""What `_attend` shows them to. Transformers keeps the function for good, so it holds no model."""


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

        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
        self._path = model
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, attn_implementation=_NAME, local_files_only=True
            )
        except KeyError:
            raise self._refusal(_UNKNOWN) from None
        except Exception as error:  # of files and of the model's own code
            raise self._refusal(str(error) or type(error).__name__) from None
        self._model = loaded.to(device).eval()

    @property
    def context_length(self) -> int | None:
        """Tokens that the model is made for; None where its configuration does not say."""
        config = self._model.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length

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
        if not found:
            raise self._refusal(_UNKNOWN)
        return found[0].float()

    def _forward(self, ids: torch.Tensor, start: int, watch: Watch) -> None:
        ids = ids.to(self._model.device)
        positions = torch.arange(start, start + len(ids), device=ids.device)
        before = _watch.set(watch)
        try:
            self._model.base_model(ids[None], position_ids=positions[None], use_cache=False)
        except ConfigError as error:
            raise self._refusal(str(error)) from None
        except (AttributeError, TypeError):  # without the mask that it expects, say
            raise self._refusal(_UNKNOWN) from None
        finally:
            _watch.reset(before)

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._path}: importance cannot be learnt: {reason.splitlines()[0]}")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention, as transformers' models call it.

    Raises:
        ConfigError: the model asks for another kind, which cannot be served either.
    """
    window = kwargs.get("sliding_window") or torch.inf
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")) or window < key.shape[2]:
        raise ConfigError("its attention is not plain and causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _watch.get()(query[0], key[0], value[0], scale)
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
