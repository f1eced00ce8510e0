# SPDX-License-Identifier: Apache-2.0
"""What a model holds of a text, and how much it attends to each token when it reads it again."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_diffxkv.calibrate.importance.scores import Scoring
from sglang_diffxkv.config import ConfigError

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
"""Between the first reading and the second (KVzip, arXiv 2505.23416)."""
_NAME = "diffxkv_calibrate"
"""Of `_attend` among transformers' attention functions."""

_UNKNOWN = "its attention does not go through transformers' interface"

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring], None]
"""Takes queries [Hq, N, D], and keys and values [H, N, D] of a layer."""
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
        kinds = set(getattr(loaded.config.get_text_config(), "layer_types", None) or ())
        self._some_have_windows = len(kinds) > 1

    @property
    def context_length(self) -> int | None:
        """Tokens that the model is made for; None where its configuration does not say."""
        config = self._model.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length

    @torch.no_grad()
    def read_again(self, text: torch.Tensor, request: torch.Tensor) -> list[Read]:
        """Reads by layers without a window of a text, int64 [n], that is read twice."""
        found: list[Read] = []
        n, second = len(text), len(text) + len(request)

        def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> None:
            if self._sees_all(scoring, k.shape[1]):
                found.append(Read(k[:, :n], v[:, :n], needed(q[:, second:], k, n, scoring)))

        self._forward(torch.cat([text, request, text]), 0, watch)
        return found

    @torch.no_grad()
    def first_keys(self, text: torch.Tensor, start: int) -> torch.Tensor:
        """Keys [H, n, D] of a text, int64 [n], that begins at a position: in the first layer.

        Of those without a window.
        """
        found: list[torch.Tensor] = []

        def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> None:
            if self._sees_all(scoring, k.shape[1]):
                found.append(k)

        self._forward(text, start, watch)
        if not found:
            raise self._refusal(_UNKNOWN)
        return found[0].float()

    def _sees_all(self, scoring: Scoring, tokens: int) -> bool:
        """Whether a layer has no window, or one that no text fills where all layers have it.

        Raises:
            ConfigError: all layers have a window.
        """
        if scoring.window is None or self._some_have_windows:
            return scoring.window is None
        if scoring.window < tokens:
            raise ConfigError("all of its layers have a window, so that none keeps the context")
        return True

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
    """Causal attention, as transformers' models call it."""
    scoring = Scoring.asked(query.shape[-1], scaling, kwargs)
    q, k, v = query[0], key[0], value[0]
    _watch.get()(q, k, v, scoring)
    if scoring.is_plain:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scoring.scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    values = v.float()[:, None]
    parts = [weights @ values for weights in scoring.attention(q, k)]
    out = torch.cat(parts, 2).flatten(0, 1).to(v.dtype)
    return out.transpose(0, 1)[None], None


def needed(q: torch.Tensor, keys: torch.Tensor, n: int, scoring: Scoring) -> torch.Tensor:
    """Squared attention to the first n of `keys` [H, N, D] by the last S queries [Hq, S, D].

    Returns:
        fp32 [H, n], summed over the queries, max over the GQA group.
    """
    found = torch.zeros(len(keys), q.shape[0] // len(keys), n, device=q.device)
    for weights in scoring.attention(q, keys):
        found += weights[..., :n].square().sum(2)
    return found.amax(1)
