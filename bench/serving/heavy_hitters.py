# SPDX-License-Identifier: Apache-2.0
"""Gives the random demo model tokens that all queries look at, as trained models have.

With random weights a token is important to some queries and not to others, so that averaged over
queries two thirds of the tokens get more attention than uniform and none gets next to none. In
trained models some tokens matter to every query; DiffKV's thresholds rest on that (2412.03131,
section 3). Here a constant channel of the embedding gives every query of a KV head one common
direction, along which keys differ by token: a token's importance is then about log-normal, and
the wider the larger STRENGTH is.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STRENGTH = 4.0
"""Leaves about a quarter of the tokens high and a quarter pruned at α_h = 1, α_l = 0.02."""

_CHANNEL = 8.0
_FASTEST = 24
"""First of the head_dim / 2 = 64 rotary frequencies that barely turn within a prompt: the common
direction must mean the same at every distance."""


def add_heavy_hitters(folder: Path, strength: float = STRENGTH, seed: int = 0) -> None:
    """Change the weights of the demo model in `folder` in place."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["head_dim"]
    file = folder / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = _CHANNEL
    half = dim // 2
    slow = (torch.arange(dim) % half >= half * _FASTEST // 64).float()
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config["num_hidden_layers"]):
        direction = torch.randn(kv_heads, 1, dim, generator=generator) * slow
        column = direction.expand(kv_heads, heads // kv_heads, dim) * (strength * 3**0.5)
        query = weights[f"model.layers.{layer}.self_attn.q_proj.weight"]
        query[:, 0] = (column / _CHANNEL).reshape(-1).to(query.dtype)
    save_file(weights, file, metadata={"format": "pt"})
