# SPDX-License-Identifier: Apache-2.0
"""Policies for tests that run them all, and the shape of the model that they are for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.registry import make_policy


class Shape(NamedTuple):
    """Of a model's KV cache: layers, KV heads, elements of one, their dtype."""

    layers: int
    heads: int
    dim: int = 64
    dtype: torch.dtype = torch.float32


def config_of(policy: str, **fields: Any) -> DiffXKVConfig:
    """The policy's configuration with the given fields; the defaults, where it can do with them."""
    if policy == "snapkv":
        fields = {"layer_caps": 0.25} | fields
    return DiffXKVConfig(policy=policy, **fields)


def policy_of(config: DiffXKVConfig, shape: Shape) -> TierPolicy:
    """The configured policy for a model of this shape."""
    return make_policy(
        config,
        head_dim=shape.dim,
        num_kv_heads=shape.heads,
        raw_itemsize=shape.dtype.itemsize,
        num_layers=shape.layers,
    )
